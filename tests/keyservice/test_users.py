"""Users, their devices and their trust domains; budgets that clones cannot overspend; usage; shredding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc.aio
import pytest
from sqlalchemy import select

from stip_keyservice.home import Home
from stip_keyservice.service import instances, usage, users
from stip_keyservice.service.shredding import shred_user
from stip_keyservice.service.state.schema import data_keys, grants
from stip_keyservice.service.usage import DAY_SECONDS, Usage
from stip_keyservice.service.users import User
from stip_protocol import rpc
from stip_protocol.errors import ConfigurationError, IntegrityError, UserRefused
from stip_protocol.release import Bundle, Claims
from stip_protocol.wire import keyservice_pb2

from .conftest import START, Enclave, Person, Serve, World, make_instance, refusal
from .place import Place, told_here


def add_device(world: World, person: Person, name: str) -> Person:
    """Another key that may sign for `person`."""
    device = Person(person.name)
    with world.store.write() as db:
        users.add_device(db, users.by_name(db, person.name), name, device.public, now=world.clock.now)
    return device


async def test_any_device_of_a_user_may_delegate_and_all_draw_on_one_budget(world: World) -> None:
    alice = world.person("alice")
    phone = add_device(world, alice, "phone")
    instance, enclave = world.instance(owner=alice), world.enclave()
    for device in (alice, phone):
        await world.bundle(enclave, device, instance.id)
    assert world.user(alice).id == world.user(phone).id
    assert world.user(alice).spent == 200
    granted = [entry for entry in world.entries() if entry.event == "release"]
    assert len({entry.device for entry in granted}) == 2


async def test_a_removed_device_is_refused_and_its_session_ends_while_the_others_go_on(world: World) -> None:
    alice = world.person("alice")
    phone = add_device(world, alice, "phone")
    instance, enclave = world.instance(owner=alice), world.enclave()
    _, hers = await world.bundle(enclave, alice, instance.id)
    _, its = await world.bundle(enclave, phone, instance.id)
    with world.store.write() as db:
        users.remove_device(db, users.by_name(db, "alice"), "phone", now=START)
    assert await refusal(world.bundle(enclave, phone, instance.id)) == "user_refused"
    assert await refusal(world.renew(enclave, its, fed=1, wanted=1)) == "user_refused"
    await world.renew(enclave, hers, fed=1, wanted=1)


async def test_a_rotated_key_replaces_the_old_one_in_one_step(world: World) -> None:
    alice, fresh = world.person("alice"), Person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    with world.store.write() as db:
        users.rotate_device(db, users.by_name(db, "alice"), "first", fresh.public, now=START)
    assert await refusal(world.bundle(enclave, alice, instance.id)) == "user_refused"
    await world.bundle(enclave, fresh, instance.id)
    with pytest.raises(UserRefused), world.store.write() as db:  # a key that went never comes back
        users.rotate_device(db, users.by_name(db, "alice"), "first", alice.public, now=START)
    await world.bundle(enclave, fresh, instance.id)  # and the refused rotation took nothing


async def test_a_disabled_user_is_refused_until_enabled(world: World) -> None:
    alice = world.person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    _, lease = await world.bundle(enclave, alice, instance.id)
    with world.store.write() as db:
        users.disable(db, "alice", now=START)
    assert await refusal(world.bundle(enclave, alice, instance.id)) == "user_refused"
    assert await refusal(world.renew(enclave, lease, fed=1, wanted=1)) == "user_refused"
    with world.store.write() as db:
        users.enable(db, "alice")
    await world.renew(enclave, lease, fed=1, wanted=1)


async def test_a_dedicated_instance_is_for_its_trust_domain_and_for_nobody_else(world: World) -> None:
    people = [Person(name) for name in ("alice", "bob", "carol")]
    with world.store.write() as db:
        for person, domain in zip(people, ("acme", "acme", "other"), strict=True):
            users.add(db, person.name, person.public, budget=1000, now=START, domain=domain)
    alice, bob, carol = people
    instance, enclave = world.instance(owner=alice), world.enclave()
    _, lease = await world.bundle(enclave, bob, instance.id)
    assert await refusal(world.bundle(enclave, carol, instance.id)) == "user_refused"
    await world.renew(enclave, lease, fed=1, wanted=1)
    world.remove(bob)
    assert await refusal(world.renew(enclave, lease, fed=1, wanted=1)) == "user_refused"
    await world.bundle(enclave, alice, instance.id)


async def test_a_user_who_was_disallowed_loses_a_shared_instance_and_nothing_else(world: World) -> None:
    alice = world.person("alice")
    shared, own = world.instance(members=(alice,)), world.instance(owner=alice)
    enclave = world.enclave()
    _, lease = await world.bundle(enclave, alice, shared.id)
    with world.store.write() as db:
        instances.disallow(db, shared.id, users.by_name(db, "alice"))
        with pytest.raises(UserRefused):
            instances.disallow(db, shared.id, users.by_name(db, "alice"))
    assert await refusal(world.renew(enclave, lease, fed=1, wanted=1)) == "user_refused"
    assert await refusal(world.bundle(enclave, alice, shared.id)) == "user_refused"
    await world.bundle(enclave, alice, own.id)


async def test_twenty_clones_of_one_enclave_never_overspend_a_budget(world: World) -> None:
    alice = world.person("alice", budget=1050)
    instance, enclave = world.instance(owner=alice), world.enclave()
    delegation = alice.delegate(enclave, instance.id)

    async def clone() -> tuple[int, str]:
        """The same enclave once more: same keys, same delegation, its own nonce. Tokens it got, and the answer."""
        try:
            bundle, _ = await world.release(enclave, delegation, instance.id, tokens=100)
        except grpc.aio.AioRpcError as error:
            return 0, rpc.from_rpc(error).code
        assert isinstance(bundle, Bundle)
        return world.lease(bundle.lease).tokens, "granted"

    got = await asyncio.gather(*(clone() for _ in range(20)))
    assert world.user(alice).spent == 1050
    assert sorted(got) == [(0, "budget_spent")] * 9 + [(50, "granted")] + [(100, "granted")] * 10


async def test_clones_that_renew_one_lease_get_one_renewal(world: World) -> None:
    alice = world.person("alice", budget=1000)
    instance, enclave = world.instance(owner=alice), world.enclave()
    _, lease = await world.bundle(enclave, alice, instance.id)

    async def clone() -> str:
        try:
            await world.renew(enclave, lease, fed=100, wanted=100)
        except grpc.aio.AioRpcError as error:
            return rpc.from_rpc(error).code
        return "granted"

    answers = await asyncio.gather(*(clone() for _ in range(20)))
    assert sorted(answers) == ["granted"] + ["nonce_refused"] * 19
    assert world.user(alice).spent == 200


def stopped(now: int) -> int:
    return START


def rewound(now: int) -> int:
    return START - 3600


def ahead(now: int) -> int:
    return now + 24 * 3600


@pytest.mark.parametrize("clock", [stopped, rewound, ahead])
async def test_an_enclaves_clock_changes_nothing(world: World, clock: Callable[[int], int]) -> None:
    """An enclave has no say in time: what it sends holds none but the delegation's end, which the user signed."""
    alice = world.person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    delegation = alice.delegate(enclave, instance.id, expires=START + 600)
    captured = await world.challenge()
    bundle, _ = await world.release(enclave, delegation, instance.id)
    assert isinstance(bundle, Bundle)
    lease = world.lease(bundle.lease)
    assert (lease.not_before, lease.expires) == (START, START + 600)
    world.clock.now += 601
    enclave.provider = world.platform.provider(enclave.measurement, clock=lambda: float(clock(world.clock.now)))
    assert await refusal(world.renew(enclave, lease, fed=1, wanted=1)) == "delegation_refused"
    claims: Claims = enclave.claims(captured, delegation, instance.id)
    assert await refusal(world.stub.Release(enclave.request(claims, delegation))) == "nonce_refused"
    claims = enclave.claims(await world.challenge(), delegation, instance.id)
    assert await refusal(world.stub.Release(enclave.request(claims, delegation))) in (
        "delegation_refused",
        "collateral_expired",
        "evidence_refused",
    )


