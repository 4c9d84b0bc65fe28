"""Two worlds for the enclave.

`Toy`: an instance of random tables, and a scripted replica over real mutual TLS whose whole model is "the final
hidden state is the last row": what an enclave should generate is then known, and what a replica says can be bent.

`World`: the real key service, gateway and model server with protected tiny models, a real enclave service, and
clients that speak to it over its RA-TLS certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import shutil
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import ml_dtypes
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stip_enclave.accounts import Accounts
from stip_enclave.config import EnclaveSettings, Limits
from stip_enclave.identity import EnclaveIdentity
from stip_enclave.instances import Instance, Instances
from stip_enclave.lease import LeaseAccount
from stip_enclave.release import HeldLease, ReleaseClient
from stip_enclave.sampling import Sampler, Sampling
from stip_enclave.service import EnclaveService
from stip_enclave.session import Meters, Session
from stip_enclave.turns import Turn, TurnRequest
from stip_gateway import config as gateway_config
from stip_gateway.admission import Admission
from stip_gateway.replicas import Replicas
from stip_gateway.service import GatewayService
from stip_keyservice.home import Home
from stip_keyservice.protect.instance import protect
from stip_keyservice.service import config as keyservice_config
from stip_keyservice.service import instances as registered
from stip_keyservice.service import users
from stip_keyservice.service.issuer import Issuer
from stip_keyservice.service.policy import Policy
from stip_keyservice.service.server import KeyServiceServicer
from stip_keyservice.service.store import Store
from stip_protocol import rpc
from stip_protocol.documents import Signed
from stip_protocol.keys import vocabulary_key
from stip_protocol.lease import Lease
from stip_protocol.manifest import Manifest, file_digest
from stip_protocol.release import Delegation, Grant, Heartbeat
from stip_protocol.sealed import SealedWriter
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import (
    enclave_pb2,
    enclave_pb2_grpc,
    keyservice_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from stip_server.config import EngineSettings
from stip_server.engines.transformers import TransformersEngine, card_for, load
from stip_server.service import ModelService
from stip_stack.pki import Authority
from stip_stack.tee import SimulatedPlatform
from tests.server import models

torch.set_num_threads(1)
MEASUREMENT = hashlib.sha256(b"the enclave under test").digest()
AUDIENCE = "gateway.test"
SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
NUMPY = {"float32": "<f4", "float64": "<f8", "float16": "<f2", "bfloat16": ml_dtypes.bfloat16}


def safetensors_file(name: str, array: np.ndarray, dtype: str) -> bytes:
    data = np.ascontiguousarray(array).tobytes()
    header = json.dumps(
        {name: {"dtype": SAFETENSORS[dtype], "shape": list(array.shape), "data_offsets": [0, len(data)]}}
    ).encode()
    return len(header).to_bytes(8, "little") + header + data


# -- the toy ------------------------------------------------------------------------------------------------------


@dataclass
class Toy:
    """An instance directory in its real form, with what is in it known to the test."""

    folder: Path
    manifest: Manifest
    digest: bytes
    grant: Grant
    developer: Ed25519PrivateKey
    arrays: dict[str, np.ndarray]

    @property
    def embedding(self) -> np.ndarray:
        return self.arrays["embedding"]

    def logits(self, row: np.ndarray) -> np.ndarray:
        """What the toy's model says after a row: float32, true order."""
        logits = self.arrays["head"].astype(np.float32) @ row.astype(np.float32)
        return logits + self.arrays["head_bias"].astype(np.float32) if "head_bias" in self.arrays else logits

    def generate(self, prompt: list[int], count: int, **sampling: Any) -> list[int]:
        sampler, out, last = Sampler(Sampling(**sampling)), [], prompt[-1]
        for step in range(count):
            last = sampler.pick(self.logits(self.embedding[last]), step)
            out.append(last)
        return out


