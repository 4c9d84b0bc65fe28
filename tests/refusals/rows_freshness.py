"""Nonces, replays, and clocks: what was good once, somewhere else, or at another time."""

from __future__ import annotations

import json
import secrets
from typing import Any

from stip_keyservice.service.policy.loading import META_KEY
from stip_keyservice.service.state.schema import meta
from stip_protocol.lease import CLOCK_SKEW
from stip_stack.tee import Faults
from tests.refusals.forge import DAY
from tests.refusals.scene import TOKENS, Scene, refused
from tests.refusals.table import Act, Case, Section

NONCE, CLOCK, OUTDATED = "nonce_refused", "clock_refused", "policy_outdated"


async def granted(scene: Scene) -> Any:
    """A release request that was granted a moment ago, as somebody on the way captured it."""
    request = await scene.request()
    await scene.world.stub.Release(request)
    return request


async def replayed(scene: Scene) -> Act:
    return scene.asking(await granted(scene))


async def replayed_from_another_connection(scene: Scene) -> Act:
    return scene.asking(await granted(scene), stub=await scene.service.stub())


async def replayed_from_another_address(scene: Scene) -> Act:
    return scene.asking(await granted(scene), stub=await scene.service.stub("127.0.0.2"))


async def replayed_to_a_replica(scene: Scene) -> Act:
    request = await granted(scene)
    return scene.asking(request, stub=(await scene.replica()).stub)


async def replayed_after_a_refusal(scene: Scene) -> Act:
    """A nonce that a refusal has spent."""
    nonce = (await scene.world.challenge()).nonce
    bad, word, enclave = await scene.claims(delegation=scene.delegate(expires=scene.now), nonce=nonce)
    assert (await refused(scene.asking(enclave.request(bad, word))())).code == "delegation_refused"
    good, word, enclave = await scene.claims(nonce=nonce)
    return scene.asking(enclave.request(good, word))


async def nonce_used_twice(scene: Scene) -> Act:
    """Other claims over a challenge that was answered."""
    nonce = (await scene.world.challenge()).nonce
    claims, word, enclave = await scene.claims(nonce=nonce)
    await scene.asking(enclave.request(claims, word))()
    claims, word, enclave = await scene.claims(nonce=nonce, tokens=1)
    return scene.asking(enclave.request(claims, word))


async def of_another_service(scene: Scene) -> Act:
    other = await scene.service.another(rules={})
    return scene.asking(await scene.request(nonce=(await other.challenge()).nonce))


async def from_the_future(scene: Scene) -> Act:
    """Issued by a replica whose clock is an hour ahead."""
    ahead = await scene.replica(ahead=3600)
    scene.asked = scene.world
    return scene.asking(await scene.request(nonce=(await ahead.challenge()).nonce))


async def expired(scene: Scene) -> Act:
    claims, word, enclave = await scene.claims()
    scene.world.clock.now += 60
    return scene.asking(enclave.request(claims, word))


async def prolonged(scene: Scene) -> Act:
    """A genuine nonce with a later end written into it."""
    nonce = (await scene.world.challenge()).nonce
    later = (int.from_bytes(nonce[:8], "big") + 10).to_bytes(8, "big")
    return scene.asking(await scene.request(nonce=later + nonce[8:]))


async def older_heartbeat(scene: Scene) -> Act:
    lease = await scene.lease()
    captured = scene.heartbeat(lease, nonce=secrets.token_bytes(32))
    await scene.renewed(captured)
    await scene.renewed(scene.heartbeat(lease, serial=1, nonce=secrets.token_bytes(32)))
    return scene.renewing(captured, stub=await scene.service.stub("127.0.0.2"))


async def older_heartbeat_at_a_replica(scene: Scene) -> Act:
    lease = await scene.lease()
    captured = scene.heartbeat(lease, nonce=secrets.token_bytes(32))
    await scene.renewed(captured)
    await scene.renewed(scene.heartbeat(lease, serial=1, nonce=secrets.token_bytes(32)))
    return scene.renewing(captured, stub=(await scene.replica()).stub)


