"""The key service's client: evidence out, bundles, grants and renewals in, and nothing believed that is not bound.

What comes back is signed by the pinned key over the very claims that asked for it; still each field is held to
the request, so that a key service that serves two enclaves or two users at once cannot mix them up here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import grpc.aio
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_enclave.identity import EnclaveIdentity
from stip_protocol import rpc
from stip_protocol.attestation.evidence import EvidenceProvider
from stip_protocol.documents import Signed
from stip_protocol.errors import (
    AuditLogForked,
    DeadlineExceeded,
    FrameInvalid,
    InstanceRefused,
    LeaseForeign,
    ManifestMismatch,
    NonceRefused,
    SignatureInvalid,
    Unavailable,
)
from stip_protocol.heads import open_head
from stip_protocol.lease import Lease
from stip_protocol.release import (
    NONCE_BYTES,
    AuditHead,
    Bundle,
    Claims,
    Grant,
    Heartbeat,
    Notice,
    Renewal,
    Watch,
    report_data,
    service_id,
    sign_heartbeat,
    sign_watch,
    unseal,
)
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc

R = TypeVar("R")
Epochs = Mapping[int, bytes]
"""Digests of manifests by epoch."""
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease with the bytes the gateway wants to see, and the certificate that goes with it."""

    signed: bytes = field(repr=False)
    lease: Lease
    link_certificate: bytes = field(repr=False)
    superseded: bool = False
    """Whether the key service said that the epoch drains."""


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
        self.audit_head = b""
        """The newest signed head of the service's audit log; empty before the first bundle."""
        self._head: AuditHead | None = None

    async def bundle(self, delegation: bytes, instance: str, held: Epochs, rows: int) -> Bundle:
        """A bundle for the user who signed `delegation`, with a lease of about `rows` rows, for one of the epochs that
        are `held`: which one is the key service's to say.

        Raises `SignatureInvalid`, `InstanceRefused`, `ManifestMismatch` or `LeaseForeign` where a field is not what
        was asked for.
        """
        bundle = await self._release(delegation, instance, "bundle", tuple(sorted(held)), rows)
        assert isinstance(bundle, Bundle)
        if bundle.delegation != Signed.from_bytes(delegation).digest():
            raise InstanceRefused("bundle delegation: another delegation than the one presented", field="delegation")
        _require_instance("bundle", bundle, instance, held)
        lease = self.held(bundle.lease, bundle.link_certificate, bundle).lease
        self._note(bundle.audit_head, lease)
        return bundle

    async def grant(self, delegation: bytes, instance: str, epoch: int, manifest_digest: bytes) -> Grant:
        """The grant of one epoch of a shared instance. Raises as `bundle`."""
        grant = await self._release(delegation, instance, "grant", (epoch,), 0)
        assert isinstance(grant, Grant)
        _require_instance("grant", grant, instance, {epoch: manifest_digest})
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
        if renewal.audit_head:
            self._note(renewal.audit_head, new.lease)
        return replace(new, superseded=renewal.superseded)

    async def watch(self) -> AsyncGenerator[Notice]:
        """What the key service has to say about the leases of this enclave, as long as the stream lasts: first that it
        watches, then what ends or supersedes them. Nothing is handed on that is not the next notice of this stream.

        Raises `SignatureInvalid` (not the pinned key), `NonceRefused` (of another stream), `FrameInvalid` (one is
        missing, repeated or out of place), `DeadlineExceeded` where none comes at first, `Unavailable` at the end.
        """
        watch = Watch(nonce=await self._challenge(()), link_key=self._identity.link_key_digest)
        signature = sign_watch(watch, self._identity.link_key)
        call: Any = self._stub.Watch(
            keyservice_pb2.WatchRequest(watch=watch.to_bytes(), signature=signature, link_key=self._identity.link_spki)
        )
        sequence = 0
        try:
            while True:
                async with asyncio.timeout(None if sequence else self._timeout):
                    reply = await call.read()
                if reply is grpc.aio.EOF:
                    raise Unavailable("the key service ended the control stream")
                notice = Signed.from_bytes(reply.notice).open(Notice, self._service)
                if notice.nonce != watch.nonce:
                    raise NonceRefused("notice nonce: of another stream", field="nonce")
                if notice.sequence != sequence:
                    raise FrameInvalid.because("notice sequence", notice.sequence, sequence)
                if (notice.kind == "watching") != (sequence == 0):
                    raise FrameInvalid.because("notice kind", notice.kind, "watching at first, and then no more")
                yield notice
                sequence += 1
        except grpc.aio.AioRpcError as error:
            raise rpc.from_rpc(error) from None
        except TimeoutError:
            raise DeadlineExceeded("the key service did not begin to watch in time") from None
        finally:
            call.cancel()

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

    def _note(self, signed: bytes, lease: Lease) -> None:
        """Keep a head that came with a lease, where it is the newest. A log that went back, or has two hashes at one
        place, is not judged here, only handed on: who was shown what is for clients to compare.

        Raises `AuditLogForked` where the lease names another head.
        """
        head = open_head(signed, self._service)
        if head.hash != lease.audit_head:
            raise AuditLogForked("lease audit_head: another head than the one that came with it", field="audit_head")
        kept = self._head
        if kept is None or head.sequence >= kept.sequence or head.at > kept.at:
            self._head, self.audit_head = head, signed

    async def _challenge(self, metadata: Metadata) -> bytes:
        """A nonce of the pinned key service."""
        challenge = await _answered(
            self._stub.Challenge(keyservice_pb2.ChallengeRequest(), timeout=self._timeout, metadata=metadata)
        )
        name = service_id(self._service)
        if challenge.service != name:
            raise SignatureInvalid.because("challenge service", challenge.service.hex()[:64], name.hex())
        nonce: bytes = challenge.nonce
        if len(nonce) != NONCE_BYTES:
            raise NonceRefused.because("challenge nonce", f"{len(nonce)} bytes", f"{NONCE_BYTES} bytes")
        return nonce

    async def _release(
        self,
        delegation: bytes,
        instance: str,
        kind: Literal["bundle", "grant"],
        epochs: tuple[int, ...],
        rows: int,
    ) -> Bundle | Grant:
        began = time.perf_counter()
        metadata = _request_id()
        nonce = await self._challenge(metadata)
        private = X25519PrivateKey.generate()
        claims = Claims(
            nonce=nonce,
            hpke_key=private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
            tls_key=self._identity.tls.spki_sha256,
            link_key=self._identity.link_spki,
            service=service_id(self._service),
            delegation=Signed.from_bytes(delegation).digest(),
            kind=kind,
            instance=instance,
            tokens=rows,
            epochs=epochs,
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


def _request_id() -> Metadata:
    """Metadata that carries the session's request id, where one is bound to this context."""
    bound = structlog.contextvars.get_contextvars().get("request_id")
    return ((rpc.REQUEST_ID_KEY, bound),) if isinstance(bound, str) else ()


async def _answered(call: Awaitable[R]) -> R:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise rpc.from_rpc(error) from None


def _require_instance(what: str, document: Bundle | Grant, instance: str, held: Epochs) -> None:
    if document.instance != instance:
        raise InstanceRefused.because(f"{what} instance", document.instance, instance)
    if document.epoch not in held:
        allowed = ", ".join(map(str, sorted(held)))
        raise ManifestMismatch.because(f"{what} epoch", document.epoch, allowed)
    allowed = held[document.epoch].hex()
    if document.manifest_digest.hex() != allowed:
        raise ManifestMismatch.because(f"{what} manifest_digest", document.manifest_digest.hex(), allowed)
