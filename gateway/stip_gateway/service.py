"""The gateway's `Model` service: the same face as a model server's, with a lease at the door."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_gateway.admission import Admission
from stip_gateway.config import Limits
from stip_gateway.link import LinkSessions, Passed
from stip_gateway.outbox import Outbox
from stip_gateway.replicas import Replica, Replicas
from stip_protocol import rpc
from stip_protocol.errors import Draining, FrameInvalid, LeaseForeign, Overloaded, ReplicaLost
from stip_protocol.telemetry import LEASE_AGE, LINKS, REPLICAS, ROWS, SESSIONS, Telemetry
from stip_protocol.wire import model_pb2, model_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class GatewayService(model_pb2_grpc.ModelServicer):
    """Describe and Link, each behind a link certificate of the key service's CA."""

    def __init__(self, replicas: Replicas, admission: Admission, limits: Limits, telemetry: Telemetry) -> None:
        self._replicas, self._admission, self._limits, self._telemetry = replicas, admission, limits, telemetry
        self._links: dict[LinkSessions, Outbox] = {}
        self._draining = False
        self._sessions = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._forward = telemetry.stage("forward")
        self._admit = telemetry.stage("admit")
        self._rows = telemetry.counter(ROWS)
        telemetry.gauge(LINKS).set_function(lambda: len(self._links))
        telemetry.gauge(SESSIONS).set_function(lambda: self._sessions)
        telemetry.gauge(LEASE_AGE).set_function(admission.oldest_age)
        telemetry.gauge(REPLICAS).set_function(replicas.answering)

    async def Describe(  # noqa: N802 - the name is the wire's
        self, request: model_pb2.InstanceRef, context: Context
    ) -> model_pb2.Card:
        replica = await self._replicas.choose(request.instance, request.epoch, None)
        card = model_pb2.Card()
        card.CopyFrom(_card(replica))
        del card.replicas[:]
        card.replicas.extend(self._replicas.names(request.instance, request.epoch))
        return card

    async def Link(  # noqa: N802 - the name is the wire's
        self, requests: AsyncIterator[model_pb2.Up], context: Context
    ) -> AsyncIterator[model_pb2.Down]:
        instance, epoch, wanted = _route(context)
        self._require_room()  # before a replica is asked, and again after the wait for its answer
        replica = await self._replicas.choose(instance, epoch, wanted)
        self._require_room()
        link = LinkSessions(
            _card(replica),
            self._admission,
            link_key=_link_key(context),
            sessions=self._limits.sessions_per_link,
            slices=self._limits.slices_per_frame,
        )
        self._links[link] = outbox = Outbox(self._limits.outbox)
        log = structlog.get_logger().bind(replica=replica.settings.name)
        log.info("link opened", instance=instance, epoch=epoch)
        call = replica.stub.Link(
            metadata=(
                (rpc.INSTANCE_KEY, instance),
                (rpc.EPOCH_KEY, str(epoch)),
                (rpc.REPLICA_KEY, replica.settings.name),
            )
        )
        pumps = [asyncio.create_task(self._upward(requests, call, link, replica, outbox))]
        pumps.append(asyncio.create_task(self._downward(call, link, replica, outbox)))
        for pump in pumps:
            pump.add_done_callback(lambda _: outbox.end())
        try:
            async for down in outbox:
                yield down
            for pump in pumps:
                if pump.done():
                    pump.result()
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            call.cancel()
            self._count(replica, -link.sessions)
            del self._links[link]
            log.info("link closed", sessions=link.sessions)

    async def drain(self) -> None:
        """Take nothing new, tell every link, and end the links once their last session has ended."""
        self._draining = True
        for link, outbox in self._links.items():
            link.draining = True
            outbox.announce(model_pb2.Down(drain=model_pb2.Drain()))
        await self._quiet.wait()
        for outbox in self._links.values():
            outbox.end()

    def _require_room(self) -> None:
        if self._draining:
            raise Draining("this gateway takes no new links")
        if len(self._links) >= self._limits.links:
            raise Overloaded.because("links", len(self._links) + 1, f"at most {self._limits.links}")

    async def _upward(
        self,
        requests: AsyncIterator[model_pb2.Up],
        call: Any,
        link: LinkSessions,
        replica: Replica,
        outbox: Outbox,
    ) -> None:
        """Enclave to replica. Ends the link when the enclave does, or with the error of a malformed frame."""
        try:
            async for up in requests:
                began = time.perf_counter()
                before = link.sessions
                opening = up.HasField("open")
                passed = link.up(up)
                self._count(replica, link.sessions - before)
                self._account(passed)
                for answer in passed.answers:
                    await outbox.put(answer)
                for onward in passed.onward:
                    await call.write(onward)
                (self._admit if opening else self._forward).observe(time.perf_counter() - began)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise ReplicaLost("the replica broke off") from None

    async def _downward(self, call: Any, link: LinkSessions, replica: Replica, outbox: Outbox) -> None:
        """Replica to enclave."""
        try:
            async for down in call:
                began = time.perf_counter()
                before = link.sessions
                link.down(down)
                self._count(replica, link.sessions - before)
                await outbox.put(down)
                # The writer goes first: asking for the next message can wait for this one to leave.
                await asyncio.sleep(0)
                self._forward.observe(time.perf_counter() - began)
            raise ReplicaLost("the replica ended the link")
        except grpc.aio.AioRpcError as error:
            refused = rpc.ERROR_CODE_KEY in dict(error.trailing_metadata() or ())
            raise (rpc.from_rpc(error) if refused else ReplicaLost("the replica broke off")) from None

    def _count(self, replica: Replica, change: int) -> None:
        replica.sessions += change
        self._sessions += change
        if self._sessions:
            self._quiet.clear()
        else:
            self._quiet.set()

    def _account(self, passed: Passed) -> None:
        self._rows.inc(passed.rows)
        for code in passed.refusals:
            self._telemetry.refused(code)


def _card(replica: Replica) -> model_pb2.Card:
    if replica.card is None:
        raise ReplicaLost("the replica stopped answering")
    return replica.card


def _route(context: Context) -> tuple[str, int, str | None]:
    """(instance, epoch, replica or None) of a link's metadata."""
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    epoch = metadata.get(rpc.EPOCH_KEY, "")
    if not (epoch.isascii() and epoch.isdigit() and len(epoch) <= 10):
        raise FrameInvalid.because(f"metadata {rpc.EPOCH_KEY}", "no number", "the instance's epoch")
    return metadata.get(rpc.INSTANCE_KEY, ""), int(epoch), metadata.get(rpc.REPLICA_KEY)


def _link_key(context: Context) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo of the peer's certificate, which TLS has checked against the link CA."""
    pem = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
    if pem is None:
        raise LeaseForeign("link: no client certificate was presented")
    certificate = x509.load_pem_x509_certificate(pem)
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()