def make_toy(
    folder: Path,
    *,
    preset: str = "hardened",
    dtype: str = "float32",
    vocabulary: int = 101,
    width: int = 12,
    max_positions: int = 64,
    tables: tuple[str, ...] | None = None,
    chunk_bytes: int = 512,
    **fields: Any,
) -> Toy:
    """`fields` of the manifest."""
    generator = np.random.default_rng(5)
    shapes = {
        "embedding": (vocabulary, width),
        "positions": (max_positions, width),
        "head": (vocabulary, width),
        "head_bias": (vocabulary,),
    }
    names = tables or (("embedding", "head") if preset == "hardened" else ("embedding",))
    arrays = {name: generator.normal(size=shapes[name]).astype(NUMPY[dtype]) for name in shapes}
    developer, part_key = Ed25519PrivateKey.generate(), secrets.token_bytes(32)
    instance = secrets.token_hex(16)
    (folder / "enclave").mkdir(parents=True)
    for name in names:
        with SealedWriter(
            folder / "enclave" / f"{name}.sealed",
            key=part_key,
            instance=instance,
            epoch=2,
            preset=preset,
            chunk_bytes=chunk_bytes,
        ) as writer:
            writer.write(safetensors_file(name, arrays[name], dtype))
    manifest = Manifest.model_validate(
        {
            "instance": instance,
            "epoch": 2,
            "preset": preset,
            "dtype": dtype,
            "width": width,
            "vocabulary": vocabulary,
            "max_positions": max_positions,
            "output": "hidden" if preset == "hardened" else "top",
            "server": {},
            "enclave": {path.name: file_digest(path) for path in (folder / "enclave").iterdir()},
            "certificate": {},
            **fields,
        }
    )
    digest = manifest.write(folder / "manifest.json", developer)
    grant = Grant(
        instance=instance,
        epoch=2,
        preset=preset,
        manifest_digest=digest,
        part_key=part_key,
        vocabulary_seed=secrets.token_bytes(32) if preset == "paper" else None,
    )
    return Toy(folder, manifest, digest, grant, developer, {n: arrays[n] for n in (*names, "head")})


Tamper = Callable[[model_pb2.Down], list[model_pb2.Down]]