async def test_captured_requests_give_nothing_to_another_connection(world: World, serve: Serve) -> None:
    alice = world.person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    delegation = alice.delegate(enclave, instance.id)
    captured = enclave.request(enclave.claims(await world.challenge(), delegation, instance.id), delegation)
    await world.stub.Release(captured)
    async with serve() as thief:
        assert await refusal(thief.stub.Release(captured)) == "nonce_refused"
        thief_enclave = Enclave(world.platform)
        for part in ("claims", "quote", "delegation"):
            mixed = thief_enclave.request(
                thief_enclave.claims(await thief.challenge(), delegation, instance.id), delegation
            )
            setattr(mixed, part, getattr(captured, part))
            assert await refusal(thief.stub.Release(mixed)) in (
                "nonce_refused",
                "report_data_mismatch",
                "delegation_refused",
            )
    assert world.user(alice).spent == 100


async def test_a_captured_heartbeat_earns_nothing_once_more(world: World, serve: Serve) -> None:
    alice = world.person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    _, lease = await world.bundle(enclave, alice, instance.id)
    renewal, renewed = await world.renew(enclave, lease, fed=50, wanted=100)
    await world.renew(enclave, renewed, fed=60, wanted=100)
    spent = world.user(alice).spent
    async with serve() as thief:
        assert await refusal(thief.renew(enclave, lease, fed=50, wanted=100)) == "nonce_refused"
        assert await refusal(thief.stub.Renew(keyservice_pb2.RenewRequest(heartbeat=renewal.nonce))) == "frame_invalid"
    assert world.user(alice).spent == spent


