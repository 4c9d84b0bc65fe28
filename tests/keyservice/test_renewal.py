"""Renewals: one heartbeat, one renewal, and an end to both when the user, the instance or the budget is gone."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import pytest
from cryptography import x509

from stip_keyservice.service import instances
from stip_protocol.lease import Lease
from stip_protocol.release import Heartbeat, sign_heartbeat
from stip_protocol.wire import keyservice_pb2

from .conftest import START, Enclave, MadeInstance, Person, Serve, World, refusal


@dataclass
class Running:
    """An enclave with a lease of 100 tokens for a user whose budget is 1200."""

    world: World
    alice: Person
    enclave: Enclave
    instance: MadeInstance
    lease: Lease
    certificate: bytes

    def beat(self, *, fed: int = 64, wanted: int = 100, serial: int = 0) -> Heartbeat:
        return Heartbeat(handle=self.lease.handle, serial=serial, nonce=secrets.token_bytes(32), fed=fed, wanted=wanted)


@pytest.fixture
async def running(world: World) -> Running:
    alice = world.person("alice", budget=1200)
    instance = world.instance(members=(alice,))
    enclave = world.enclave()
    bundle, lease = await world.bundle(enclave, alice, instance.id)
    return Running(world, alice, enclave, instance, lease, bundle.link_certificate)


async def test_a_renewal_raises_mark_serial_and_time_under_the_same_handle(running: Running) -> None:
    running.world.clock.now += 600
    renewal, lease = await running.world.renew(running.enclave, running.lease, fed=64, wanted=100)
    assert lease.handle == running.lease.handle
    assert (lease.serial, lease.tokens) == (1, 164)
    assert (lease.not_before, lease.expires) == (START + 600, START + 1500)
    assert lease.audit_head != running.lease.audit_head
    assert running.world.user(running.alice).spent == 164
    before, after = (x509.load_der_x509_certificate(one) for one in (running.certificate, renewal.link_certificate))
    assert before.subject != after.subject
    assert before.public_key() == after.public_key()
    assert running.world.telemetry.registry.get_sample_value("stip_releases_total", {"kind": "renewal"}) == 1
    entry = running.world.entries()[-1]
    assert (entry.event, entry.code, entry.tokens, entry.handle) == ("renewal", "granted", 64, lease.handle)


async def test_a_renewal_that_wants_nothing_more_costs_nothing(running: Running) -> None:
    _, lease = await running.world.renew(running.enclave, running.lease, fed=64, wanted=0)
    assert (lease.serial, lease.tokens) == (1, 100)
    assert running.world.user(running.alice).spent == 100


async def test_a_renewal_takes_a_chunk_at_most_and_then_what_is_left(running: Running) -> None:
    _, lease = await running.world.renew(running.enclave, running.lease, fed=100, wanted=10**6)
    assert lease.tokens == 1100
    _, lease = await running.world.renew(running.enclave, lease, fed=1100, wanted=1000)
    assert lease.tokens == 1200
    assert running.world.user(running.alice).spent == 1200


async def test_tokens_already_paid_for_can_be_used_up_when_the_budget_is_spent(running: Running) -> None:
    _, lease = await running.world.renew(running.enclave, running.lease, fed=100, wanted=1000)
    _, lease = await running.world.renew(running.enclave, lease, fed=1100, wanted=1000)
    _, lease = await running.world.renew(running.enclave, lease, fed=1150, wanted=1000)
    assert lease.tokens == 1200
    assert await refusal(running.world.renew(running.enclave, lease, fed=1200, wanted=1)) == "budget_spent"


async def test_a_repeated_heartbeat_gets_the_same_answer_and_costs_nothing(running: Running) -> None:
    beat = running.beat()
    first, _ = await running.world.send(beat, running.enclave)
    again, _ = await running.world.send(beat, running.enclave)
    assert again == first
    assert running.world.user(running.alice).spent == 164
    assert [entry.event for entry in running.world.entries()].count("renewal") == 1


async def test_a_serial_is_renewed_once(running: Running) -> None:
    first = running.beat()
    await running.world.send(first, running.enclave)
    assert await refusal(running.world.send(running.beat(), running.enclave)) == "nonce_refused"
    await running.world.send(running.beat(serial=1), running.enclave)
    assert await refusal(running.world.send(first, running.enclave)) == "nonce_refused"
    assert await refusal(running.world.send(running.beat(serial=3), running.enclave)) == "nonce_refused"


async def test_a_foreign_key_cannot_renew(running: Running) -> None:
    thief = running.world.enclave()
    assert await refusal(running.world.send(running.beat(), thief)) == "signature_invalid"
    assert running.world.entries()[-1].code == "signature_invalid"
    await running.world.send(running.beat(), running.enclave)


async def test_an_altered_heartbeat_is_refused(running: Running) -> None:
    beat = running.beat()
    more = beat.model_copy(update={"wanted": 1000})
    request = keyservice_pb2.RenewRequest(
        heartbeat=more.to_bytes(), signature=sign_heartbeat(beat, running.enclave.link)
    )
    assert await refusal(running.world.stub.Renew(request)) == "signature_invalid"


async def test_an_unknown_handle_is_refused(running: Running) -> None:
    beat = running.beat().model_copy(update={"handle": bytes(16)})
    assert await refusal(running.world.send(beat, running.enclave)) == "lease_foreign"


@pytest.mark.parametrize("heartbeat", [b"", b"\xa0", bytes(2000)])
async def test_a_malformed_heartbeat_is_refused(running: Running, heartbeat: bytes) -> None:
    request = keyservice_pb2.RenewRequest(heartbeat=heartbeat, signature=b"")
    assert await refusal(running.world.stub.Renew(request)) == "frame_invalid"


async def test_a_removed_user_stops_at_the_next_heartbeat(running: Running) -> None:
    answered = running.beat()
    await running.world.send(answered, running.enclave)
    running.world.remove(running.alice)
    assert await refusal(running.world.send(running.beat(serial=1), running.enclave)) == "user_refused"
    assert await refusal(running.world.send(answered, running.enclave)) == "user_refused"


async def test_a_removed_instance_stops_at_the_next_heartbeat(running: Running) -> None:
    with running.world.store.write() as db:
        instances.remove(db, running.world.vault, running.instance.id, now=START)
    assert await refusal(running.world.send(running.beat(), running.enclave)) == "instance_refused"


async def test_neighbours_go_on_when_a_user_is_removed(running: Running) -> None:
    bob = running.world.person("bob")
    instance = running.world.instance(owner=bob)
    enclave = running.world.enclave()
    _, lease = await running.world.bundle(enclave, bob, instance.id)
    running.world.remove(running.alice)
    _, lease = await running.world.renew(enclave, lease, fed=64, wanted=64)
    assert lease.serial == 1


async def test_more_fed_than_the_mark_is_refused_and_so_is_less_than_before(running: Running) -> None:
    assert await refusal(running.world.send(running.beat(fed=101), running.enclave)) == "lease_spent"
    await running.world.send(running.beat(fed=64), running.enclave)
    assert await refusal(running.world.send(running.beat(fed=63, serial=1), running.enclave)) == "request_invalid"


async def test_a_lease_that_ended_long_ago_cannot_be_renewed(running: Running) -> None:
    running.world.clock.now = running.lease.expires + 299
    _, lease = await running.world.send(running.beat(), running.enclave)
    running.world.clock.now = lease.expires + 300
    assert await refusal(running.world.send(running.beat(serial=1), running.enclave)) == "lease_expired"


async def test_no_renewal_outlives_the_delegation(running: Running) -> None:
    running.world.clock.now = START + 700
    _, lease = await running.world.send(running.beat(), running.enclave)
    for serial in range(1, 4):
        running.world.clock.now = lease.expires - 1
        _, lease = await running.world.send(running.beat(serial=serial), running.enclave)
    assert lease.expires == START + 3600
    running.world.clock.now = START + 3600
    assert await refusal(running.world.send(running.beat(serial=4), running.enclave)) == "delegation_refused"


async def test_a_restart_keeps_leases_nonces_budgets_and_the_log(serve: Serve) -> None:
    async with serve() as before:
        alice = before.person("alice")
        instance = before.instance(owner=alice)
        enclave = before.enclave()
        _, lease = await before.bundle(enclave, alice, instance.id)
        pending = await before.challenge()
    async with serve() as after:
        _, lease = await after.renew(enclave, lease, fed=64, wanted=100)
        assert lease.serial == 1
        assert after.user(alice).spent == 164
        assert len(after.entries()) == 2
        delegation = alice.delegate(enclave, instance.id)
        claims = enclave.claims(pending, delegation, instance.id)
        await after.stub.Release(enclave.request(claims, delegation))