class ScriptedReplica(model_pb2_grpc.ModelServicer):
    """Answers with the toy's model; `tamper` bends what it says, `hold` keeps outputs back."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.card = model_pb2.Card(
            version=1,
            instance=toy.manifest.instance,
            epoch=toy.manifest.epoch,
            manifest_digest=toy.digest,
            preset=toy.manifest.preset,
            dtype=toy.manifest.dtype,
            width=toy.manifest.width,
            vocabulary=0 if toy.manifest.output == "hidden" else toy.manifest.vocabulary,
            max_positions=toy.manifest.max_positions,
            max_sessions=32,
            max_rows=5,
            outputs=[model_pb2.OUTPUT_HIDDEN if toy.manifest.output == "hidden" else model_pb2.OUTPUT_TOP],
        )
        self.tamper: Tamper = lambda down: [down]
        self.seen: list[model_pb2.Up] = []
        self.opened: list[bytes] = []
        self.links = 0
        self.fed, self.closed = asyncio.Event(), asyncio.Event()
        self.hold: asyncio.Event | None = None
        self._last: dict[bytes, np.ndarray] = {}
        self._break = asyncio.Event()

    def break_links(self) -> None:
        self._break.set()
        self._break = asyncio.Event()

    @property
    def feeds(self) -> list[model_pb2.Feed]:
        return [up.feed for up in self.seen if up.HasField("feed")]

    async def Describe(self, request: Any, context: Any) -> model_pb2.Card:  # noqa: N802
        return self.card

    async def Link(self, requests: Any, context: Any) -> AsyncIterator[model_pb2.Down]:  # noqa: N802
        self.links += 1
        downs: asyncio.Queue[model_pb2.Down | None] = asyncio.Queue()
        broken = self._break

        async def read() -> None:
            async for up in requests:
                self.seen.append(up)
                (self.fed if up.HasField("feed") else self.closed if up.HasField("close") else asyncio.Event()).set()
                for down in self._answers(up):
                    if self.hold is not None and down.HasField("fed"):
                        await self.hold.wait()
                    for bent in self.tamper(down):
                        downs.put_nowait(bent)
            downs.put_nowait(None)

        async def watch() -> None:
            await broken.wait()
            downs.put_nowait(None)

        tasks = [asyncio.create_task(read()), asyncio.create_task(watch())]
        try:
            while (down := await downs.get()) is not None:
                yield down
        finally:
            for task in tasks:
                task.cancel()

    def _answers(self, up: model_pb2.Up) -> list[model_pb2.Down]:
        if up.HasField("open"):
            self.opened.append(up.open.session)
            return [model_pb2.Down(opened=model_pb2.Opened(session=up.open.session))]
        if up.HasField("recall"):
            part = model_pb2.Slice(session=up.recall.session, position=up.recall.position, count=1)
            row = self._server_logits(self._last[up.recall.session])
            return [model_pb2.Down(fed=model_pb2.Fed(slices=[part], logits=row.tobytes()))]
        if not up.HasField("feed"):
            return []
        manifest = self.toy.manifest
        rows = np.frombuffer(up.feed.rows, NUMPY[manifest.dtype]).reshape(-1, manifest.width)
        slices, outputs, at = [], [], 0
        for part in up.feed.slices:
            at += part.count
            if part.last:
                self._last[part.session] = rows[at - 1]
                outputs.append(rows[at - 1])
                position = part.position + part.count - 1
                slices.append(model_pb2.Slice(session=part.session, position=position, count=1))
        if not slices:
            return []
        fed = model_pb2.Fed(slices=slices, compute_us=50, queue_us=10)
        if manifest.output == "hidden":
            fed.hidden = np.stack(outputs).tobytes()
        else:
            fed.top.CopyFrom(self._top(outputs))
        return [model_pb2.Down(fed=fed)]

    def _server_logits(self, row: np.ndarray) -> np.ndarray:
        seed = self.toy.grant.vocabulary_seed
        assert seed is not None
        order = vocabulary_key(seed, self.toy.manifest.vocabulary).index
        return self.toy.logits(row)[order].astype(NUMPY[self.toy.manifest.dtype])

    def _top(self, rows: list[np.ndarray]) -> model_pb2.Top:
        logits = np.stack([self._server_logits(row) for row in rows])
        count = min(64, logits.shape[1])
        indices = np.argsort(-logits.astype(np.float64), axis=1)[:, :count]
        lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
        return model_pb2.Top(
            count=count,
            indices=indices.astype("<u4").tobytes(),
            values=np.take_along_axis(logits, indices, axis=1).tobytes(),
            log_sum_exp=lse.astype("<f4").tobytes(),
        )


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


class Talk:
    """Drives one `Session` as the service does."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def begin(self, ids: list[int], *, max_tokens: int = 8, stop_ids: tuple[int, ...] = (), **sampling: Any) -> Turn:
        turn = Turn(Sampler(Sampling(**sampling)), frozenset(stop_ids), max_tokens, time.perf_counter())
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


class Bench:
    """A toy behind a scripted replica, opened by its grant; sessions on it."""

    def __init__(self, toy: Toy, replica: ScriptedReplica, instance: Instance, limits: Limits, telemetry: Telemetry):
        self.toy, self.replica, self.instance = toy, replica, instance
        self.limits, self.telemetry = limits, telemetry
        self.renewing = Unbounded()

    def account(self, *, tokens: int = 10_000, heartbeat_tokens: int = 10_000, chunk: int = 1000) -> LeaseAccount:
        held = held_lease(self.toy, tokens=tokens)
        return LeaseAccount(held, self.renewing, heartbeat_tokens=heartbeat_tokens, chunk=chunk)

    async def session(self, account: LeaseAccount | None = None, **options: Any) -> Talk:
        link = await self.instance.link(b"")
        options = {"max_positions": 0} | options
        session = Session(
            self.instance.tables,
            link,
            account or self.account(),
            self.limits,
            Meters.of(self.telemetry),
            **options,
        )
        await session.start(secrets.token_hex(16))
        return Talk(session)


