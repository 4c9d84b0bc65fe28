"""Tiny random models, an engine over them, and real mutual TLS between a service and a small enclave."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import os
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stip_protocol.errors import StipError
from stip_protocol.rpc import SERVER_OPTIONS, ErrorInterceptor, channel, server_credentials
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import model_pb2 as wire
from stip_protocol.wire import model_pb2_grpc
from stip_server.config import EngineSettings
from stip_server.engine import Card, Ended, Form, Hidden, Logits, Output, Session, Slice, Stepped, Top
from stip_server.engines.transformers import TransformersEngine, card_for, split
from stip_server.service import ModelService

torch.set_num_threads(1)
POSITIONS = 96
CONFIGS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=211, n_embd=48, n_layer=2, n_head=4, n_positions=POSITIONS, bos_token_id=0, eos_token_id=0
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=211,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=12,
            num_key_value_heads=3,
            head_dim=8,
            max_position_embeddings=POSITIONS,
            attention_bias=True,
        )
    ),
}


@dataclass
class Plain:
    """A plain model and what it answers."""

    model: Any
    table: torch.Tensor = field(repr=False)

    @classmethod
    def make(cls, family: str, dtype: torch.dtype = torch.float32) -> Plain:
        torch.manual_seed(7)
        model = CONFIGS[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3)
        model = model.to(dtype).eval()
        return cls(model, model.get_input_embeddings().weight.detach())

    def rows(self, ids: Iterable[int]) -> bytes:
        return self.table[list(ids)].view(torch.uint8).numpy().tobytes()

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0, -1]

    @torch.inference_mode()
    def hidden(self, ids: list[int]) -> torch.Tensor:
        return self.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        out = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return out[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def pick(self, out: Hidden | Top) -> int:
        """The greedy id, as an enclave would find it."""
        if isinstance(out, Top):
            return int.from_bytes(out.indices[:4], "little")
        row = torch.frombuffer(bytearray(out.row), dtype=self.table.dtype)
        return int(self.model.get_output_embeddings()(row[None])[0].argmax())

    def prompt(self, length: int, seed: int) -> list[int]:
        return torch.randint(0, 211, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="session")
def make_plain() -> Callable[..., Plain]:
    return Plain.make


@pytest.fixture(scope="session", params=sorted(CONFIGS))
def plain(request: pytest.FixtureRequest) -> Plain:
    return Plain.make(request.param)


@pytest.fixture(scope="session")
def llama() -> Plain:
    return Plain.make("llama")


class Direct:
    """An engine called directly, its events sorted by session."""

    def __init__(self, plain: Plain, card: Card, engine: TransformersEngine) -> None:
        self.plain, self.card, self.engine = plain, card, engine
        self.steps: list[Stepped] = []
        self._boxes: dict[Session, asyncio.Queue[Output | StipError]] = {}
        self._fed: dict[Session, int] = {}

    async def pump(self) -> None:
        async for events in self.engine.steps():
            for event in events:
                if isinstance(event, Stepped):
                    self.steps.append(event)
                elif isinstance(event, Ended):
                    self._boxes[event.session].put_nowait(event.error)
                else:
                    self._boxes[event.session].put_nowait(event)

    def open(self, name: int, form: Form = Form.HIDDEN, positions: int = POSITIONS) -> Session:
        session = (1, name.to_bytes(16, "big"))
        self.engine.open(session, max_positions=positions, output=form)
        self._boxes[session], self._fed[session] = asyncio.Queue(), 0
        return session

    def feed(self, session: Session, ids: list[int], *, last: bool = True) -> None:
        self.raw(session, self.plain.rows(ids), len(ids), last=last)

    def raw(self, session: Session, rows: bytes, count: int, *, position: int | None = None, last: bool = True) -> None:
        at = self._fed[session] if position is None else position
        self.engine.feed([Slice(session, at, count, last, rows)])
        self._fed[session] = at + count

    async def next(self, session: Session) -> Output:
        event = await self._boxes[session].get()
        if isinstance(event, StipError):
            raise event
        return event

    async def generate(
        self, name: int, prompt: list[int], count: int, form: Form = Form.HIDDEN, frame: int = 1000
    ) -> list[int]:
        session = self.open(name, form)
        for start in range(0, len(prompt), frame):
            self.feed(session, prompt[start : start + frame], last=start + frame >= len(prompt))
        ids: list[int] = []
        while True:
            output = await self.next(session)
            assert output.position == len(prompt) + len(ids) - 1
            assert isinstance(output.out, Hidden | Top)
            ids.append(self.plain.pick(output.out))
            if len(ids) == count:
                break
            self.feed(session, ids[-1:])
        self.engine.close(session)
        return ids


@pytest.fixture
def run_direct() -> Callable[..., Any]:
    """`async with run_direct(plain, **engine settings) as direct`."""

    @contextlib.asynccontextmanager
    async def run(plain: Plain, **settings: Any) -> AsyncIterator[Direct]:
        chosen = EngineSettings(**settings)
        base, head = split(plain.model)
        card = card_for(base, head, chosen)
        direct = Direct(plain, card, TransformersEngine(base, head, card, chosen))
        pump = asyncio.create_task(direct.pump())
        try:
            yield direct
        finally:
            await direct.engine.stop()
            await pump

    return run


@dataclass(frozen=True)
class Pki:
    """PEM of an operator's CA, and (certificate, key) of a server and of a client under it."""

    ca: bytes
    server: tuple[bytes, bytes]
    client: tuple[bytes, bytes]


