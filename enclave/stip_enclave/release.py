"""The key service's client: evidence out, bundles, grants and renewals in, and nothing believed that is not bound.

What comes back is signed by the pinned key over the very claims that asked for it; still each field is held to
the request, so that a key service that serves two enclaves or two users at once cannot mix them up here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import grpc.aio
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_enclave.identity import EnclaveIdentity
from stip_protocol import rpc
from stip_protocol.attestation.evidence import EvidenceProvider
from stip_protocol.documents import Signed
from stip_protocol.errors import InstanceRefused, LeaseForeign, ManifestMismatch, NonceRefused, SignatureInvalid
from stip_protocol.lease import Lease
from stip_protocol.release import (
    NONCE_BYTES,
    AuditHead,
    Bundle,
    Claims,
    Grant,
    Heartbeat,
    Renewal,
    report_data,
    service_id,
    sign_heartbeat,
    unseal,
)
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease with the bytes the gateway wants to see, and the certificate that goes with it."""

    signed: bytes = field(repr=False)
    lease: Lease
    link_certificate: bytes = field(repr=False)


class ReleaseClient:
    """Asks the key service. Every method raises what the service refuses with, or `Unavailable`."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        service: Ed25519PublicKey,
        provider: EvidenceProvider,
        identity: EnclaveIdentity,
        telemetry: Telemetry,
        *,
        audience: str,
        timeout: float,
    ) -> None:
        """`audience`: the gateway's name; `timeout`: seconds for one call."""
        self._stub = keyservice_pb2_grpc.KeyServiceStub(channel)
        self._service, self._provider, self._identity = service, provider, identity
        self._audience, self._timeout = audience, timeout
        self._duration = telemetry.stage("release")

    async def bundle(self, delegation: bytes, instance: str, manifest_digest: bytes, epoch: int, rows: int) -> Bundle:
        """A bundle for the user who signed `delegation`, with a lease of about `rows` rows.

        Raises `SignatureInvalid`, `InstanceRefused`, `ManifestMismatch` or `LeaseForeign` where a field is not what
        was asked for.
        """
        bundle = await self._release(delegation, instance, "bundle", rows)
        assert isinstance(bundle, Bundle)
        if bundle.delegation != Signed.from_bytes(delegation).digest():
            raise InstanceRefused("bundle delegation: another delegation than the one presented", field="delegation")
        _require_instance("bundle", bundle, instance, epoch, manifest_digest)
        Signed.from_bytes(bundle.audit_head).open(AuditHead, self._service)
        self.held(bundle.lease, bundle.link_certificate, bundle)
        return bundle

    async def grant(self, delegation: bytes, instance: str, manifest_digest: bytes, epoch: int) -> Grant:
        """The grant of a shared instance. Raises as `bundle`."""
        grant = await self._release(delegation, instance, "grant", 0)
        assert isinstance(grant, Grant)
        _require_instance("grant", grant, instance, epoch, manifest_digest)
        return grant

    async def renew(self, held: HeldLease, heartbeat: Heartbeat) -> HeldLease:
        """A lease with the same handle and a later serial.

        Where the answer was lost, the same heartbeat may be sent again; another one with its serial may not.
        Raises `SignatureInvalid`, `NonceRefused`, `LeaseForeign`.
        """
        old = held.lease
        signature = sign_heartbeat(heartbeat, self._identity.link_key)
        request = keyservice_pb2.RenewRequest(heartbeat=heartbeat.to_bytes(), signature=signature)
        reply = await _answered(self._stub.Renew(request, timeout=self._timeout))
        renewal = Signed.from_bytes(reply.renewal).open(Renewal, self._service)
        if renewal.nonce != heartbeat.nonce:
            raise NonceRefused("renewal nonce: the answer to another heartbeat", field="nonce")
        new = self.held(renewal.lease, renewal.link_certificate, old)
        if new.lease.handle != old.handle:
            raise LeaseForeign("renewal handle: another lease", field="handle")
        if new.lease.serial <= old.serial or new.lease.tokens < old.tokens:
            raise LeaseForeign.because("renewal serial", new.lease.serial, f"above {old.serial}, with no fewer rows")
        return new

    def held(self, signed: bytes, link_certificate: bytes, like: Bundle | Lease) -> HeldLease:
        """A lease held to its instance and to this enclave. Raises `SignatureInvalid`, `LeaseForeign`."""
        lease = Signed.from_bytes(signed).open(Lease, self._service)
        for name, got, allowed in (
            ("audience", lease.audience, self._audience),
            ("instance", lease.instance, like.instance),
            ("epoch", lease.epoch, like.epoch),
            ("manifest_digest", lease.manifest_digest.hex(), like.manifest_digest.hex()),
            ("link_key", lease.link_key.hex(), self._identity.link_key_digest.hex()),
        ):
            if got != allowed:
                raise LeaseForeign.because(f"lease {name}", got, allowed)
        self._identity.link_credentials(link_certificate)
        return HeldLease(signed, lease, link_certificate)

    async def _release(
        self, delegation: bytes, instance: str, kind: Literal["bundle", "grant"], rows: int
    ) -> Bundle | Grant:
        began = time.perf_counter()
        metadata = _request_id()
        challenge = await _answered(
            self._stub.Challenge(keyservice_pb2.ChallengeRequest(), timeout=self._timeout, metadata=metadata)
        )
        name = service_id(self._service)
        if challenge.service != name:
            raise SignatureInvalid.because("challenge service", challenge.service.hex()[:64], name.hex())
        if len(challenge.nonce) != NONCE_BYTES:
            raise NonceRefused.because("challenge nonce", f"{len(challenge.nonce)} bytes", f"{NONCE_BYTES} bytes")
        private = X25519PrivateKey.generate()
        claims = Claims(
            nonce=challenge.nonce,
            hpke_key=private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
            tls_key=self._identity.tls.spki_sha256,
            link_key=self._identity.link_spki,
            service=name,
            delegation=Signed.from_bytes(delegation).digest(),
            kind=kind,
            instance=instance,
            tokens=rows,
        ).to_bytes()
        request = keyservice_pb2.ReleaseRequest(
            claims=claims,
            quote=await asyncio.to_thread(self._provider.quote, report_data(claims)),
            collateral=await asyncio.to_thread(self._provider.collateral),
            delegation=delegation,
        )
        reply = await _answered(self._stub.Release(request, timeout=self._timeout, metadata=metadata))
        document = unseal(reply.sealed, reply.signature, claims, private, self._service)
        self._duration.observe(time.perf_counter() - began)
        return document


def _request_id() -> tuple[tuple[str, str], ...]:
    """Metadata that carries the session's request id, where one is bound to this context."""
    bound = structlog.contextvars.get_contextvars().get("request_id")
    return ((rpc.REQUEST_ID_KEY, bound),) if isinstance(bound, str) else ()


async def _answered(call: Awaitable[R]) -> R:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise rpc.from_rpc(error) from None


def _require_instance(what: str, document: Bundle | Grant, instance: str, epoch: int, manifest_digest: bytes) -> None:
    if document.instance != instance:
        raise InstanceRefused.because(f"{what} instance", document.instance, instance)
    for name, got, allowed in (
        ("epoch", document.epoch, epoch),
        ("manifest_digest", document.manifest_digest.hex(), manifest_digest.hex()),
    ):
        if got != allowed:
            raise ManifestMismatch.because(f"{what} {name}", got, allowed)