MakeBench = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[MakeBench]:
    """Makes benches: `await bench(preset=..., limits=...)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(*, limits: Limits | None = None, **toy_options: Any) -> Bench:
            toy = make_toy(tmp_path / secrets.token_hex(4), **toy_options)
            operator = Authority("operator CA of the tests")
            replica = ScriptedReplica(toy)
            address = await start_server(
                stack, lambda server: model_pb2_grpc.add_ModelServicer_to_server(replica, server), operator
            )
            client = operator.issue("enclave")

            def connect(certificate: bytes) -> grpc.aio.Channel:
                return rpc.channel(address, roots=operator.pem, identity=(client.certificate, client.private_key))

            limits = limits or Limits()
            telemetry = Telemetry("enclave", simulated=True)
            instance = Instance(toy.folder, toy.developer.public_key(), connect, limits, telemetry)
            stack.push_async_callback(instance.stop)
            await instance.load(toy.grant)
            return Bench(toy, replica, instance, limits, telemetry)

        yield make


async def start_server(
    stack: contextlib.AsyncExitStack,
    register: Callable[[Any], None],
    operator: Authority,
    *,
    client_ca: bytes | None = None,
    name: str = "server",
) -> str:
    """A gRPC server with mutual TLS on loopback; returns its address."""
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(lambda error: None)], options=rpc.SERVER_OPTIONS)
    register(server)
    identity = operator.issue(name)
    credentials = rpc.server_credentials(
        identity.certificate, identity.private_key, client_ca=client_ca or operator.pem
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return f"127.0.0.1:{port}"


@pytest.fixture
def toys(tmp_path: Path) -> Callable[..., Toy]:
    """Makes toy instance directories."""
    return lambda **options: make_toy(tmp_path / secrets.token_hex(4), **options)


@pytest.fixture
def leases() -> Callable[..., tuple[LeaseAccount, Unbounded]]:
    """Makes a lease account and the key service that stands behind it."""

    def make(
        *,
        tokens: int = 100,
        heartbeat_tokens: int = 8,
        chunk: int = 100,
        expires: int = 2**39,
        clock: Callable[[], float] = time.time,
    ) -> tuple[LeaseAccount, Unbounded]:
        renewing = Unbounded()
        held = held_lease(tokens=tokens, expires=expires)
        options: dict[str, Any] = {"heartbeat_tokens": heartbeat_tokens, "chunk": chunk, "clock": clock}
        return LeaseAccount(held, renewing, **options), renewing

    return make


# -- the real parts ---------------------------------------------------------------------------------------------------


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=211,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=16,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=151, n_embd=32, n_layer=2, n_head=4, n_positions=96, bos_token_id=0, eos_token_id=0)
    ),
}


@dataclass
class Protected:
    """A tiny model and its protected instance."""

    folder: Path
    manifest: Manifest
    digest: bytes
    plain: Any

    @torch.inference_mode()
    def generate(self, ids: list[int], count: int, **sampling: Any) -> list[int]:
        """The plain model's answer under the same sampling."""
        sampler, out, cache = Sampler(Sampling(**sampling)), [], None
        fed = torch.tensor([ids])
        for step in range(count):
            result = self.plain(input_ids=fed, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            out.append(sampler.pick(result.logits[0, -1].float().numpy(), step))
            fed = torch.tensor([out[-1:]])
        return out


@dataclass
class Developer:
    """The key service's home and what was protected in it."""

    home: Home
    platform: SimulatedPlatform
    folder: Path
    _made: dict[tuple[str, str], Protected] = field(default_factory=dict)

    def protected(self, family: str, preset: str) -> Protected:
        """`family`: one of `MODELS`, or of the server's tests."""
        if (family, preset) not in self._made:
            torch.manual_seed(3)
            model = MODELS[family]().eval() if family in MODELS else models.tiny(family)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.2)
            source = self.folder / family
            model.save_pretrained(source)
            made = protect(
                source,
                self.folder / f"{family}-{preset}",
                preset=preset,  # type: ignore[arg-type]
                developer=self.home.developer,
                seal_to=self.home.sealing.public_key(),
                accept_tied_head=True,
                samples=1,
            )
            self._made[family, preset] = Protected(made.directory, made.manifest, made.manifest_digest, model)
        return self._made[family, preset]