def _issue(subject: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None) -> Any:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer[0].subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(issuer[1] if issuer else key, hashes.SHA256())
    )
    return certificate, key


def _pem(pair: Any) -> tuple[bytes, bytes]:
    certificate, key = pair
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.fixture(scope="session")
def pki() -> Pki:
    ca = _issue("operator", None)
    return Pki(_pem(ca)[0], _pem(_issue("server", ca)), _pem(_issue("gateway", ca)))


class Enclave:
    """One link, as an enclave drives it: sessions by handle, replies sorted by handle."""

    def __init__(self, plain: Plain, card: wire.Card, call: Any) -> None:
        self.plain, self.card, self.call = plain, card, call
        self.drained = asyncio.Event()
        self.load = 0
        self._boxes: dict[bytes, asyncio.Queue[Any]] = {}
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for down in self.call:
            self.load = down.load
            body = down.WhichOneof("body")
            if body == "drain":
                self.drained.set()
            elif body == "fed":
                for index, piece in enumerate(down.fed.slices):
                    self.box(piece.session).put_nowait((piece.position, self._row(down.fed, index), down.fed))
            else:
                message = getattr(down, body)
                self.box(message.session).put_nowait(message)

    def _row(self, fed: wire.Fed, index: int) -> Hidden | Top | Logits:
        form = fed.WhichOneof("out")
        if form == "top":
            count, size = fed.top.count, self.plain.table.element_size()
            return Top(
                count,
                fed.top.indices[index * count * 4 : (index + 1) * count * 4],
                fed.top.values[index * count * size : (index + 1) * count * size],
                fed.top.log_sum_exp[index * 4 : index * 4 + 4],
            )
        rows = getattr(fed, form)
        size = len(rows) // len(fed.slices)
        row = rows[index * size : (index + 1) * size]
        return Hidden(row) if form == "hidden" else Logits(row)

    def box(self, handle: bytes) -> asyncio.Queue[Any]:
        return self._boxes.setdefault(handle, asyncio.Queue())

    async def next(self, handle: bytes) -> Any:
        return await self.box(handle).get()

    async def send(self, **body: Any) -> None:
        # gRPC takes one write of a stream at a time.
        async with self._writing:
            await self.call.write(wire.Up(**body))

    async def open(self, handle: bytes, **changes: Any) -> None:
        fields = {"output": self.card.outputs[0], "max_positions": POSITIONS, "request_id": handle.hex(), **changes}
        await self.send(open=wire.Open(session=handle, **fields))

    async def feed(self, handle: bytes, position: int, ids: list[int], *, last: bool = True) -> None:
        piece = wire.Slice(session=handle, position=position, count=len(ids), last=last)
        await self.send(feed=wire.Feed(slices=[piece], rows=self.plain.rows(ids)))

    async def generate(self, prompt: list[int], count: int, **changes: Any) -> list[int]:
        handle = os.urandom(16)
        await self.open(handle, **changes)
        await self.feed(handle, 0, prompt)
        assert isinstance(await self.next(handle), wire.Opened)
        ids: list[int] = []
        while len(ids) < count:
            if ids:
                await self.feed(handle, len(prompt) + len(ids) - 1, ids[-1:])
            position, out, _ = await self.next(handle)
            assert position == len(prompt) + len(ids) - 1
            ids.append(self.plain.pick(out))
        await self.send(close=wire.Close(session=handle))
        return ids

    async def ended(self) -> grpc.aio.AioRpcError:
        """The error that the stream ends with."""
        try:
            await self._reader
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError("the stream ended without an error")

    async def leave(self) -> None:
        self.call.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await self._reader


