"""Sessions of an enclave on scripted replicas over real mutual TLS: `Bench`, and `Talk`, which drives one session."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from stip_enclave.config import Limits
from stip_enclave.instances import Instance
from stip_enclave.lease import LeaseAccount
from stip_enclave.meters import Meters
from stip_enclave.release import HeldLease
from stip_enclave.sampling import Sampler, Sampling
from stip_enclave.session import Session
from stip_enclave.turns import Turn, TurnRequest
from stip_protocol import rpc
from stip_protocol.lease import Lease
from stip_protocol.release import Heartbeat
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import enclave_pb2, model_pb2_grpc
from stip_stack.pki import Authority
from tests.enclave.replica import Front, ScriptedReplica
from tests.enclave.toy import Toy, make_toy

AUDIENCE = "gateway.test"


@dataclass
class Unbounded:
    """Stands for a key service that renews whatever is asked, once `gate` lets it."""

    refusals: list[Exception] = field(default_factory=list)
    gate: asyncio.Event | None = None
    grows: int = 1000
    heartbeats: list[Heartbeat] = field(default_factory=list)

    async def renew(self, held: HeldLease, heartbeat: Heartbeat) -> HeldLease:
        self.heartbeats.append(heartbeat)
        if self.gate is not None:
            await self.gate.wait()
        if self.refusals:
            raise self.refusals.pop(0)
        tokens = max(held.lease.tokens, heartbeat.fed + min(heartbeat.wanted, self.grows))
        lease = held.lease.model_copy(update={"serial": held.lease.serial + 1, "tokens": tokens})
        return HeldLease(f"lease {lease.serial}".encode(), lease, b"")


def held_lease(toy: Toy | None = None, *, tokens: int = 10_000, expires: int = 2**39) -> HeldLease:
    lease = Lease(
        handle=secrets.token_bytes(16),
        serial=0,
        audience=AUDIENCE,
        instance=toy.manifest.instance if toy else "0" * 32,
        epoch=2,
        manifest_digest=toy.digest if toy else bytes(32),
        link_key=bytes(32),
        not_before=0,
        expires=expires,
        tokens=tokens,
        audit_head=bytes(32),
    )
    return HeldLease(b"lease 0", lease, b"")


@dataclass
class Talk:
    """Drives one `Session` as the service does."""

    session: Session

    def begin(
        self, ids: list[int], *, max_tokens: int = 8, stop_ids: tuple[int, ...] = (), drafts: int = 0, **sampling: Any
    ) -> Turn:
        turn = Turn(Sampler(Sampling(**sampling)), frozenset(stop_ids), max_tokens, time.perf_counter(), drafts)
        self.session.begin(TurnRequest(np.array(ids, np.uint32), turn))
        return turn

    async def frame(self) -> enclave_pb2.EnclaveFrame:
        frame = await asyncio.wait_for(self.session.frames.get(), 10)
        assert frame is not None
        self.session.taken()
        return frame

    async def rest(self) -> tuple[list[int], int]:
        """(tokens, kind) to the end of the turn. Raises where the session fails instead."""
        tokens = []
        while True:
            frame = await self.frame()
            if frame.HasField("failed"):
                raise AssertionError(f"failed: {frame.failed.code}: {frame.failed.message}")
            if frame.step.kind:
                return tokens, frame.step.kind
            tokens.append(frame.step.id)

    async def failure(self) -> str:
        """The code the session fails with, past the tokens before it."""
        while True:
            frame = await self.frame()
            if frame.HasField("failed"):
                return frame.failed.code
            assert not frame.step.kind, f"the turn ended with kind {frame.step.kind}"


@dataclass
class Bench:
    """A toy behind scripted replicas, opened by its grant; sessions on it."""

    toy: Toy
    front: Front
    instance: Instance
    limits: Limits
    telemetry: Telemetry
    renewing: Unbounded = field(default_factory=Unbounded)

    @property
    def replica(self) -> ScriptedReplica:
        """The first one."""
        return self.front.replicas[0]

    def seated(self) -> ScriptedReplica:
        """The replica that holds sessions, where only one does."""
        (replica,) = [replica for replica in self.front.replicas if replica.sessions]
        return replica

    def account(self, *, tokens: int = 10_000, heartbeat_tokens: int = 10_000, chunk: int = 1000) -> LeaseAccount:
        held = held_lease(self.toy, tokens=tokens)
        return LeaseAccount(held, self.renewing, heartbeat_tokens=heartbeat_tokens, chunk=chunk)

    async def session(self, account: LeaseAccount | None = None, *, max_positions: int = 0) -> Talk:
        session = Session(self.instance, account or self.account(), self.limits, Meters.of(self.telemetry))
        await session.start(secrets.token_hex(16), max_positions)
        return Talk(session)


async def until(true: Callable[[], bool]) -> None:
    """Wait for something that other tasks bring about."""
    for _ in range(5000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError


async def stranding(talk: Talk) -> None:
    """Wait until a session has noticed that its seat is lost."""
    await until(lambda: talk.session._decoding.travel.seat is None)


async def make_bench(
    stack: contextlib.AsyncExitStack,
    folder: Path,
    *,
    limits: Limits | None = None,
    replicas: tuple[str, ...] = ("",),
    max_outputs: int = 8,
    **toy_options: Any,
) -> Bench:
    """`replicas`: their names; one without a name stands alone, with no gateway before it."""
    toy = make_toy(folder / secrets.token_hex(4), **toy_options)
    operator = Authority("operator CA of the tests")
    front = Front([ScriptedReplica(toy, name, max_outputs=max_outputs) for name in replicas])
    address = await start_server(
        stack, lambda server: model_pb2_grpc.add_ModelServicer_to_server(front, server), operator
    )
    client = operator.issue("enclave")

    def connect(certificate: bytes) -> grpc.aio.Channel:
        return rpc.channel(address, roots=operator.pem, identity=(client.certificate, client.private_key))

    limits = limits or Limits()
    telemetry = Telemetry("enclave", simulated=True)
    instance = Instance(toy.folder, toy.developer.public_key(), connect, limits, telemetry)
    stack.push_async_callback(instance.close)
    await instance.load(toy.grant)
    return Bench(toy, front, instance, limits, telemetry)


async def start_server(
    stack: contextlib.AsyncExitStack,
    register: Callable[[Any], None],
    operator: Authority,
    *,
    client_ca: bytes | None = None,
) -> str:
    """A gRPC server with mutual TLS on loopback; returns its address."""
    return (await serving(stack, register, operator, client_ca=client_ca))[1]


async def serving(
    stack: contextlib.AsyncExitStack,
    register: Callable[[Any], None],
    operator: Authority,
    *,
    client_ca: bytes | None = None,
) -> tuple[grpc.aio.Server, str]:
    """As `start_server`, and the server itself."""
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(lambda error: None)], options=rpc.SERVER_OPTIONS)
    register(server)
    identity = operator.issue("server")
    credentials = rpc.server_credentials(
        identity.certificate, identity.private_key, client_ca=client_ca or operator.pem
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return server, f"127.0.0.1:{port}"