@pytest.fixture(scope="session")
def developer(tmp_path_factory: pytest.TempPathFactory) -> Developer:
    folder = tmp_path_factory.mktemp("developer")
    platform = SimulatedPlatform.create(folder / "tee")
    return Developer(Home.open(folder / "home"), platform, folder)


class Client:
    """A client's view of a session."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.steps: list[enclave_pb2.Step] = []

    async def read(self) -> enclave_pb2.EnclaveFrame:
        frame = await asyncio.wait_for(self._call.read(), 20)
        assert frame is not grpc.aio.EOF, "the stream ended"
        return frame

    async def send(self, **body: Any) -> None:
        await self._call.write(enclave_pb2.ClientFrame(**body))

    async def open(self, delegation: bytes, instance: str, **other: Any) -> enclave_pb2.EnclaveFrame:
        await self.send(open=enclave_pb2.Open(delegation=delegation, instance=instance, **other))
        return await self.read()

    async def begin(self, ids: list[int], *, stop_ids: tuple[int, ...] = (), **sampling: Any) -> None:
        wanted = enclave_pb2.Sampling(stop_ids=np.array(stop_ids, "<u4").tobytes(), **({"max_tokens": 8} | sampling))
        await self.send(turn=enclave_pb2.Turn(ids=np.array(ids, "<u4").tobytes(), sampling=wanted))

    async def rest(self) -> tuple[list[int], int]:
        tokens = []
        while True:
            frame = await self.read()
            assert not frame.HasField("failed"), f"{frame.failed.code}: {frame.failed.message}"
            self.steps.append(frame.step)
            if frame.step.kind:
                return tokens, frame.step.kind
            tokens.append(frame.step.id)

    async def turn(self, ids: list[int], **sampling: Any) -> tuple[list[int], int]:
        await self.begin(ids, **sampling)
        return await self.rest()

    async def failure(self) -> str:
        while True:
            frame = await self.read()
            if frame.HasField("failed"):
                return frame.failed.code

    async def close(self) -> None:
        self._call.cancel()


@dataclass
class Person:
    """A data owner with a key."""

    key: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


class World:
    """Everything on loopback, in one loop."""

    def __init__(self, developer: Developer, stack: contextlib.AsyncExitStack, folder: Path) -> None:
        self.developer, self._stack, self._folder = developer, stack, folder
        self.operator = Authority("operator CA of the tests")
        self.telemetry = Telemetry("enclave", simulated=True)
        self.limits = Limits()
        self.engines: list[TransformersEngine] = []

    async def start(
        self,
        protected: Protected,
        *,
        direct: bool = False,
        lease: dict[str, Any] | None = None,
        dedicated_to: str | None = None,
        copied_to: Path | None = None,
        **limits: Any,
    ) -> None:
        """`direct`: the enclave links to the model server itself; `dedicated_to`: the instance's only user, who is
        then `owner`; `copied_to`: the enclave reads a copy of the instance there.
        """
        self.protected, self._dedicated_to = protected, dedicated_to
        self.limits = Limits.model_validate(limits)
        self.policy = Policy.model_validate(
            {
                "evidence": {
                    "mode": "development",
                    "measurements": [MEASUREMENT.hex()],
                    "simulated_root_sha256": self.developer.platform.root_sha256.hex(),
                },
                "lease": {"audience": AUDIENCE, **(lease or {})},
            }
        )
        keyservice = await self._start_keyservice()
        server = await self._start_server(protected)
        link_to = server if direct else await self._start_gateway(server)
        folder = protected.folder if copied_to is None else shutil.copytree(protected.folder, copied_to)
        await self._start_enclave(folder, keyservice, link_to, direct=direct)

    def person(self, name: str, *, budget: int = 100_000, member: bool = True) -> Person:
        person = Person(Ed25519PrivateKey.generate())
        with self.store.write() as db:
            user = users.add(db, name, person.public, budget=budget, now=int(time.time()))
            if member:
                registered.allow(db, self.protected.manifest.instance, user)
        return person

    def stranger(self) -> Person:
        """Somebody the key service does not know."""
        return Person(Ed25519PrivateKey.generate())

    def delegate(self, person: Person, **other: Any) -> bytes:
        fields = {
            "user": person.public,
            "enclave_key": self.identity.tls.spki_sha256,
            "measurement": MEASUREMENT,
            "instance": self.protected.manifest.instance,
            "nonce": secrets.token_bytes(32),
            "expires": int(time.time()) + 3600,
        }
        return Signed.sign(Delegation.model_validate(fields | other), person.key).to_bytes()

    def client(self, request_id: str | None = None) -> Client:
        metadata = () if request_id is None else ((rpc.REQUEST_ID_KEY, request_id),)
        return Client(self.stub.Session(metadata=metadata))

    async def opened(self, delegation: bytes, **other: Any) -> Client:
        client = self.client()
        frame = await client.open(delegation, self.protected.manifest.instance, **other)
        assert frame.HasField("opened"), f"{frame.failed.code}: {frame.failed.message}"
        return client

    async def until_sessions(self, count: int) -> None:
        """Wait until the enclave has this many: a client's leaving takes a moment to arrive."""
        for _ in range(1000):
            if len(self.service._sessions) == count:
                return
            await asyncio.sleep(0.01)
        raise TimeoutError(f"{len(self.service._sessions)} sessions, not {count}")

    def operator_certificate(self) -> bytes:
        """DER of a certificate over a key that is not the enclave's."""
        return ssl.PEM_cert_to_DER_cert(self.operator.issue("other").certificate.decode())

    async def _start_keyservice(self) -> str:
        home = self.developer.home
        self.store = Store(self._folder / "state.db")
        self._stack.callback(self.store.close)
        telemetry = Telemetry("keyservice", simulated=True)
        issuer = Issuer(home, self.store, self.policy, telemetry, root_der=self.developer.platform.root_der)
        servicer = KeyServiceServicer(issuer, keyservice_config.Limits())
        inspected = registered.inspect(self.protected.folder, home.developer.public_key(), home.sealing)
        with self.store.write() as db:
            owner, now = None, int(time.time())
            if self._dedicated_to is not None:
                self.owner = Person(Ed25519PrivateKey.generate())
                owner = users.add(db, self._dedicated_to, self.owner.public, budget=1000, now=now)
            registered.add(db, inspected, storage_key=home.storage_key, owner=owner, now=now)
        server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(lambda error: None)], options=rpc.SERVER_OPTIONS)
        keyservice_pb2_grpc.add_KeyServiceServicer_to_server(servicer, server)
        tls = home.tls("localhost")
        port = server.add_secure_port("127.0.0.1:0", rpc.server_credentials(tls.chain, tls.private_key, client_ca=None))
        await server.start()
        self._stack.push_async_callback(server.stop, 0)
        self._stack.push_async_callback(servicer.drain)
        self.keyservice = server
        return f"127.0.0.1:{port}"

    async def _start_server(self, protected: Protected) -> str:
        settings = EngineSettings(slots=20, prefill_chunk=16, gather_window_ms=2.0)
        loaded = load(protected.folder, self.developer.home.developer.public_key(), "cpu")
        card = card_for(loaded.model, loaded.head, settings, manifest=loaded.manifest, digest=loaded.digest)
        engine = TransformersEngine(loaded.model, loaded.head, card, settings)
        service = ModelService(engine, Telemetry("server", simulated=True), name="replica", drain_seconds=1.0)
        pump = asyncio.create_task(service.pump())

        async def stop() -> None:
            await engine.stop()
            await pump

        self._stack.push_async_callback(stop)
        return await start_server(self._stack, service.register, self.operator)

    async def _start_gateway(self, server: str) -> str:
        inner, manifest = self.operator.issue("gateway"), self.protected.manifest
        table = gateway_config.ReplicaSettings(
            name="replica", address=server, instance=manifest.instance, epoch=manifest.epoch
        )
        limits = gateway_config.Limits()
        identity = (inner.certificate, inner.private_key)
        replicas = Replicas([table], roots=self.operator.pem, identity=identity, limits=limits)
        self._stack.push_async_callback(replicas.close)
        key = self.developer.home.service.public_key()
        admission = Admission(key=key, audience=AUDIENCE, limit=64)
        service = GatewayService(replicas, admission, limits, Telemetry("gateway", simulated=True))
        return await start_server(
            self._stack,
            lambda made: model_pb2_grpc.add_ModelServicer_to_server(service, made),
            self.operator,
            client_ca=self.developer.home.link_ca.pem,
        )

    async def _start_enclave(self, folder: Path, keyservice: str, link_to: str, *, direct: bool) -> None:
        home = self.developer.home
        self.provider = self.developer.platform.provider(MEASUREMENT)
        self.identity = EnclaveIdentity.create(
            self.provider, dns_name="enclave.test", lifetime=3600, now=int(time.time())
        )
        own = self.operator.issue("enclave")

        def connect(certificate: bytes) -> grpc.aio.Channel:
            identity = (own.certificate, own.private_key) if direct else self.identity.link_credentials(certificate)
            return rpc.channel(link_to, roots=self.operator.pem, identity=identity)

        channel = rpc.channel(keyservice, roots=home.tls_ca.pem, server_name="localhost")
        self._stack.push_async_callback(channel.close)
        settings = EnclaveSettings.model_validate(
            {
                "collateral": "unused",
                "developer_key": "unused",
                "instances": [{"directory": str(folder)}],
                "keyservice": {"address": keyservice, "ca": "unused", "service_key": "unused"},
                "gateway": {"address": link_to, "ca": "unused", "audience": AUDIENCE},
            }
        )
        self.instances = Instances(
            settings.instances, home.developer.public_key(), connect, self.limits, self.telemetry
        )
        self._stack.push_async_callback(self.instances.stop)
        self.releases = ReleaseClient(
            channel,
            home.service.public_key(),
            self.provider,
            self.identity,
            self.telemetry,
            audience=AUDIENCE,
            timeout=10,
        )
        accounts = Accounts(self.releases, self.limits, self.telemetry)
        self._stack.push_async_callback(accounts.stop)
        self.service = EnclaveService(
            self.identity, self.provider, self.instances, accounts, self.limits, self.telemetry
        )
        server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(lambda error: None)], options=rpc.SERVER_OPTIONS)
        enclave_pb2_grpc.add_EnclaveServicer_to_server(self.service, server)
        credentials = rpc.server_credentials(
            self.identity.tls.certificate_pem, self.identity.tls.private_key_pem, client_ca=None
        )
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        self._stack.push_async_callback(server.stop, 0)
        front = rpc.channel(f"127.0.0.1:{port}", roots=self.identity.tls.certificate_pem, server_name="enclave.test")
        self._stack.push_async_callback(front.close)
        self.stub: Any = enclave_pb2_grpc.EnclaveStub(front)


@pytest.fixture
async def world(developer: Developer, tmp_path: Path) -> AsyncIterator[World]:
    """Not started: `await world.start(developer.protected("llama", "hardened"))`."""
    async with contextlib.AsyncExitStack() as stack:
        yield World(developer, stack, tmp_path)
