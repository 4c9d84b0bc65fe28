"""Scenes: a key service on a real socket, a person with an instance and an enclave, and a neighbour to be served."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from click.testing import CliRunner

from stip_keyservice.cli import main
from stip_keyservice.service import auditlog, users
from stip_keyservice.service.auditlog import AuditLog
from stip_protocol import canonical, rpc
from stip_protocol.attestation.collateral_source import CollateralSettings, CollateralSource
from stip_protocol.documents import Signed
from stip_protocol.errors import StipError
from stip_protocol.lease import Lease
from stip_protocol.release import Bundle, Claims, Heartbeat, Watch, sign_heartbeat, sign_watch
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc
from tests.keyservice.conftest import Enclave, MadeInstance, Person, World, cell
from tests.refusals.forge import Forge
from tests.refusals.table import Act, Case

MINUTE = 61
"""Seconds between cases: what strangers are refused in one minute does not fold what they are refused in the next."""
BUDGET = 1_000_000
TOKENS = 100
"""Tokens that claims ask for."""

LITTLE = (cell("server", "A", token_top1=0.1),)
"""What an audit of the neighbour's instance found."""
Another = Callable[..., Awaitable[World]]


class Service:
    """A key service with a neighbour who has nothing to do with any of it."""

    def __init__(self, world: World, forge: Forge, stranger: Forge, another: Another, stack: AsyncExitStack) -> None:
        """`stranger` holds the keys of a simulated platform with a root of its own; `another` opens a service: of the
        same home (`replica`) or of its own. What is opened is closed with `stack`."""
        self.world, self.forge, self.stranger = world, forge, stranger
        self.another, self._stack = another, stack
        self.audit = AuditLog(world.store, world.home.service)
        self._numbers = itertools.count()
        self._resident: tuple[Person, MadeInstance] | None = None
        self._neighbour = world.person("neighbour", budget=1_000_000_000)
        self._instance = world.instance(owner=self._neighbour, measured=LITTLE)

    def scene(self, *, own: bool) -> Scene:
        """A new one, a minute later; with `own`, Alice and her instance are new as well.

        Nor is it before the machine's own time, by which commands beside the service date what they do.
        """
        self.world.clock.now = MINUTE + max(self.world.clock.now, int(time.time()))
        number = next(self._numbers)
        if own or self._resident is None:
            alice = self.world.person(f"alice-{number}", budget=BUDGET)
            self._resident = alice, self.world.instance(owner=alice)
        return Scene(self, number, *self._resident)

    async def judge(self, case: Case, *, own: bool) -> None:
        """Do what a case does: it is refused, recorded, counted, costs nobody anything, and disturbs nobody."""
        scene = self.scene(own=own)
        try:
            act = await case.arrange(scene)
            asked = scene.asked
            spent, length = self.spent(), self.audit.length()
            counted, decisions = count(asked, case.code), decided(asked, case)
            refusal = await refused(act())
            assert refusal.code == case.code, refusal.message
            assert case.says in refusal.message
            assert self.spent() == spent, "something was debited"
            assert count(asked, case.code) == counted + case.counted
            assert decided(asked, case) == decisions + (case.event is not None)
            entries = self.audit.latest(self.audit.length() - length)
            expected = [] if case.event is None else [(case.event, case.code, None)]
            assert [(entry.event, entry.code, entry.tokens) for entry in entries] == expected
            auditlog.verify(self.world.store, self.world.home.service.public_key())
        finally:
            scene.repair()
        await self.serve_neighbour()

    async def serve_neighbour(self) -> None:
        """A genuine enclave of somebody else gets what it asks for."""
        enclave = Enclave(self.world.platform)
        before = self.world.user(self._neighbour).spent
        delegation = self._neighbour.delegate(enclave, self._instance.id, expires=self.world.clock.now + 3600)
        bundle, _ = await self.world.release(enclave, delegation, self._instance.id)
        assert isinstance(bundle, Bundle)
        assert self.world.lease(bundle.lease).tokens == TOKENS
        assert self.world.user(self._neighbour).spent - before == TOKENS

    def spent(self) -> int:
        """Tokens debited from anybody."""
        with self.world.store.read() as db:
            return sum(user.spent for user in users.everyone(db, removed=True))

    async def channel(self, source: str | None = None) -> grpc.aio.Channel:
        """A connection of its own: another source port and TLS session; with `source`, from that address."""
        port = self.world.port
        if source is not None:
            port = await self._stack.enter_async_context(forwarded(port, source))
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", "localhost")]
        made = grpc.aio.secure_channel(
            f"127.0.0.1:{port}",
            grpc.ssl_channel_credentials(self.world.home.tls_ca.pem),
            options=[*rpc.CHANNEL_OPTIONS, *options],
        )
        return await self._stack.enter_async_context(made)

    async def stub(self, source: str | None = None) -> Any:
        return keyservice_pb2_grpc.KeyServiceStub(await self.channel(source))


