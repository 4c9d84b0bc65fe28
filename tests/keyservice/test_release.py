"""Releases over real sockets: what a genuine enclave with a user's word gets, and everything else does not."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stip_keyservice.service import instances, release
from stip_keyservice.service.auditlog import GENESIS, AuditLog
from stip_keyservice.service.release import Request
from stip_protocol import rpc
from stip_protocol.attestation.quote import Attributes
from stip_protocol.documents import Signed
from stip_protocol.errors import SignatureInvalid, StipError
from stip_protocol.keys.draw import VOCABULARY_LABEL
from stip_protocol.keys.stream import derive
from stip_protocol.lease import admit
from stip_protocol.release import AuditHead, Bundle, Claims, Grant, report_data, service_id, unseal
from stip_protocol.secrets_file import PART_LABEL
from stip_stack.tee import Faults

from .conftest import START, Enclave, MadeInstance, Person, World, refusal


async def test_a_dedicated_instance_gives_its_grant_inside_the_bundle_of_its_user(world: World) -> None:
    alice = world.person("alice")
    instance = world.instance(owner=alice)
    enclave = world.enclave()
    bundle, lease = await world.bundle(enclave, alice, instance.id, tokens=300)
    grant = Grant.from_bytes(bundle.grant or b"")
    assert grant.part_key == derive(instance.root, PART_LABEL)
    assert grant.vocabulary_seed is None
    assert (grant.instance, grant.epoch, grant.preset) == (instance.id, 0, "hardened")
    assert grant.manifest_digest == bundle.manifest_digest == lease.manifest_digest
    assert bundle.heartbeat_tokens == 64
    assert bundle.policy_digest == world.policy.digest()
    head = Signed.from_bytes(bundle.audit_head).open(AuditHead, world.home.service.public_key())
    assert (head.sequence, head.hash) == (1, lease.audit_head)
    assert lease.audit_head != GENESIS
    assert (lease.serial, lease.tokens, lease.not_before, lease.expires) == (0, 300, START, START + 900)


async def test_the_lease_admits_at_its_gateway_and_names_nobody(world: World) -> None:
    alice = world.person("alice")
    instance = world.instance(owner=alice)
    enclave = world.enclave()
    bundle, _ = await world.bundle(enclave, alice, instance.id)
    admitted = admit(
        bundle.lease,
        key=world.home.service.public_key(),
        audience="gateway.test",
        instance=instance.id,
        epoch=0,
        link_key=hashlib.sha256(enclave.link_spki).digest(),
        now=START,
    )
    assert admitted.tokens == 100
    for part in (bundle.lease, bundle.link_certificate):
        assert alice.public not in part
        assert b"alice" not in part
        assert world.user(alice).id.encode() not in part


async def test_the_link_certificate_is_short_lived_for_the_link_key_under_a_fresh_random_name(world: World) -> None:
    alice = world.person("alice")
    instance = world.instance(owner=alice)
    enclave = world.enclave()
    certificates = []
    for _ in range(2):
        bundle, lease = await world.bundle(enclave, alice, instance.id)
        certificate = x509.load_der_x509_certificate(bundle.link_certificate)
        certificate.verify_directly_issued_by(world.home.link_ca.certificate)
        spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert spki == enclave.link_spki
        assert certificate.not_valid_after_utc == datetime.fromtimestamp(lease.expires + 30, UTC)
        certificates.append(certificate)
    assert certificates[0].subject != certificates[1].subject


async def test_the_link_certificate_opens_a_gateway_that_trusts_the_link_authority_alone(world: World) -> None:
    alice = world.person("alice")
    instance = world.instance(owner=alice)
    enclave = world.enclave()
    bundle, _ = await world.bundle(enclave, alice, instance.id)
    tls = world.home.tls("localhost")
    gateway = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, gateway)
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    port = gateway.add_secure_port(
        "127.0.0.1:0", rpc.server_credentials(tls.chain, tls.private_key, client_ca=world.home.link_ca.pem)
    )
    await gateway.start()
    certificate = x509.load_der_x509_certificate(bundle.link_certificate).public_bytes(Encoding.PEM)
    key = enclave.link.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for identity, opens in (((certificate, key), True), (None, False)):
        async with rpc.channel(
            f"127.0.0.1:{port}", roots=world.home.tls_ca.pem, identity=identity, server_name="localhost"
        ) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
            if opens:
                assert (await check).status == health_pb2.HealthCheckResponse.SERVING
            else:
                assert await refusal(check) == "unavailable"
    await gateway.stop(grace=0)


async def test_a_shared_instance_gives_its_grant_apart_from_the_bundles_of_its_members(world: World) -> None:
    alice, bob = world.person("alice"), world.person("bob")
    instance = world.instance(members=(alice, bob), preset="paper")
    enclave = world.enclave()
    delegation = alice.delegate(enclave, instance.id)
    bundle, _ = await world.release(enclave, delegation, instance.id)
    grant, _ = await world.release(enclave, delegation, instance.id, kind="grant", tokens=0)
    other, _ = await world.bundle(enclave, bob, instance.id)
    assert isinstance(bundle, Bundle)
    assert isinstance(grant, Grant)
    assert bundle.grant is None
    assert grant.part_key == derive(instance.root, PART_LABEL)
    assert grant.vocabulary_seed == derive(instance.root, VOCABULARY_LABEL)
    assert len({bundle.user_key, other.user_key, bundle.cache_salt, other.cache_salt}) == 4
    assert world.user(alice).spent == 100


async def test_a_release_opens_only_for_the_enclave_that_asked(world: World) -> None:
    alice = world.person("alice")
    instance = world.instance(owner=alice)
    enclave, thief = world.enclave(), world.enclave()
    delegation = alice.delegate(enclave, instance.id)
    claims = enclave.claims(await world.challenge(), delegation, instance.id)
    reply = await world.stub.Release(enclave.request(claims, delegation))
    with pytest.raises(SignatureInvalid):
        unseal(reply.sealed, reply.signature, claims.to_bytes(), thief.hpke, world.home.service.public_key())


@dataclass
class Scene:
    """What a refusal test starts from: everything is in order."""

    world: World
    alice: Person
    mallory: Person
    enclave: Enclave
    instance: MadeInstance

    async def ask(self, *, enclave: Enclave | None = None, delegation: bytes | None = None, **claims: Any) -> Any:
        enclave = enclave or self.enclave
        instance = claims.pop("instance", self.instance.id)
        if delegation is None:
            delegation = self.alice.delegate(enclave, instance)
        return await self.world.release(enclave, delegation, instance, **claims)

    async def tamper(self, change: Callable[[Any], None]) -> Any:
        delegation = self.alice.delegate(self.enclave, self.instance.id)
        claims = self.enclave.claims(await self.world.challenge(), delegation, self.instance.id)
        request = self.enclave.request(claims, delegation)
        change(request)
        return await self.world.stub.Release(request)


@pytest.fixture
def scene(world: World) -> Scene:
    alice, mallory = world.person("alice"), world.person("mallory")
    return Scene(world, alice, mallory, world.enclave(), world.instance(owner=alice))


async def wrong_measurement(scene: Scene) -> Any:
    return await scene.ask(enclave=scene.world.enclave(measurement=bytes(32)))


async def debug_quote(scene: Scene) -> Any:
    debug = Faults(attributes=Attributes.INIT | Attributes.MODE64 | Attributes.DEBUG)
    return await scene.ask(enclave=scene.world.enclave(faults=debug))


async def outdated_platform(scene: Scene) -> Any:
    return await scene.ask(enclave=scene.world.enclave(faults=Faults(tcb_status="OutOfDate")))


async def expired_collateral(scene: Scene) -> Any:
    scene.world.clock.now = START + 40 * 24 * 3600
    delegation = scene.alice.delegate(scene.enclave, scene.instance.id, expires=scene.world.clock.now + 60)
    return await scene.ask(delegation=delegation)


async def no_quote(scene: Scene) -> Any:
    return await scene.tamper(lambda request: request.ClearField("quote"))


async def oversized_collateral(scene: Scene) -> Any:
    def grow(request: Any) -> None:
        request.collateral = bytes(70_000)

    return await scene.tamper(grow)


async def quote_of_other_claims(scene: Scene) -> Any:
    delegation = scene.alice.delegate(scene.enclave, scene.instance.id)
    claims = scene.enclave.claims(await scene.world.challenge(), delegation, scene.instance.id)
    more = claims.model_copy(update={"tokens": 10_000})
    return await scene.world.stub.Release(scene.enclave.request(more, delegation, quoted=claims.to_bytes()))


async def swapped_hpke_key(scene: Scene) -> Any:
    delegation = scene.alice.delegate(scene.enclave, scene.instance.id)
    claims = scene.enclave.claims(await scene.world.challenge(), delegation, scene.instance.id)
    thief = claims.model_copy(update={"hpke_key": bytes([9]) + bytes(31)})
    return await scene.world.stub.Release(scene.enclave.request(thief, delegation, quoted=claims.to_bytes()))


async def reused_nonce(scene: Scene) -> Any:
    delegation = scene.alice.delegate(scene.enclave, scene.instance.id)
    request = scene.enclave.request(
        scene.enclave.claims(await scene.world.challenge(), delegation, scene.instance.id), delegation
    )
    await scene.world.stub.Release(request)
    return await scene.world.stub.Release(request)


async def expired_nonce(scene: Scene) -> Any:
    challenge = await scene.world.challenge()
    scene.world.clock.now += 60
    delegation = scene.alice.delegate(scene.enclave, scene.instance.id)
    claims = scene.enclave.claims(challenge, delegation, scene.instance.id)
    return await scene.world.stub.Release(scene.enclave.request(claims, delegation))


async def foreign_nonce(scene: Scene) -> Any:
    return await scene.ask(nonce=bytes(32))


async def another_service(scene: Scene) -> Any:
    return await scene.ask(service=bytes(32))


async def missing_delegation(scene: Scene) -> Any:
    return await scene.ask(delegation=b"")


async def delegation_signed_by_another_user(scene: Scene) -> Any:
    forged = scene.mallory.delegate(scene.enclave, scene.instance.id, user=scene.alice.public)
    return await scene.ask(delegation=forged)


async def another_users_delegation(scene: Scene) -> Any:
    return await scene.ask(delegation=scene.mallory.delegate(scene.enclave, scene.instance.id))


async def delegation_that_the_claims_do_not_digest(scene: Scene) -> Any:
    other = scene.alice.delegate(scene.enclave, scene.instance.id)
    return await scene.tamper(lambda request: setattr(request, "delegation", other))


async def delegation_for_another_enclave_key(scene: Scene) -> Any:
    return await scene.ask(delegation=scene.alice.delegate(scene.world.enclave(), scene.instance.id))


async def delegation_for_another_measurement(scene: Scene) -> Any:
    return await scene.ask(delegation=scene.alice.delegate(scene.enclave, scene.instance.id, measurement=bytes(32)))


async def delegation_for_another_instance(scene: Scene) -> Any:
    return await scene.ask(delegation=scene.alice.delegate(scene.enclave, "0" * 32))


async def expired_delegation(scene: Scene) -> Any:
    return await scene.ask(delegation=scene.alice.delegate(scene.enclave, scene.instance.id, expires=START))


async def delegation_without_end(scene: Scene) -> Any:
    late = START + 24 * 3600 + 31
    return await scene.ask(delegation=scene.alice.delegate(scene.enclave, scene.instance.id, expires=late))


async def unregistered_user(scene: Scene) -> Any:
    return await scene.ask(delegation=Person("eve").delegate(scene.enclave, scene.instance.id))


async def removed_user(scene: Scene) -> Any:
    scene.world.remove(scene.alice)
    return await scene.ask()


async def unknown_instance(scene: Scene) -> Any:
    return await scene.ask(instance="0" * 32)


async def removed_instance(scene: Scene) -> Any:
    with scene.world.store.write() as db:
        instances.remove(db, scene.world.vault, scene.instance.id, now=START)
    return await scene.ask()


async def grant_apart_from_a_dedicated_instance(scene: Scene) -> Any:
    return await scene.ask(kind="grant")


async def spent_budget(scene: Scene) -> Any:
    poor = scene.world.person("poor", budget=0)
    instance = scene.world.instance(owner=poor)
    delegation = poor.delegate(scene.enclave, instance.id)
    return await scene.world.release(scene.enclave, delegation, instance.id)


async def link_key_of_another_kind(scene: Scene) -> Any:
    return await scene.ask(link_key=bytes(91))


async def hpke_key_of_small_order(scene: Scene) -> Any:
    return await scene.ask(hpke_key=bytes(32))


async def claims_of_another_kind(scene: Scene) -> Any:
    return await scene.tamper(lambda request: setattr(request, "claims", b"\xa0"))


async def oversized_claims(scene: Scene) -> Any:
    return await scene.tamper(lambda request: setattr(request, "claims", bytes(10_000)))


REFUSALS: list[tuple[Callable[[Scene], Awaitable[Any]], str]] = [
    (wrong_measurement, "measurement_refused"),
    (debug_quote, "debug_enclave_refused"),
    (outdated_platform, "evidence_refused"),
    (expired_collateral, "collateral_expired"),
    (no_quote, "evidence_malformed"),
    (oversized_collateral, "evidence_malformed"),
    (quote_of_other_claims, "report_data_mismatch"),
    (swapped_hpke_key, "report_data_mismatch"),
    (reused_nonce, "nonce_refused"),
    (expired_nonce, "nonce_refused"),
    (foreign_nonce, "nonce_refused"),
    (another_service, "release_refused"),
    (missing_delegation, "delegation_refused"),
    (delegation_signed_by_another_user, "delegation_refused"),
    (another_users_delegation, "user_refused"),
    (delegation_that_the_claims_do_not_digest, "delegation_refused"),
    (delegation_for_another_enclave_key, "delegation_refused"),
    (delegation_for_another_measurement, "delegation_refused"),
    (delegation_for_another_instance, "delegation_refused"),
    (expired_delegation, "delegation_refused"),
    (delegation_without_end, "delegation_refused"),
    (unregistered_user, "user_refused"),
    (removed_user, "user_refused"),
    (unknown_instance, "instance_refused"),
    (removed_instance, "instance_refused"),
    (grant_apart_from_a_dedicated_instance, "instance_refused"),
    (spent_budget, "budget_spent"),
    (link_key_of_another_kind, "request_invalid"),
    (hpke_key_of_small_order, "request_invalid"),
    (claims_of_another_kind, "frame_invalid"),
    (oversized_claims, "frame_invalid"),
]
UNREADABLE = {claims_of_another_kind, oversized_claims}
"""Nothing was asked that could be decided: these are counted, and leave no entry in the audit log."""


@pytest.mark.parametrize(("attempt", "code"), REFUSALS, ids=[attempt.__name__ for attempt, _ in REFUSALS])
async def test_refuses(scene: Scene, attempt: Callable[[Scene], Awaitable[Any]], code: str) -> None:
    spent = scene.world.user(scene.alice).spent
    assert await refusal(attempt(scene)) == code
    counted = scene.world.telemetry.registry.get_sample_value("stip_refusals_total", {"code": code})
    assert counted == 1
    if attempt not in UNREADABLE:
        assert scene.world.entries()[-1].code == code
    assert scene.world.user(scene.alice).spent - spent == (100 if attempt is reused_nonce else 0)
    # neighbours are unaffected: another user of another instance is served as before
    if scene.world.clock.now > START:
        AuditLog(scene.world.store, scene.world.home.service).accept_clock(now=START, reason="the test turned it")
        scene.world.clock.now = START
    neighbour = scene.world.person("neighbour")
    await scene.world.bundle(scene.world.enclave(), neighbour, scene.world.instance(owner=neighbour).id)


async def test_a_nonce_is_spent_even_where_the_release_is_refused(scene: Scene) -> None:
    challenge = await scene.world.challenge()
    bad = scene.alice.delegate(scene.enclave, scene.instance.id, expires=START)
    good = scene.alice.delegate(scene.enclave, scene.instance.id)
    for delegation, code in ((bad, "delegation_refused"), (good, "nonce_refused")):
        claims = scene.enclave.claims(challenge, delegation, scene.instance.id)
        assert await refusal(scene.world.stub.Release(scene.enclave.request(claims, delegation))) == code


def quoted_request(scene: Scene) -> tuple[Request, Claims]:
    delegation = scene.alice.delegate(scene.enclave, scene.instance.id)

    class Made:
        nonce = bytes(32)
        service = service_id(scene.world.home.service.public_key())

    claims = scene.enclave.claims(Made, delegation, scene.instance.id)
    provider = scene.enclave.provider
    quote = provider.quote(report_data(claims.to_bytes()))
    return Request(claims.to_bytes(), quote, provider.collateral(), delegation), claims


def decide(scene: Scene, request: Request) -> None:
    service = service_id(scene.world.home.service.public_key())
    claims = release.read_claims(request.claims)
    root = scene.world.platform.root_der
    release.examine(request, claims, scene.world.policy, service=service, root_der=root, now=START)


async def test_a_flipped_bit_in_any_byte_of_the_claims_is_refused(scene: Scene) -> None:
    request, _ = quoted_request(scene)
    decide(scene, request)
    for at in range(len(request.claims)):
        claims = bytearray(request.claims)
        claims[at] ^= 1 << at % 8
        with pytest.raises(StipError):
            decide(scene, Request(bytes(claims), request.quote, request.collateral, request.delegation))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), part=st.sampled_from(["quote", "delegation"]))
async def test_a_flipped_bit_in_quote_or_delegation_is_refused(scene: Scene, at: float, bit: int, part: str) -> None:
    request, _ = quoted_request(scene)
    fields = vars(request) | {}
    data = bytearray(fields[part])
    data[int(at * len(data))] ^= 1 << bit
    with pytest.raises(StipError):
        decide(scene, Request(**(fields | {part: bytes(data)})))
