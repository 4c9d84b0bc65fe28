"""The service's clock: set back it releases nothing, stopped it gives nobody more than tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stip_keyservice.service import auditlog
from stip_keyservice.service.auditlog import AuditLog
from stip_keyservice.service.clock import ServiceClock, settle
from stip_protocol.errors import ClockRefused
from stip_protocol.lease import CLOCK_SKEW
from stip_protocol.wire import keyservice_pb2

from .conftest import START, Person, Serve, World, refusal


@given(now=st.integers(0, 2**40), last=st.integers(0, 2**40))
def test_a_decision_is_never_made_before_the_last_one(now: int, last: int) -> None:
    if last - now > CLOCK_SKEW:
        with pytest.raises(ClockRefused, match="accept-clock"):
            settle(now, last)
    else:
        assert settle(now, last) >= max(now, last)


def test_the_clock_asks_the_log_again_before_it_refuses() -> None:
    asked: list[int] = []

    def refresh() -> int:
        asked.append(1)
        return 900

    clock = ServiceClock(lambda: 5000, refresh, lambda: 1000.0)
    assert (clock.behind, clock.reading(), clock.require(), asked) == (True, 5000, 1000, [1])
    with pytest.raises(ClockRefused):
        ServiceClock(lambda: 5000, lambda: 5000, lambda: 1000.0).require()


async def test_a_rewound_clock_releases_and_renews_nothing_until_it_is_right_or_accepted(world: World) -> None:
    alice = world.person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    delegation = alice.delegate(enclave, instance.id)
    _, lease = await world.bundle(enclave, alice, instance.id)
    asked = [enclave.claims(await world.challenge(), delegation, instance.id) for _ in range(2)]

    world.clock.now = START - CLOCK_SKEW  # within what replicas differ by: the log's time counts
    await world.stub.Release(enclave.request(asked[0], delegation))
    assert world.entries()[-1].at == START

    world.clock.now = START - CLOCK_SKEW - 1
    assert await refusal(world.challenge()) == "clock_refused"
    assert await refusal(world.stub.Release(enclave.request(asked[1], delegation))) == "clock_refused"
    assert await refusal(world.renew(enclave, lease, fed=1, wanted=1)) == "clock_refused"
    assert [(entry.code, entry.at) for entry in world.entries()[-2:]] == [("clock_refused", START)] * 2
    assert world.user(alice).spent == 200

    log = AuditLog(world.store, world.home.service)
    log.accept_clock(now=world.clock.now, reason="a time server was wrong")
    await world.renew(enclave, lease, fed=1, wanted=1)
    await world.challenge()
    assert auditlog.verify(world.store, world.home.service.public_key()).at == world.clock.now


async def test_what_another_process_folded_meanwhile_does_not_undo_that_a_clock_was_accepted(world: World) -> None:
    alice = world.person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    _, lease = await world.bundle(enclave, alice, instance.id)
    assert world.servicer is not None
    issuer = world.servicer._issuer
    world.clock.now = START + 5000  # a time server was wrong
    for _ in range(10):
        assert await refusal(world.renew(world.enclave(), lease, fed=1, wanted=1)) == "signature_invalid"
    world.clock.now = START
    for _ in range(10):
        assert await refusal(world.renew(enclave, lease, fed=1, wanted=1)) == "clock_refused"
    AuditLog(world.store, world.home.service).accept_clock(now=START, reason="set right")
    issuer.write_folded()
    issuer.close()
    assert world.entries()[-1].event == "refusals_folded"
    assert world.entries()[-1].at == START
    await world.challenge()
    await world.renew(enclave, lease, fed=1, wanted=1)


async def test_a_restart_does_not_forget_how_late_it_was(serve: Serve) -> None:
    async with serve() as before:
        before.clock.now = START + 1000
        alice = before.person("alice")
        instance, enclave = before.instance(owner=alice), before.enclave()
        await before.bundle(enclave, alice, instance.id)
    async with serve() as after:
        assert await refusal(after.challenge()) == "clock_refused"


async def test_a_frozen_clock_extends_nothing_beyond_tokens(world: World) -> None:
    alice = world.person("alice", budget=300)
    instance, enclave = world.instance(owner=alice), world.enclave()
    _, lease = await world.bundle(enclave, alice, instance.id)
    ends = lease.expires
    for fed in (100, 200):
        _, lease = await world.renew(enclave, lease, fed=fed, wanted=100)
        assert lease.expires == ends
    assert (lease.tokens, world.user(alice).spent) == (300, 300)
    assert await refusal(world.renew(enclave, lease, fed=300, wanted=100)) == "budget_spent"
    challenge = await world.challenge()
    delegation = alice.delegate(enclave, instance.id)
    request = enclave.request(enclave.claims(challenge, delegation, instance.id), delegation)
    assert await refusal(world.stub.Release(request)) == "budget_spent"
    assert await refusal(world.stub.Release(request)) == "nonce_refused"  # it is spent, though no time has passed


async def test_an_operator_can_revoke_whatever_the_clock_says(world: World) -> None:
    alice = world.person("alice")
    await world.bundle(world.enclave(), alice, world.instance(owner=alice).id)
    log = AuditLog(world.store, world.home.service)
    with world.store.write() as db:
        log.append(db, auditlog.Trail("user_removed", START - 10_000, {"detail": "an incident"}))
    assert world.entries()[-1].at == START


async def test_a_flood_of_refusals_from_one_peer_becomes_one_entry_with_their_number(world: World) -> None:
    alice = world.person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    delegation = alice.delegate(enclave, instance.id)
    world.clock.now = START // 60 * 60 + 61  # within one minute
    claims = enclave.claims(await world.challenge(), delegation, instance.id)
    request = enclave.request(claims.model_copy(update={"nonce": bytes(32)}), delegation)
    for _ in range(20):
        assert await refusal(world.stub.Release(request)) == "nonce_refused"
    assert len(world.entries()) == 8
    count = world.telemetry.registry.get_sample_value
    assert count("stip_decisions_total", {"event": "release", "code": "nonce_refused"}) == 20
    world.clock.now += 60
    assert world.servicer is not None
    world.servicer._issuer.write_folded()
    last = world.entries()[-1]
    assert (last.event, last.code, last.count, last.peer) == ("refusals_folded", "nonce_refused", 12, "127.0.0.1")
    assert last.detail == "nonce_refused 12"
    auditlog.verify(world.store, world.home.service.public_key())
    # what a user of ours is refused is recorded in full, however often
    elsewhere = alice.delegate(enclave, "0" * 32)
    for _ in range(10):
        claims = enclave.claims(await world.challenge(), elsewhere, "0" * 32)
        assert await refusal(world.stub.Release(enclave.request(claims, elsewhere))) == "instance_refused"
    assert len(world.entries()) == 19


async def test_whom_nobody_knows_cannot_fill_the_log_through_an_enclave_that_is_sound(world: World) -> None:
    """Anybody can make a key, sign a delegation with it and open a session: the enclave asks for them."""
    alice = world.person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    nobody = Person("mallory")
    world.clock.now = START // 60 * 60 + 61
    for _ in range(20):
        delegation = nobody.delegate(enclave, instance.id)
        claims = enclave.claims(await world.challenge(), delegation, instance.id)
        assert await refusal(world.stub.Release(enclave.request(claims, delegation))) == "user_refused"
    assert len(world.entries()) == 8
    assert world.entries()[-1].measurement == enclave.measurement


async def test_beyond_its_rate_a_peer_is_told_when_to_come_back(serve: Serve) -> None:
    async with serve(rates={"challenge": {"per_second": 0.5, "burst": 2}}) as world:
        await world.challenge()
        await world.challenge()
        call = world.stub.Challenge(keyservice_pb2.ChallengeRequest())
        assert await refusal(call) == "overloaded"
        pushback = dict(await call.trailing_metadata() or ())["grpc-retry-pushback-ms"]
        assert 0 < int(pushback) <= 2000
