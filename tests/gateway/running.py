"""A gateway between a real enclave-side channel and scripted replicas, over real mTLS sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from stip_gateway.admission import Admission
from stip_gateway.config import Limits, ReplicaSettings
from stip_gateway.replicas import Replica, Replicas
from stip_gateway.service import GatewayService
from stip_protocol import rpc
from stip_protocol.errors import StipError
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import model_pb2, model_pb2_grpc
from stip_stack.pki import Authority, Identity
from tests.gateway.wire import AUDIENCE, EPOCH, INSTANCE, SERVICE_KEY, WIDTH, card

LINK_CA = Authority("link CA of the tests")
FOREIGN = Authority("another link CA").issue("cd34")


@dataclass
class ScriptedReplica(model_pb2_grpc.ModelServicer):
    """Answers every slice that wants outputs with its own rows, and remembers what it was handed."""

    seen: list[model_pb2.Up] = field(default_factory=list)
    load: int = 0
    """What it says of its sessions."""
    break_off: grpc.StatusCode | None = None
    """How links end from now on, when they say something."""
    refuse: StipError | None = None
    """With what links are refused."""
    card: model_pb2.Card = field(default_factory=card)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it was asked for its card."""
    times_asked: int = 0
    thinking: asyncio.Event | None = None
    """What it waits for before it answers that."""
    reading: asyncio.Event | None = None
    """What it waits for before it reads from a link."""
    links: list[Any] = field(default_factory=list)
    """The contexts of its open links: what a test writes there, the replica says."""

    async def Describe(self, request: model_pb2.InstanceRef, context: Any) -> model_pb2.Card:  # noqa: N802
        self.asked.set()
        self.times_asked += 1
        if self.thinking is not None:
            await self.thinking.wait()
        return self.card

    async def Link(self, requests: object, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        if self.refuse is not None:
            raise self.refuse
        self.links.append(context)
        try:
            if self.reading is not None:
                await self.reading.wait()
            while (up := await context.read()) is not grpc.aio.EOF:
                self.seen.append(up)
                if self.break_off is not None:
                    await context.abort(self.break_off, "gone")
                if up.HasField("open"):
                    opened = model_pb2.Opened(session=up.open.session)
                    await context.write(model_pb2.Down(opened=opened, load=self.load))
                elif up.feed.rows:
                    await context.write(model_pb2.Down(fed=_answer(up.feed), load=self.load))
        finally:
            self.links.remove(context)


def _answer(feed: model_pb2.Feed) -> model_pb2.Fed:
    """The last `outputs` rows of every slice."""
    fed, start, size = model_pb2.Fed(), 0, 4 * WIDTH
    for part in feed.slices:
        start += part.count * size
        fed.slices.add(session=part.session, position=part.position + part.count - part.outputs, count=part.outputs)
        fed.hidden += feed.rows[start - part.outputs * size : start]
    return fed


@dataclass
class Running:
    """A gateway and its replicas on loopback, and the identities to reach them."""

    service: GatewayService
    routes: Replicas
    scripts: list[ScriptedReplica]
    servers: list[grpc.aio.Server]
    address: str
    operator: Authority
    serve: Callable[[ScriptedReplica, int], Awaitable[tuple[grpc.aio.Server, int]]]
    now: list[float]
    """What the clock of drains says."""
    rows: list[ReplicaSettings]
    """The routing table as it was at first."""
    identity: Identity = field(default_factory=lambda: LINK_CA.issue("ab12"))

    @property
    def replica(self) -> ScriptedReplica:
        return self.scripts[0]

    def route(self, number: int) -> Replica:
        return self.routes._replicas[number]

    def channel(self, identity: Identity) -> grpc.aio.Channel:
        return rpc.channel(self.address, roots=self.operator.pem, identity=(identity.certificate, identity.private_key))

    def narrow_channel(self, identity: Identity) -> grpc.aio.Channel:
        """One that takes little before it is read: HTTP/2's initial window, which is not widened."""
        credentials = grpc.ssl_channel_credentials(
            self.operator.pem, private_key=identity.private_key, certificate_chain=identity.certificate
        )
        options = [*rpc.CHANNEL_OPTIONS, ("grpc.http2.bdp_probe", 0)]
        return grpc.aio.secure_channel(self.address, credentials, options=options)

    def link(self, channel: grpc.aio.Channel, **metadata: str) -> Any:
        fields = {rpc.INSTANCE_KEY: INSTANCE, rpc.EPOCH_KEY: str(EPOCH), **metadata}
        stub: Any = model_pb2_grpc.ModelStub(channel)
        return stub.Link(metadata=tuple(fields.items()))

    async def kill(self, number: int) -> int:
        """End a replica at once; the port it listened on."""
        await self.servers[number].stop(0)
        return int(self.route(number).settings.address.rpartition(":")[2])

    async def revive(self, number: int, port: int) -> None:
        self.servers[number], _ = await self.serve(self.scripts[number], port)


@asynccontextmanager
async def running_gateway(limits: Limits, replicas: int = 1) -> AsyncIterator[Running]:
    """A gateway in front of `replicas` scripted ones named r0, r1, ..."""
    operator = Authority("operator CA of the tests")
    front, back, inner = operator.issue("gateway"), operator.issue("replica"), operator.issue("gateway-client")

    async def serve(
        servicer: model_pb2_grpc.ModelServicer, port: int, own: Identity = back, ca: bytes = operator.pem
    ) -> Any:
        server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(lambda error: None)], options=rpc.SERVER_OPTIONS)
        model_pb2_grpc.add_ModelServicer_to_server(servicer, server)
        credentials = rpc.server_credentials(own.certificate, own.private_key, client_ca=ca)
        taken = server.add_secure_port(f"127.0.0.1:{port}", credentials)
        await server.start()
        return server, taken

    scripts = [ScriptedReplica() for _ in range(replicas)]
    started = [await serve(script, 0) for script in scripts]
    now = [0.0]
    rows = [
        ReplicaSettings(name=f"r{number}", address=f"127.0.0.1:{port}", instance=INSTANCE, epoch=EPOCH)
        for number, (_, port) in enumerate(started)
    ]
    routes = Replicas(
        rows,
        roots=operator.pem,
        identity=(inner.certificate, inner.private_key),
        limits=limits,
        clock=lambda: now[0],
    )
    admission = Admission(key=SERVICE_KEY.public_key(), audience=AUDIENCE, limit=16)
    service = GatewayService(routes, admission, limits, Telemetry("gateway", simulated=True), drain_seconds=7)
    gateway, port = await serve(service, 0, front, LINK_CA.pem)
    servers = [server for server, _ in started]
    async with AsyncExitStack() as stack:
        stack.push_async_callback(routes.close)
        stack.push_async_callback(service.stop)
        yield Running(service, routes, scripts, servers, f"127.0.0.1:{port}", operator, serve, now, rows)
        await gateway.stop(0)
        for server in servers:
            await server.stop(0)


async def read(call: Any) -> model_pb2.Down:
    down: model_pb2.Down = await asyncio.wait_for(call.read(), 10)
    assert down is not grpc.aio.EOF
    return down


async def failure(call: Any) -> StipError:
    """The error a link ended with."""

    async def to_the_end() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(to_the_end(), 10)
    return rpc.from_rpc(caught.value)


async def settled(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)