async def test_usage_counts_what_was_debited_and_fed_and_a_crash_shows_as_never_fed(world: World) -> None:
    alice = world.person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    _, lease = await world.bundle(enclave, alice, instance.id)
    _, lease = await world.renew(enclave, lease, fed=80, wanted=100)
    await world.bundle(world.enclave(), alice, instance.id)  # crashes before its first heartbeat
    with world.store.read() as db:
        (today,) = usage.of(db, world.user(alice).id, since=0)
    assert today == Usage(world.user(alice).id, START // DAY_SECONDS, debited=280, fed=80, leases=2, renewals=1)
    assert today.debited == world.user(alice).spent
    world.clock.now += DAY_SECONDS
    delegation = alice.delegate(enclave, instance.id, expires=world.clock.now + 60)
    enclave.provider = world.platform.provider(enclave.measurement, clock=lambda: float(world.clock.now))
    await world.release(enclave, delegation, instance.id, tokens=10)
    with world.store.read() as db:
        days = usage.of(db, world.user(alice).id, since=0)
        assert usage.of(db, world.user(alice).id, since=START // DAY_SECONDS + 1) == days[1:]
    assert [(day.debited, day.leases) for day in days] == [(280, 2), (10, 1)]


async def test_shredding_destroys_what_opens_a_users_instances_and_forgets_their_names(world: World) -> None:
    alice, bob = world.person("alice"), world.person("bob")
    own, shared, others = world.instance(owner=alice), world.instance(members=(alice, bob)), world.instance(owner=bob)
    enclave = world.enclave()
    await world.bundle(enclave, alice, own.id)
    shredded = shred(world, "alice")
    assert shredded.removed_at is not None
    assert {shredded.name, *(device.name for device in all_devices(world, shredded))}.isdisjoint({"alice", "first"})
    assert await refusal(world.bundle(enclave, alice, own.id)) == "user_refused"
    with world.store.read() as db:
        assert instances.by_id(db, own.id).removed
        kept = set(db.execute(select(grants.c.instance)).scalars())
        assert kept == {shared.id, others.id}
        wrapped = db.execute(select(data_keys.c.wrapped).where(data_keys.c.subject == f"domain/{shredded.domain}"))
        assert wrapped.scalars().all() == [None]
        with pytest.raises(IntegrityError):
            instances.grant(db, world.vault, own.id, 0)
    await world.bundle(enclave, bob, shared.id)
    await world.bundle(enclave, bob, others.id)
    assert world.user(alice).id == shredded.id  # the key stays known, and is refused for good
    shred(world, shredded.id)  # once more is no harm


async def test_a_shredded_member_of_a_shared_domain_takes_nobodys_instance_along(world: World) -> None:
    with world.store.write() as db:
        for name, key in (("alice", b"a" * 32), ("bob", b"b" * 32)):
            users.add(db, name, key, budget=1, now=START, domain="acme")
    made = make_instance(world.folder / "acme", world.home)
    inspected = instances.inspect(made.directory, world.home.developer.public_key(), world.home.sealing)
    with world.store.write() as db:
        instances.add(db, inspected, vault=world.vault, domain="acme", now=START)
    shred(world, "alice")
    with world.store.read() as db:
        assert instances.grant(db, world.vault, made.id, 0) == inspected.grant


def shred(world: World, name: str) -> User:
    with world.store.write() as db:
        return shred_user(db, world.vault, users.last_of(db, name), now=START)


def all_devices(world: World, user: User) -> list[users.Device]:
    with world.store.read() as db:
        return list(users.devices_of(db, user))


async def test_names_that_could_be_mistaken_are_refused(world: World) -> None:
    with world.store.write() as db:
        for name in ("ab" * 16, f"shredded-{'ab' * 16}", "shredded-x"):
            with pytest.raises(ConfigurationError, match="cannot be taken for a user's id"):
                users.add(db, name, b"c" * 32, budget=1, now=START)
        for name in ("user/abc", "domain:x", "", "a" * 65, "-x", "a b"):
            for fields in ({"domain": name}, {"device": name}):
                with pytest.raises(ConfigurationError):
                    users.add(db, "carol", b"c" * 32, budget=1, now=START, **fields)


def test_the_operator_keeps_users_by_hand(place: Place) -> None:
    Home.open(place.home)
    call = place.call_here
    added = call(
        "users", "add", "alice", "--public-key", "ab" * 32, "--budget", "10", "--domain", "acme", "--device", "pc"
    )
    assert (added["domain"], [*added["devices"]]) == ("acme", ["pc"])
    assert [*call("users", "devices", "add", "alice", "phone", "--public-key", "cd" * 32)["devices"]] == ["pc", "phone"]
    assert call("users", "devices", "rotate", "alice", "pc", "--public-key", "ef" * 32)["devices"]["pc"] == "ef" * 32
    assert [*call("users", "devices", "remove", "alice", "phone")["devices"]] == ["pc"]
    assert [each["name"] for each in call("users", "devices", "list", "alice")] == ["pc"]
    assert len(call("users", "show", "alice")["history"]) == 3
    assert call("users", "disable", "alice")["disabled_at"] is not None
    assert call("users", "enable", "alice")["disabled_at"] is None
    made = make_instance(place.folder / "instance", Home.open(place.home))
    assert call("instances", "add", str(made.directory), "--dedicated-to", "domain:acme")["domain"] == "acme"
    shared = make_instance(place.folder / "shared", Home.open(place.home))
    call("instances", "add", str(shared.directory), "--shared")
    assert shared.id in call("users", "allow", "alice", shared.id)["instances"]
    assert shared.id not in call("users", "disallow", "alice", shared.id)["instances"]
    assert call("users", "usage", "alice", "--days", "7")["total"] == {
        "debited": 0, "fed": 0, "leases": 0, "renewals": 0
    }  # fmt: skip
    text = told_here("users", "usage", "alice", "--csv", "--home", str(place.home)).stdout
    assert text == "day,debited,fed,leases,renewals\n"
    said = told_here("users", "shred", "nobody", "--yes", "--home", str(place.home))
    assert "no such user" in said.stderr
    told = told_here("users", "shred", "alice", "--yes", "--home", str(place.home))
    assert "Destroyed: overwritten in the database file" in told.stderr
    shredded = call("users", "shred", added["id"], "--yes")
    assert shredded["name"] == f"shredded-{added['id']}"
    assert call("users", "list") == []
    for arguments in (
        ["devices", "rotate", "alice", "pc", "--public-key", "00" * 32],
        ["show", "alice"],
        ["disable", "x"],
    ):
        assert call("users", *arguments, code=1)["error"]["code"] == "user_refused"
    bad = call("instances", "add", str(made.directory), "--dedicated-to", "domain:a b", code=2)
    assert bad["error"]["code"] == "configuration_invalid"
    events = {entry["event"] for entry in call("audit-log", "list", "--last", "100")}
    assert {"device_added", "device_rotated", "device_removed", "user_disabled", "user_enabled"} <= events
    assert {"user_disallowed", "user_shredded"} <= events
    assert call("audit-log", "verify")["verified"]