async def second_heartbeat_of_a_serial(scene: Scene) -> Act:
    lease = await scene.lease()
    await scene.renewed(scene.heartbeat(lease, nonce=secrets.token_bytes(32)))
    return scene.renewing(scene.heartbeat(lease, nonce=secrets.token_bytes(32)))


async def replayed_watch(scene: Scene) -> Act:
    await scene.lease()
    request = await scene.watch()
    call = scene.world.stub.Watch(request)
    await call.read()
    scene.finally_(call.cancel)
    return scene.watching(request, stub=await scene.service.stub("127.0.0.2"))


async def watch_at_a_replica(scene: Scene) -> Act:
    await scene.lease()
    request = await scene.watch()
    call = scene.world.stub.Watch(request)
    await call.read()
    scene.finally_(call.cancel)
    return scene.watching(request, stub=(await scene.replica()).stub)


def outdated(scene: Scene) -> None:
    """Another replica, with a signed policy of its own, has loaded that."""
    value = json.dumps({"serial": 2, "digest": bytes(32).hex(), "signed": True})
    with scene.world.store.write() as db:
        db.execute(meta.insert().values(key=META_KEY, value=value))

    def forget() -> None:
        with scene.world.store.write() as db:
            db.execute(meta.delete().where(meta.c.key == META_KEY))

    scene.finally_(forget)


async def released_by_the_policy_of_before(scene: Scene) -> Act:
    request = await scene.request()
    outdated(scene)
    return scene.asking(request)


async def renewed_by_the_policy_of_before(scene: Scene) -> Act:
    request = scene.heartbeat(await scene.lease())
    outdated(scene)
    return scene.renewing(request)


FRESHNESS = Section(
    "Nonces and replays",
    "A challenge is good once, in its time, at the service that gave it, whichever connection or replica it comes "
    "back by. The very last heartbeat, repeated, gets the very same answer once more, and costs nothing.",
    "service",
    (
        Case("a captured release, replayed", "nothing", NONCE, replayed),
        Case("a captured release from another connection", "source port, TLS session", NONCE,
             replayed_from_another_connection),
        Case("a captured release from another address", "source address", NONCE, replayed_from_another_address),
        Case("a captured release to another replica", "the process", NONCE, replayed_to_a_replica),
        Case("a release by a replica that has not read the policy of today", "the policy that another has loaded",
             OUTDATED, released_by_the_policy_of_before),
        Case("a renewal by a replica that has not read the policy of today", "the policy that another has loaded",
             OUTDATED, renewed_by_the_policy_of_before, event="renewal"),
        Case("other claims over a challenge that was used", "everything but the nonce", NONCE, nonce_used_twice),
        Case("good claims over a challenge that a refusal has used up", "everything but the nonce", NONCE,
             replayed_after_a_refusal),
        Case("a nonce of another key service", "who issued it", NONCE, of_another_service),
        Case("a nonce from a time to come", "a replica's clock, an hour ahead", NONCE, from_the_future),
        Case("an expired nonce", "a minute more", NONCE, expired),
        Case("a nonce whose end was moved", "ten seconds in the nonce", NONCE, prolonged),
        Case("a captured heartbeat after the next one", "nothing", NONCE, older_heartbeat, event="renewal"),
        Case("a captured heartbeat after the next one, to another replica", "the process", NONCE,
             older_heartbeat_at_a_replica, event="renewal"),
        Case("a second heartbeat over one serial of a lease", "its nonce", NONCE, second_heartbeat_of_a_serial,
             event="renewal"),
        Case("a captured watch, replayed from another address", "source address", NONCE, replayed_watch, event=None),
        Case("a captured watch, replayed to another replica", "the process", NONCE, watch_at_a_replica, event=None),
    ),
)  # fmt: skip


def rewind(scene: Scene, seconds: int = CLOCK_SKEW + 1) -> None:
    """Set the service's clock back, until the case is over."""
    before = scene.world.clock.now

    def repair() -> None:
        scene.world.clock.now = before

    scene.finally_(repair)
    scene.world.clock.now = before - seconds


async def decided(scene: Scene) -> None:
    """Something that the audit log dates now."""
    await scene.lease()