@dataclass
class Service:
    """A service on a real socket."""

    plain: Plain
    pki: Pki
    address: str
    service: ModelService
    telemetry: Telemetry
    card: Card
    _enclaves: list[Enclave] = field(default_factory=list)
    _channels: list[grpc.aio.Channel] = field(default_factory=list)

    def unlimited_stub(self) -> Any:
        """A client that does not check the size of what it sends."""
        certificate, key = self.pki.client
        credentials = grpc.ssl_channel_credentials(self.pki.ca, private_key=key, certificate_chain=certificate)
        made = grpc.aio.secure_channel(self.address, credentials, options=[("grpc.max_send_message_length", -1)])
        self._channels.append(made)
        return model_pb2_grpc.ModelStub(made)  # type: ignore[no-untyped-call]

    def stub(self, *, identity: bool = True) -> Any:
        made = channel(
            self.address,
            roots=self.pki.ca,
            identity=self.pki.client if identity else None,
            server_name="localhost",
        )
        self._channels.append(made)
        return model_pb2_grpc.ModelStub(made)  # type: ignore[no-untyped-call]

    def reference(self) -> wire.InstanceRef:
        return wire.InstanceRef(instance=self.card.instance, epoch=self.card.epoch)

    async def link(self, **changes: str) -> Enclave:
        stub = self.stub()
        card = await stub.Describe(self.reference())
        metadata = {"stip-instance": card.instance, "stip-epoch": str(card.epoch), **changes}
        enclave = Enclave(self.plain, card, stub.Link(metadata=tuple(metadata.items())))
        self._enclaves.append(enclave)
        return enclave

    def metric(self, name: str, **labels: str) -> float:
        return self.telemetry.registry.get_sample_value(name, labels) or 0.0

    async def quiet(self) -> None:
        """Until no session is open."""
        while self.service.sessions:  # noqa: ASYNC110 - the state is the service's own
            await asyncio.sleep(0.002)

    async def leave(self) -> None:
        for enclave in self._enclaves:
            await enclave.leave()
        for made in self._channels:
            await made.close()


@pytest.fixture
def run_service(pki: Pki) -> Callable[..., Any]:
    """`async with run_service(plain, **engine settings) as service`."""

    @contextlib.asynccontextmanager
    async def run(plain: Plain, *, form: Form = Form.HIDDEN, **settings: Any) -> AsyncIterator[Service]:
        chosen = EngineSettings(**settings)
        base, head = split(plain.model)
        head = head if form is Form.TOP else None
        card = card_for(base, head, chosen)
        if form is Form.TOP:
            card = Card(**{**vars(card), "forms": (Form.TOP,)})
        engine = TransformersEngine(base, head, card, chosen)
        telemetry = Telemetry("server", simulated=False)
        service = ModelService(engine, telemetry, name="replica-1", drain_seconds=5)
        server = grpc.aio.server(
            interceptors=[ErrorInterceptor(lambda error: telemetry.refused(getattr(error, "code", "internal")))],
            options=SERVER_OPTIONS,
        )
        service.register(server)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(*pki.server, client_ca=pki.ca))
        await server.start()
        pump = asyncio.create_task(service.pump())
        running = Service(plain, pki, f"127.0.0.1:{port}", service, telemetry, card)
        try:
            yield running
        finally:
            await running.leave()
            await server.stop(grace=0)
            await engine.stop()
            await pump

    return run
