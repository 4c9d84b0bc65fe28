"""The enclave as clients and the key service meet it: releases, limits, and errors that stay in a session."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from typing import Any

import grpc.aio
import numpy as np
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import generate_latest

from stip_enclave.release import HeldLease
from stip_keyservice.service import users
from stip_protocol import rpc
from stip_protocol.attestation import freshness
from stip_protocol.documents import Signed
from stip_protocol.errors import AuditLogForked, LeaseForeign, SignatureInvalid, StipError
from stip_protocol.heads import open_head
from stip_protocol.lease import Lease
from stip_protocol.release import Bundle, Claims, Delegation, Heartbeat
from stip_protocol.wire import enclave_pb2

PROMPT = [5, 17, 3, 88]


@pytest.fixture
async def started(world: Any, developer: Any) -> Any:
    await world.start(developer.protected("llama", "hardened"))
    return world


# -- releases -----------------------------------------------------------------------------------------------------


async def test_a_second_session_of_a_delegation_needs_no_second_release(started: Any) -> None:
    delegation = started.delegate(started.person("ada"))
    await asyncio.gather(*(started.opened(delegation) for _ in range(3)))
    exported = generate_latest(started.telemetry.registry).decode()
    # One bundle and, the instance being shared, one grant.
    assert 'stip_stage_seconds_count{stage="release"} 2.0' in exported
    await started.opened(started.delegate(started.person("bob")))
    exported = generate_latest(started.telemetry.registry).decode()
    assert 'stip_stage_seconds_count{stage="release"} 3.0' in exported


BAD_DELEGATIONS: dict[str, dict[str, Any]] = {
    "for another enclave": {"enclave_key": bytes(32)},
    "for another instance": {"instance": "0" * 32},
    "for another measurement": {"measurement": bytes(32)},
    "expired": {"expires": 1},
    "for too long": {"expires": 2**39},
}


@pytest.mark.parametrize("bad", BAD_DELEGATIONS)
async def test_a_delegation_that_does_not_hold_opens_nothing(started: Any, bad: str) -> None:
    person = started.person("ada")
    client = started.client()
    frame = await client.open(started.delegate(person, **BAD_DELEGATIONS[bad]), started.protected.manifest.instance)
    assert frame.failed.code == "delegation_refused"


async def test_a_delegation_signed_by_another_is_refused_before_anything_is_asked(started: Any) -> None:
    ada = started.person("ada")
    forged = Signed.sign(
        Delegation.from_bytes(Signed.from_bytes(started.delegate(ada)).payload), Ed25519PrivateKey.generate()
    )
    for delegation in (forged.to_bytes(), b"", b"junk", bytes(5000)):
        frame = await started.client().open(delegation, started.protected.manifest.instance)
        assert frame.failed.code == "delegation_refused"
    assert 'stage="release"} 0.0' in generate_latest(started.telemetry.registry).decode()


async def test_strangers_and_users_without_access_are_refused(started: Any) -> None:
    instance = started.protected.manifest.instance
    stranger = started.stranger()
    frame = await started.client().open(started.delegate(stranger), instance)
    assert frame.failed.code == "user_refused"
    frame = await started.client().open(started.delegate(started.person("eve", member=False)), instance)
    assert frame.failed.code == "user_refused"


async def test_an_instance_that_is_not_configured_is_refused(started: Any) -> None:
    ada = started.person("ada")
    frame = await started.client().open(started.delegate(ada, instance="0" * 32), "0" * 32)
    assert frame.failed.code == "instance_refused"


async def test_a_removed_user_is_stopped_within_the_bound(world: Any, developer: Any) -> None:
    protected = developer.protected("llama", "hardened")
    await world.start(protected, lease={"heartbeat_tokens": 8})
    ada, bob = world.person("ada"), world.person("bob")
    client, neighbour = await world.opened(world.delegate(ada)), await world.opened(world.delegate(bob))
    assert len((await client.turn(PROMPT, max_tokens=6))[0]) == 6
    with world.store.write() as db:
        users.remove(db, "ada", now=int(time.time()))
    await client.begin([4], max_tokens=100)
    tokens = 0
    while not (frame := await client.read()).HasField("failed"):
        tokens += 1
    assert frame.failed.code == "user_refused"
    assert tokens <= 8
    assert await neighbour.turn(PROMPT, max_tokens=20) == (protected.generate(PROMPT, 20), 2)


async def test_a_budget_is_spent_to_the_last_row_and_no_further(started: Any) -> None:
    client = await started.opened(started.delegate(started.person("ada", budget=20)))
    await client.begin(PROMPT, max_tokens=100)
    tokens = 0
    while not (frame := await client.read()).HasField("failed"):
        tokens += 1
    assert (frame.failed.code, tokens) == ("budget_spent", 17)


async def test_a_prompt_longer_than_a_lease_is_fed_lease_by_lease(world: Any, developer: Any) -> None:
    protected = developer.protected("llama", "hardened")
    await world.start(protected, lease={"tokens": 16, "heartbeat_tokens": 16})
    client = await world.opened(world.delegate(world.person("ada")))
    ids = list(range(3, 80))
    assert await client.turn(ids, max_tokens=9) == (protected.generate(ids, 9), 2)


async def test_a_dedicated_instance_comes_with_its_owners_bundle(world: Any, developer: Any) -> None:
    protected = developer.protected("llama", "paper")
    await world.start(protected, dedicated_to="ada")
    client = await world.opened(world.delegate(world.owner))
    assert (await client.turn(PROMPT, max_tokens=5))[0] == protected.generate(PROMPT, 5)
    assert 'stage="release"} 1.0' in generate_latest(world.telemetry.registry).decode()
    frame = await world.client().open(world.delegate(world.person("eve", member=False)), protected.manifest.instance)
    assert frame.failed.code == "user_refused"


async def test_an_unreachable_key_service_is_said_to_be_unavailable(started: Any) -> None:
    delegation = started.delegate(started.person("ada"))
    await started.keyservice.stop(0)
    frame = await started.client().open(delegation, started.protected.manifest.instance)
    assert frame.failed.code in ("unavailable", "deadline_exceeded")


def signed_lease(started: Any, key: Ed25519PrivateKey, **changes: Any) -> bytes:
    manifest = started.protected.manifest
    fields: dict[str, Any] = {
        "handle": bytes(16), "serial": 1, "audience": "gateway.test", "instance": manifest.instance,
        "epoch": manifest.epoch, "manifest_digest": started.protected.digest,
        "link_key": started.identity.link_key_digest, "not_before": 0, "expires": 2**39, "tokens": 10,
        "audit_head": bytes(32),
    }  # fmt: skip
    return Signed.sign(Lease(**fields | changes), key).to_bytes()


async def leased(started: Any) -> Bundle:
    delegation = started.delegate(started.person(secrets.token_hex(4)))
    manifest = started.protected.manifest
    return await started.releases.bundle(delegation, manifest.instance, {manifest.epoch: started.protected.digest}, 10)


FOREIGN: dict[str, Any] = {
    "audience": "other",
    "instance": "0" * 32,
    "epoch": 9,
    "manifest_digest": bytes(32),
    "link_key": bytes(32),
}


@pytest.mark.parametrize("field", FOREIGN)
async def test_a_lease_for_something_else_is_not_held(started: Any, field: str) -> None:
    bundle = await leased(started)
    other = signed_lease(started, started.developer.home.service, **{field: FOREIGN[field]})
    with pytest.raises(LeaseForeign, match=field):
        started.releases.held(other, bundle.link_certificate, bundle)


async def test_a_lease_or_link_certificate_of_another_is_not_held(started: Any) -> None:
    bundle = await leased(started)
    forged = signed_lease(started, Ed25519PrivateKey.generate())
    with pytest.raises(SignatureInvalid):
        started.releases.held(forged, bundle.link_certificate, bundle)
    good = signed_lease(started, started.developer.home.service)
    for certificate in (b"junk", started.operator_certificate()):
        with pytest.raises(LeaseForeign, match="link certificate"):
            started.releases.held(good, certificate, bundle)


async def test_a_release_for_another_manifest_is_refused(started: Any) -> None:
    delegation = started.delegate(started.person("ada"))
    manifest = started.protected.manifest
    epoch, digest = manifest.epoch, started.protected.digest
    for held, code in (({epoch: bytes(32)}, "manifest_mismatch"), ({epoch + 1: digest}, "instance_refused")):
        with pytest.raises(StipError) as caught:
            await started.releases.bundle(delegation, manifest.instance, held, 10)
        assert caught.value.code == code


async def test_a_renewal_raises_the_serial_of_the_same_handle(started: Any) -> None:
    bundle = await leased(started)
    held: HeldLease = started.releases.held(bundle.lease, bundle.link_certificate, bundle)
    heartbeat = Heartbeat(handle=held.lease.handle, serial=0, nonce=os.urandom(32), fed=4, wanted=50)
    renewed = await started.releases.renew(held, heartbeat)
    again = await started.releases.renew(held, heartbeat)
    assert renewed.lease.handle == held.lease.handle
    assert (renewed.lease.serial, renewed.lease.tokens) == (1, 54)
    assert again.signed == renewed.signed


# -- sessions -----------------------------------------------------------------------------------------------------


async def test_opened_says_what_was_opened_and_that_it_is_simulated(started: Any) -> None:
    request_id = secrets.token_hex(16)
    client = started.client(request_id)
    manifest = started.protected.manifest
    opened = (await client.open(started.delegate(started.person("ada")), manifest.instance)).opened
    assert opened.session.hex() == request_id
    assert (opened.preset, opened.vocabulary, opened.max_positions) == ("hardened", 211, manifest.max_positions)
    assert opened.simulated
    assert (opened.manifest_digest, opened.epoch) == (started.protected.digest, manifest.epoch)


def turn(ids: bytes, **sampling: Any) -> dict[str, Any]:
    wanted = enclave_pb2.Sampling(**({"max_tokens": 1} | sampling))
    return {"turn": enclave_pb2.Turn(ids=ids, sampling=wanted)}


def packed(ids: list[int]) -> bytes:
    return np.array(ids, "<u4").tobytes()


BAD_FRAMES: dict[str, tuple[dict[str, Any], str]] = {
    "an id outside the vocabulary": (turn(packed([211])), "request_invalid"),
    "half an id": (turn(b"123"), "frame_invalid"),
    "no ids": (turn(b""), "request_invalid"),
    "more ids than positions": (turn(bytes(4 * 129)), "position_refused"),
    "a temperature that is none": (turn(bytes(4), temperature=float("inf")), "request_invalid"),
    "a second open": ({"open": enclave_pb2.Open()}, "frame_invalid"),
    "nothing": ({}, "frame_invalid"),
}


@pytest.mark.parametrize("bad", BAD_FRAMES)
async def test_a_bad_frame_ends_its_session_and_no_other(started: Any, bad: str) -> None:
    body, code = BAD_FRAMES[bad]
    delegation = started.delegate(started.person("ada"))
    client, neighbour = await started.opened(delegation), await started.opened(delegation)
    await neighbour.begin(PROMPT, max_tokens=10)
    await client.send(**body)
    assert await client.failure() == code
    assert await neighbour.rest() == (started.protected.generate(PROMPT, 10), 2)


async def test_a_first_frame_that_is_no_open_is_refused(started: Any) -> None:
    client = started.client()
    await client.send(cancel=enclave_pb2.Cancel())
    assert await client.failure() == "frame_invalid"


async def test_a_client_that_says_nothing_is_not_waited_for(world: Any, developer: Any) -> None:
    await world.start(developer.protected("llama", "hardened"), open_seconds=0.1)
    assert await world.client().failure() == "deadline_exceeded"


async def test_sessions_are_limited_per_user_and_overall(world: Any, developer: Any) -> None:
    await world.start(developer.protected("llama", "hardened"), sessions=3, sessions_per_user=2)
    ada, bob = (world.delegate(world.person(name)) for name in ("ada", "bob"))
    instance = world.protected.manifest.instance
    first, _ = await world.opened(ada), await world.opened(ada)
    failed = (await world.client().open(ada, instance)).failed
    assert (failed.code, failed.retry_after_ms) == ("overloaded", 1000)
    await world.opened(bob)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.client().open(bob, instance)
    refused = rpc.from_rpc(caught.value)
    assert (refused.code, refused.retry_after) == ("overloaded", 1.0)
    await first.close()
    await asyncio.wait_for(world.until_sessions(2), 10)
    await world.opened(ada)


async def test_a_damaged_enclave_part_is_told_and_the_service_lives(world: Any, developer: Any, tmp_path: Any) -> None:
    await world.start(developer.protected("llama", "hardened"), copied_to=tmp_path / "copy")
    path = tmp_path / "copy" / "enclave" / "embedding.sealed"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    delegation = world.delegate(world.person("ada"))
    frame = await world.client().open(delegation, world.protected.manifest.instance)
    assert frame.failed.code == "sealed_part_invalid"
    path.write_bytes(whole)
    client = await world.opened(delegation)
    assert (await client.turn(PROMPT, max_tokens=3))[1] == 2


async def test_a_drain_lets_turns_finish_and_takes_no_new_sessions(started: Any) -> None:
    delegation = started.delegate(started.person("ada"))
    busy, idle = await started.opened(delegation), await started.opened(delegation)
    await busy.begin(PROMPT, max_tokens=60)
    await busy.read()
    draining = asyncio.create_task(started.service.drain())
    assert await idle.failure() == "draining"
    tokens, kind = await busy.rest()
    assert (len(tokens), kind) == (59, 2)
    await asyncio.wait_for(draining, 10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await started.client().open(delegation, started.protected.manifest.instance)
    assert rpc.from_rpc(caught.value).code == "draining"


async def test_a_client_that_leaves_mid_turn_frees_its_session_and_disturbs_nobody(started: Any) -> None:
    delegation = started.delegate(started.person("ada"))
    leaving, staying = await started.opened(delegation), await started.opened(delegation)
    await leaving.begin(PROMPT, max_tokens=100)
    await staying.begin(PROMPT, max_tokens=30)
    await leaving.read()
    await leaving.close()
    assert await staying.rest() == (started.protected.generate(PROMPT, 30), 2)
    await asyncio.wait_for(started.until_sessions(1), 10)


# -- what must not be seen ----------------------------------------------------------------------------------------


def planted(started: Any, ids: list[int]) -> list[str]:
    """Every form in which the planted things could show."""
    link = started.identity.link_key.private_numbers().private_value
    tls = started.identity.tls.private_key_pem
    secret = [packed(ids), tls, link.to_bytes(32, "big")]
    shown = [form for value in secret for form in (value.hex(), repr(value)[2:-1])]
    return [*shown, tls.decode()[30:70], str(ids)[1:-1], ",".join(map(str, ids))]


async def test_no_prompt_and_no_key_shows_in_logs_metrics_errors_or_reprs(
    started: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [101, 202, 193, 184, 175]
    person = started.person("ada")
    delegation = started.delegate(person)
    errors = []
    with structlog.testing.capture_logs() as logs:
        for bad in (
            turn(packed([*ids, 9999])),
            turn(packed(ids * 40)),
            turn(packed(ids)[:-1]),
            turn(packed(ids), top_p=7),
        ):
            client = await started.opened(delegation)
            await client.send(**bad)
            while not (frame := await client.read()).HasField("failed"):
                pass
            errors.append(frame.failed.message)
        client = await started.opened(delegation)
        await client.turn(ids, max_tokens=5)
        with started.store.write() as db:
            users.remove(db, "ada", now=int(time.time()))
        await client.begin(ids, max_tokens=90)
        errors.append(await client.failure())
    bundle_like = [started.identity, started.releases, started.service, *started.service._sessions]
    seen = "\n".join(
        [str(logs), *errors, generate_latest(started.telemetry.registry).decode(), *map(repr, bundle_like)]
    )
    captured = capsys.readouterr()
    seen += captured.out + captured.err
    assert "session opened" in seen
    assert [form for form in planted(started, ids) if form in seen] == []
    # The same sweep finds a leak.
    leak = f"turn with ids {ids}"
    assert [form for form in planted(started, ids) if form in seen + leak]


def test_claims_are_only_ever_made_by_the_release_client() -> None:
    """No message of the enclave's own service carries claims or report data for it to quote."""
    requests = [enclave_pb2.AttestRequest, enclave_pb2.ClientFrame, enclave_pb2.Open, enclave_pb2.Turn]
    fields = {field.name for message in requests for field in message.DESCRIPTOR.fields}
    assert not fields & {"claims", "report_data", "quote"}
    assert Claims.context != freshness.FreshnessClaims.context


async def test_each_session_brings_the_newest_signed_head_of_the_audit_log(started: Any) -> None:
    instance, key, heads = started.protected.manifest.instance, started.developer.home.service.public_key(), []
    for name in ("ada", "bob"):
        opened = (await started.client().open(started.delegate(started.person(name)), instance)).opened
        heads.append(open_head(opened.audit_head, key))
    assert heads[0].sequence < heads[1].sequence
    (held, _) = started.accounts._everything()
    held.account.join(Held())
    held.account.confirm()
    await held.account._task
    assert open_head(started.accounts.audit_head, key).sequence > heads[1].sequence


async def test_a_lease_that_names_another_head_than_the_one_beside_it_is_a_fork(started: Any) -> None:
    bundle = await leased(started)
    lease = Signed.from_bytes(bundle.lease).open(Lease, started.developer.home.service.public_key())
    with pytest.raises(AuditLogForked):
        started.releases._note(bundle.audit_head, lease.model_copy(update={"audit_head": bytes(32)}))


class Held:
    """A session that hears of nothing."""

    def lease_renewed(self, signed: bytes) -> None:
        pass

    def failed(self, error: StipError) -> None:
        raise AssertionError(error)