async def release_behind(scene: Scene) -> Act:
    request = await scene.request()
    await decided(scene)
    rewind(scene)
    return scene.asking(request)


async def release_a_year_behind(scene: Scene) -> Act:
    request = await scene.request()
    await decided(scene)
    rewind(scene, 365 * DAY)
    return scene.asking(request)


async def renewal_behind(scene: Scene) -> Act:
    request = scene.heartbeat(await scene.lease())
    rewind(scene)
    return scene.renewing(request)


async def watch_behind(scene: Scene) -> Act:
    await decided(scene)
    request = await scene.watch()
    rewind(scene)
    return scene.watching(request)


async def challenge_behind(scene: Scene) -> Act:
    await decided(scene)
    rewind(scene)
    return scene.world.challenge


async def reuse_while_the_clock_stands(scene: Scene) -> Act:
    request = await granted(scene)
    await granted(scene)
    return scene.asking(request)


async def overspent_while_the_clock_stands(scene: Scene) -> Act:
    lease = await scene.lease()
    return scene.renewing(scene.heartbeat(lease, fed=TOKENS + 1))


async def lease_long_over(scene: Scene) -> Act:
    """An enclave whose clock stands has not noticed that its lease ended."""
    lease = await scene.lease(word={"expires": scene.now + 7200})
    scene.world.clock.now += 900 + 300
    return scene.renewing(scene.heartbeat(lease))


async def delegation_over(scene: Scene) -> Act:
    lease = await scene.lease(word={"expires": scene.now + 600})
    scene.world.clock.now += 600
    return scene.renewing(scene.heartbeat(lease))


async def rolled_back_enclave(scene: Scene) -> Act:
    lease = await scene.lease()
    await scene.renewed(scene.heartbeat(lease, fed=50))
    return scene.renewing(scene.heartbeat(lease, serial=1, fed=49))


async def stale_collateral(scene: Scene) -> Act:
    made = scene.new_enclave()
    made.provider = scene.world.platform.provider(made.measurement, clock=lambda: scene.now - 31 * DAY)
    return scene.asking(await scene.request(enclave=made))


async def early_collateral(scene: Scene) -> Act:
    made = scene.new_enclave()
    later = scene.now + DAY
    made.provider = scene.world.platform.provider(made.measurement, faults=Faults(), clock=lambda: later)
    return scene.asking(await scene.request(enclave=made))


CLOCKS = Section(
    "Clocks",
    "The service decides nothing before its last decision, and what ends by tokens ends while every clock stands. "
    "Enclaves have no clock to be fooled by: what their host's clock does shows in collateral and heartbeats.",
    "service",
    (
        Case("a challenge from a service whose clock was set back", "the service's clock", CLOCK, challenge_behind,
             event=None),
        Case("a release by a service whose clock was set back", "the service's clock", CLOCK, release_behind),
        Case("a release by a service whose clock is a year behind", "the service's clock", CLOCK,
             release_a_year_behind),
        Case("a renewal by a service whose clock was set back", "the service's clock", CLOCK, renewal_behind,
             event="renewal"),
        Case("a watch at a service whose clock was set back", "the service's clock", CLOCK, watch_behind, event=None),
        Case("a used challenge while the service's clock stands", "the service's clock", NONCE,
             reuse_while_the_clock_stands),
        Case("more tokens than granted while every clock stands", "`fed`", "lease_spent",
             overspent_while_the_clock_stands, event="renewal"),
        Case("a heartbeat of an enclave that did not notice its lease's end", "its clock, which stands",
             "lease_expired", lease_long_over, event="renewal"),
        Case("a heartbeat after the user's word has ended", "its clock, which stands", "delegation_refused",
             delegation_over, event="renewal"),
        Case("a heartbeat of an enclave that was rolled back", "`fed`, less than before", "request_invalid",
             rolled_back_enclave, event="renewal"),
        Case("collateral from a host whose clock stands", "a month", "collateral_expired", stale_collateral),
        Case("collateral from a host whose clock is ahead", "a day", "collateral_expired", early_collateral),
    ),
)  # fmt: skip
