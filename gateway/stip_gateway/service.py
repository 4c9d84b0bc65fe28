"""The gateway's `Model` service: the same face as a model server's, with a lease at the door."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_gateway.admission import Admission, overloaded
from stip_gateway.config import Limits, ReplicaSettings
from stip_gateway.link import LinkSessions, Passed
from stip_gateway.relay import Notes, Relay
from stip_gateway.replicas import Replica, Replicas
from stip_protocol import rpc
from stip_protocol.errors import Draining, FrameInvalid, LeaseForeign, ReplicaLost
from stip_protocol.telemetry import LEASE_AGE, LINKS, REPLICAS, ROWS, SESSIONS, Telemetry
from stip_protocol.wire import model_pb2, model_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
PARTING_SECONDS = 0.2
"""How often a replica that left the table is looked at: whether its last session has ended."""


class GatewayService(model_pb2_grpc.ModelServicer):
    """Describe and Link, each behind a link certificate of the key service's CA."""

    def __init__(
        self,
        replicas: Replicas,
        admission: Admission,
        limits: Limits,
        telemetry: Telemetry,
        *,
        drain_seconds: float = 30.0,
    ) -> None:
        """`drain_seconds`: how long a drain may take, as links are told."""
        self._replicas, self._admission, self._limits, self._telemetry = replicas, admission, limits, telemetry
        self._drain_seconds = drain_seconds
        self._links: dict[Relay, int] = {}
        """With the sessions that are counted of each."""
        self._routes: dict[Relay, Replica] = {}
        self._enclaves: Counter[bytes] = Counter()
        """Links by the key of their certificate."""
        self._parting: set[asyncio.Task[None]] = set()
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
        wanted = _metadata(context).get(rpc.REPLICA_KEY)
        replica = await self._replicas.choose(request.instance, request.epoch, wanted)
        card = model_pb2.Card()
        card.CopyFrom(_card(replica))
        del card.replicas[:]
        card.replicas.extend(self._replicas.names(request.instance, request.epoch))
        return card

    async def Link(  # type: ignore[override]  # noqa: N802 - grpc.aio takes handlers that write through their context
        self, requests: object, context: Context
    ) -> None:
        instance, epoch, wanted = _route(context)
        link_key = _link_key(context)
        self._require_room(link_key)  # before a replica is asked, and again after the wait for its answer
        replica = await self._replicas.choose(instance, epoch, wanted)
        self._require_room(link_key)
        if replica.left:  # the table, while it was asked
            raise ReplicaLost("the replica left the routing table", retry_after=self._limits.retry_seconds)
        link = LinkSessions(
            _card(replica),
            self._admission,
            link_key=link_key,
            sessions=self._limits.sessions_per_link,
            slices=self._limits.slices_per_frame,
            retry_after=self._limits.retry_seconds,
        )
        call = replica.stub.Link(
            metadata=(
                (rpc.INSTANCE_KEY, instance),
                (rpc.EPOCH_KEY, str(epoch)),
                (rpc.REPLICA_KEY, replica.settings.name),
            )
        )
        relay = Relay(link, context, call, self._notes(replica))
        self._links[relay], self._routes[relay] = 0, replica
        if not self._replicas.routes(replica):  # it left the table while it was asked
            self._drain(relay)
        self._enclaves[link_key] += 1
        replica.links += 1
        log = structlog.get_logger().bind(replica=replica.settings.name)
        log.info("link opened", instance=instance, epoch=epoch)
        try:
            await relay.run()
        except ReplicaLost:
            self._replicas.lost(replica)
            raise
        except Draining as error:
            self._replicas.drains(replica, error.retry_after or 0.0)
            raise
        finally:
            self._count(replica, relay, 0)
            del self._links[relay], self._routes[relay]
            self._enclaves[link_key] -= 1
            if not self._enclaves[link_key]:
                del self._enclaves[link_key]
            replica.links -= 1
            log.info("link closed", sessions=link.sessions)

    async def drain(self) -> None:
        """Take nothing new, tell every link, and end the links once their last session has ended."""
        self._draining = True
        for relay in self._links:
            self._drain(relay)
        await self._quiet.wait()
        for relay in self._links:
            relay.end()

    async def reread(self, table: Sequence[ReplicaSettings]) -> None:
        """Take another routing table. Links to replicas that left it take no more sessions, and end in the background:
        with their last session, after `drain_seconds` at the latest.
        """
        for replica in self._replicas.reread(table):
            structlog.get_logger().info("replica leaves", replica=replica.settings.name, links=replica.links)
            task = asyncio.create_task(self._part_with(replica))
            self._parting.add(task)
            task.add_done_callback(self._parting.discard)

    async def stop(self) -> None:
        """Part with replicas that left the table at once."""
        for task in self._parting:
            task.cancel()
        await asyncio.gather(*self._parting, return_exceptions=True)

    async def _part_with(self, replica: Replica) -> None:
        try:
            for relay in self._links_to(replica):
                self._drain(relay)
            until = asyncio.get_running_loop().time() + self._drain_seconds
            while self._links_to(replica) and asyncio.get_running_loop().time() < until:
                await asyncio.sleep(PARTING_SECONDS)  # first: what was announced has to leave before the link ends
                for relay in self._links_to(replica):
                    if not self._links[relay]:
                        relay.end()
            for relay in self._links_to(replica):
                relay.end()
        finally:
            await replica.close()

    def _links_to(self, replica: Replica) -> list[Relay]:
        return [relay for relay, route in self._routes.items() if route is replica]

    def _drain(self, relay: Relay) -> None:
        """Once in the life of a link."""
        if not relay.link.draining:
            relay.link.draining = True
            relay.announce(model_pb2.Down(drain=model_pb2.Drain(seconds=round(self._drain_seconds))))

    def _require_room(self, link_key: bytes) -> None:
        if self._draining:
            raise Draining("this gateway takes no new links")
        limits = self._limits
        for what, taken, most in (
            ("links", len(self._links), limits.links),
            ("links of one enclave", self._enclaves[link_key], limits.links_per_enclave),
        ):
            if taken >= most:
                raise overloaded(what, taken + 1, most, retry_after=limits.retry_seconds)

    def _notes(self, replica: Replica) -> Notes:
        def passed(relay: Relay, what: Passed) -> None:
            if what.rows:
                self._rows.inc(what.rows)
            for code in what.refusals:
                self._telemetry.refused(code)
            self._count(replica, relay, relay.link.sessions)

        def reported(message: model_pb2.Down) -> None:
            replica.reported(message.load)
            if message.HasField("drain"):
                self._replicas.drains(replica, message.drain.seconds)

        return Notes(self._admit, self._forward, passed, reported)

    def _count(self, replica: Replica, relay: Relay, sessions: int) -> None:
        change = sessions - self._links[relay]
        self._links[relay] = sessions
        replica.sessions += change
        self._sessions += change
        if self._sessions:
            self._quiet.clear()
        else:
            self._quiet.set()


def _card(replica: Replica) -> model_pb2.Card:
    if replica.card is None:
        raise ReplicaLost("the replica stopped answering")
    return replica.card


def _route(context: Context) -> tuple[str, int, str | None]:
    """(instance, epoch, replica or None) of a link's metadata."""
    metadata = _metadata(context)
    epoch = metadata.get(rpc.EPOCH_KEY, "")
    if not (epoch.isascii() and epoch.isdigit() and len(epoch) <= 10):
        raise FrameInvalid.because(f"metadata {rpc.EPOCH_KEY}", "no number", "the instance's epoch")
    return metadata.get(rpc.INSTANCE_KEY, ""), int(epoch), metadata.get(rpc.REPLICA_KEY)


def _metadata(context: Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _link_key(context: Context) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo of the peer's certificate, which TLS has checked against the link CA."""
    pem = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
    if pem is None:
        raise LeaseForeign("link: no client certificate was presented")
    certificate = x509.load_pem_x509_certificate(pem)
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()
