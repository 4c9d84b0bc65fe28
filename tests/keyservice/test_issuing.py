"""What a release is made of: how many challenges, tokens and seconds there are, and what stays on record."""

from __future__ import annotations

from sqlalchemy import func, select, update

from stip_keyservice.service.state import schema
from stip_protocol.release import Bundle

from .conftest import MEASUREMENT, START, Serve, World, refusal


async def test_challenges_write_nothing_and_a_flood_of_them_locks_nobody_out(world: World) -> None:
    alice, enclave = world.person("alice"), world.enclave()
    instance = world.instance(owner=alice)
    first = await world.challenge()
    for _ in range(200):
        await world.challenge()
    with world.store.read() as db:
        assert db.execute(select(func.count()).select_from(schema.spent_nonces)).scalar() == 0
    delegation = alice.delegate(enclave, instance.id)
    claims = enclave.claims(first, delegation, instance.id)
    assert (await world.stub.Release(enclave.request(claims, delegation))).sealed


async def test_a_challenge_of_one_replica_is_good_once_at_all(serve: Serve) -> None:
    async with serve() as one, serve() as two:
        alice, enclave = one.person("alice"), one.enclave()
        instance = one.instance(owner=alice)
        delegation = alice.delegate(enclave, instance.id)
        claims = enclave.claims(await one.challenge(), delegation, instance.id)
        assert (await two.stub.Release(enclave.request(claims, delegation))).sealed
        for replica in (one, two):
            assert await refusal(replica.stub.Release(enclave.request(claims, delegation))) == "nonce_refused"


async def test_zero_tokens_wanted_means_a_chunk_and_a_chunk_is_the_most(world: World) -> None:
    alice = world.person("alice", budget=2500)
    instance = world.instance(owner=alice)
    enclave = world.enclave()
    for wanted, granted in ((0, 1000), (2**40, 1000), (700, 500)):
        _, lease = await world.bundle(enclave, alice, instance.id, tokens=wanted)
        assert lease.tokens == granted
    assert world.user(alice).spent == 2500


async def test_a_lease_ends_with_the_delegation(world: World) -> None:
    alice = world.person("alice")
    instance = world.instance(owner=alice)
    enclave = world.enclave()
    bundle, _ = await world.release(enclave, alice.delegate(enclave, instance.id, expires=START + 60), instance.id)
    assert isinstance(bundle, Bundle)
    assert world.lease(bundle.lease).expires == START + 60


async def test_granted_releases_are_counted_and_logged_by_kind(world: World) -> None:
    alice = world.person("alice")
    instance = world.instance(members=(alice,))
    enclave = world.enclave()
    delegation = alice.delegate(enclave, instance.id)
    await world.release(enclave, delegation, instance.id)
    await world.release(enclave, delegation, instance.id, kind="grant")
    sample = world.telemetry.registry.get_sample_value
    for kind in ("bundle", "grant"):
        assert sample("stip_releases_total", {"kind": kind}) == 1
    for stage in ("verify", "seal"):
        assert sample("stip_stage_seconds_count", {"stage": stage}) == 2
    assert sample("stip_audit_log_entries") == 2
    assert sample("stip_simulation") == 1
    assert [(entry.kind, entry.code, entry.tokens) for entry in world.entries()] == [
        ("bundle", "granted", 100),
        ("grant", "granted", None),
    ]
    assert {entry.measurement for entry in world.entries()} == {MEASUREMENT}
    assert {entry.user for entry in world.entries()} == {world.user(alice).id}


async def test_a_damaged_grant_is_a_refusal_that_costs_nothing_and_is_logged_as_one(world: World) -> None:
    alice = world.person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    with world.store.write() as db:
        db.execute(update(schema.grants).values(sealed=bytes(64)))
    delegation = alice.delegate(enclave, instance.id)
    claims = enclave.claims(await world.challenge(), delegation, instance.id)
    assert await refusal(world.stub.Release(enclave.request(claims, delegation))) == "integrity_violated"
    assert world.user(alice).spent == 0
    assert [(entry.code, entry.tokens) for entry in world.entries()] == [("integrity_violated", None)]