def count(world: World, code: str) -> float:
    """What the metric of a process says of a code."""
    return world.telemetry.registry.get_sample_value("stip_refusals_total", {"code": code}) or 0.0


def decided(world: World, case: Case) -> float:
    """What a process counted of decisions like the one that a case ends with."""
    labels = {"event": str(case.event), "code": case.code}
    return world.telemetry.registry.get_sample_value("stip_decisions_total", labels) or 0.0


@asynccontextmanager
async def forwarded(port: int, source: str) -> AsyncIterator[int]:
    """A port whose connections reach `port` from another address of this machine."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def refused(call: Awaitable[Any]) -> StipError:
    """The error that a call is refused with, as the peer reads it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return rpc.from_rpc(caught.value)


class Scene:
    """Alice, with an instance of her own and an enclave: everything is in order."""

    def __init__(self, service: Service, number: int, alice: Person, instance: MadeInstance) -> None:
        self.service, self.world = service, service.world
        self.forge, self.stranger_forge = service.forge, service.stranger
        self.number = number
        self.alice, self.instance = alice, instance
        self.enclave = self.new_enclave()
        self._repairs: list[Callable[[], None]] = []
        self.asked = self.world
        """Of which process the refusal is."""

    @property
    def now(self) -> int:
        return self.world.clock.now

    def person(self, name: str, *, budget: int = BUDGET) -> Person:
        return self.world.person(f"{name}-{self.number}", budget=budget)

    def new_enclave(self, **options: Any) -> Enclave:
        return Enclave(self.world.platform, **options)

    def operator(self, *arguments: str) -> Any:
        """What the operator does by a command, on the same home; returns its document."""
        done = CliRunner().invoke(main, [*arguments, "--home", str(self.world.home.path), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    async def replica(
        self, *, ahead: int = 0, collateral: Callable[[bytes], bytes] | None = None, **rules: Any
    ) -> World:
        """Another process of the same service, whose clock is `ahead`, with `rules` in its policy. It is asked."""
        self.asked = await self.service.another(replica=self.world, ahead=ahead, rules=rules, collateral=collateral)
        return self.asked

    def collateral_source(self, *endpoints: str) -> Callable[[bytes], bytes]:
        """What a key service with collateral of its own judges by: from a PCCS, or from an empty cache."""
        table = {
            "cache": self.world.folder / f"collateral-{self.number}",
            "endpoints": [{"url": url} for url in endpoints],
        }
        made = CollateralSource(
            CollateralSettings.model_validate(table), self.world.platform.root_der, clock=lambda: float(self.now)
        )
        self.finally_(made.close)
        return made.for_quote

    def finally_(self, repair: Callable[[], None]) -> None:
        """Done after the case, so that the neighbour can be served."""
        self._repairs.append(repair)

    def repair(self) -> None:
        while self._repairs:
            self._repairs.pop()()

    def delegate(
        self, person: Person | None = None, *, enclave: Enclave | None = None, instance: str | None = None, **other: Any
    ) -> bytes:
        """Alice's word for her enclave and instance, unless told otherwise."""
        fields = {"expires": self.now + 3600} | other
        return (person or self.alice).delegate(enclave or self.enclave, instance or self.instance.id, **fields)

    async def request(
        self,
        *,
        enclave: Enclave | None = None,
        delegation: bytes | None = None,
        instance: MadeInstance | None = None,
        person: Person | None = None,
        **claims: Any,
    ) -> keyservice_pb2.ReleaseRequest:
        """A release request that would be granted, with what is given instead."""
        made, word, enclave = await self.claims(
            enclave=enclave, delegation=delegation, instance=instance, person=person, **claims
        )
        return enclave.request(made, word)

    async def claims(
        self,
        *,
        enclave: Enclave | None = None,
        delegation: bytes | None = None,
        instance: MadeInstance | None = None,
        person: Person | None = None,
        **other: Any,
    ) -> tuple[Claims, bytes, Enclave]:
        enclave, wanted = enclave or self.enclave, (instance or self.instance).id
        word = self.delegate(person, enclave=enclave, instance=wanted) if delegation is None else delegation
        challenge = await self.world.challenge()
        return enclave.claims(challenge, word, wanted, **other), word, enclave

    def asking(self, request: keyservice_pb2.ReleaseRequest, *, stub: Any = None) -> Act:
        return lambda: (stub or self.world.stub).Release(request)

    async def lease(self, *, person: Person | None = None, enclave: Enclave | None = None, **claims: Any) -> Lease:
        """A genuine one."""
        enclave = enclave or self.enclave
        instance = claims.pop("instance", self.instance)
        word = self.delegate(person, enclave=enclave, instance=instance.id, **claims.pop("word", {}))
        bundle, _ = await self.world.release(enclave, word, instance.id, **claims)
        assert isinstance(bundle, Bundle)
        return self.world.lease(bundle.lease)

    def heartbeat(self, lease: Lease, *, signer: Any = None, **other: Any) -> keyservice_pb2.RenewRequest:
        """A genuine one over a lease, with what is given instead."""
        fields = {"handle": lease.handle, "serial": lease.serial, "nonce": bytes(32), "fed": 0, "wanted": 10}
        beat = Heartbeat.model_validate(fields | other)
        return keyservice_pb2.RenewRequest(
            heartbeat=beat.to_bytes(), signature=sign_heartbeat(beat, (signer or self.enclave).link)
        )

    def renewing(self, request: keyservice_pb2.RenewRequest, *, stub: Any = None) -> Act:
        return lambda: (stub or self.world.stub).Renew(request)

    async def renewed(self, request: keyservice_pb2.RenewRequest) -> Any:
        return await self.world.stub.Renew(request)

    async def watch(
        self, *, signer: Enclave | None = None, link_key: bytes | None = None, **other: Any
    ) -> keyservice_pb2.WatchRequest:
        """A genuine one over the enclave's link key, with what is given instead."""
        fields = {
            "nonce": (await self.world.challenge()).nonce,
            "link_key": hashlib.sha256(self.enclave.link_spki).digest(),
        }
        made = Watch.model_validate(fields | other)
        return keyservice_pb2.WatchRequest(
            watch=made.to_bytes(),
            signature=sign_watch(made, (signer or self.enclave).link),
            link_key=link_key or self.enclave.link_spki,
        )

    def watching(self, request: keyservice_pb2.WatchRequest, *, stub: Any = None) -> Act:
        return lambda: (stub or self.world.stub).Watch(request).read()


def altered(claims: Claims, field: str, value: Any) -> bytes:
    """Canonical claims with another value in one field, whether that is a value of the field or not."""
    raw = canonical.decode(claims.to_bytes(), what="claims")
    return canonical.encode(raw | {field: value})


def resigned(document: Any, person: Person, **fields: Any) -> bytes:
    """A signed document with other raw values in its fields, signed by its own signer."""
    signed = Signed.from_bytes(document)
    raw = canonical.encode(canonical.decode(signed.payload, what="document") | fields)
    context = str(canonical.decode(signed.payload, what="document")["ctx"])
    return Signed(payload=raw, signature=person.key.sign(context.encode() + b"\x00" + raw)).to_bytes()
