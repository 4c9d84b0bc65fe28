"""Tiny random models, an engine over them, and real mutual TLS between a service and a small enclave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stip_protocol.errors import StipError
from stip_protocol.rpc import SERVER_OPTIONS, ErrorInterceptor, server_credentials
from stip_protocol.telemetry import Telemetry
from stip_server.config import TransformersSettings
from stip_server.engine import Card, Ended, Engine, Form, Hidden, Logits, Output, Session, Slice, Stepped, Top
from stip_server.engines.transformers import TransformersEngine, card_for, split
from stip_server.service import ModelService
from tests.server.links import Pki, Service

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
    def picks(self, out: Hidden | Top | Logits) -> list[int]:
        """The greedy id behind each output, as an enclave would find it."""
        if isinstance(out, Top):
            ids = torch.frombuffer(bytearray(out.indices), dtype=torch.uint32)
            return ids.view(-1, out.count)[:, 0].tolist()
        rows = torch.frombuffer(bytearray(out.rows), dtype=self.table.dtype)
        if isinstance(out, Hidden):
            rows = self.model.get_output_embeddings()(rows.view(-1, self.table.shape[1]))
        return rows.view(-1, len(self.table)).argmax(-1).tolist()

    def pick(self, out: Hidden | Top | Logits) -> int:
        """The greedy id of a single output."""
        (picked,) = self.picks(out)
        return picked

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
        self.engine.feed([Slice(session, at, count, int(last), rows)])
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
        chosen = TransformersSettings(**settings)
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


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki.make()


@pytest.fixture
def run_service(serve_engine: Callable[..., Any]) -> Callable[..., Any]:
    """`async with run_service(plain, **engine settings) as service`."""

    def run(plain: Plain, *, form: Form = Form.HIDDEN, **settings: Any) -> Any:
        chosen = TransformersSettings(**settings)
        base, head = split(plain.model)
        head = None if form is Form.HIDDEN else head
        card = replace(card_for(base, head, chosen), forms=(form,))
        return serve_engine(TransformersEngine(base, head, card, chosen), plain)

    return run


@pytest.fixture
def serve_engine(pki: Pki) -> Callable[..., Any]:
    """`async with serve_engine(engine, the plain model behind it) as service`."""

    @contextlib.asynccontextmanager
    async def run(engine: Engine, plain: Any) -> AsyncIterator[Service]:
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
        running = Service(plain, pki, f"127.0.0.1:{port}", service, telemetry, engine.card)
        try:
            yield running
        finally:
            await running.leave()
            await server.stop(grace=0)
            await engine.stop()
            await pump

    return run
