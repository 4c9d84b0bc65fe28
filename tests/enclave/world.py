"""The real key service, gateway and model server with protected tiny models, a real enclave service, and clients that
speak to it over its RA-TLS certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stip_enclave.accounts import Accounts
from stip_enclave.config import EnclaveSettings, Limits
from stip_enclave.identity import EnclaveIdentity
from stip_enclave.instances import Instances
from stip_enclave.release import ReleaseClient
from stip_enclave.sampling import Sampler, Sampling
from stip_enclave.service import EnclaveService
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
from stip_keyservice.service.state.store import Store
from stip_keyservice.service.vault import open_vault
from stip_protocol import rpc
from stip_protocol.documents import Signed
from stip_protocol.manifest import Manifest
from stip_protocol.release import Delegation
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import enclave_pb2, enclave_pb2_grpc, keyservice_pb2_grpc, model_pb2_grpc
from stip_server.config import TransformersSettings
from stip_server.engines.transformers import TransformersEngine, card_for, load
from stip_server.service import ModelService
from stip_stack.pki import Authority
from stip_stack.tee import SimulatedPlatform
from tests.enclave.bench import AUDIENCE, serving, start_server
from tests.server import models

MEASUREMENT = hashlib.sha256(b"the enclave under test").digest()
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
                accept_token_cipher=True,
                samples=1,
            )
            self._made[family, preset] = Protected(made.directory, made.manifest, made.manifest_digest, model)
        return self._made[family, preset]


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
        self.replicas: list[tuple[ModelService, grpc.aio.Server]] = []
        """The model servers, to be drained or stopped."""

    async def start(
        self,
        protected: Protected,
        *,
        direct: bool = False,
        replicas: int = 1,
        lease: dict[str, Any] | None = None,
        dedicated_to: str | None = None,
        copied_to: Path | None = None,
        **limits: Any,
    ) -> None:
        """`direct`: the enclave links to the model server itself; `replicas`: model servers behind the gateway;
        `dedicated_to`: the instance's only user, who is then `owner`; `copied_to`: the enclave reads a copy of the
        instance there.
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
        servers = [await self._start_server(protected, f"replica-{number}") for number in range(replicas)]
        link_to = servers[0] if direct else await self._start_gateway(servers)
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
        (certificate, *_) = x509.load_pem_x509_certificates(self.operator.issue("other").certificate)
        return certificate.public_bytes(Encoding.DER)

    async def _start_keyservice(self) -> str:
        home = self.developer.home
        self.store = Store(self._folder / "state.db")
        self._stack.callback(self.store.close)
        telemetry = Telemetry("keyservice", simulated=True)
        issuer = Issuer(home, self.store, self.policy, telemetry, root_der=self.developer.platform.root_der)
        servicer = KeyServiceServicer(issuer, keyservice_config.Limits())
        inspected = registered.inspect(self.protected.folder, home.developer.public_key(), home.sealing)
        with self.store.write() as db:
            domain, now = None, int(time.time())
            if self._dedicated_to is not None:
                self.owner = Person(Ed25519PrivateKey.generate())
                domain = users.add(db, self._dedicated_to, self.owner.public, budget=1000, now=now).domain
            registered.add(db, inspected, vault=open_vault(home), domain=domain, now=now)
        server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(lambda error: None)], options=rpc.SERVER_OPTIONS)
        keyservice_pb2_grpc.add_KeyServiceServicer_to_server(servicer, server)
        tls = home.tls("localhost")
        port = server.add_secure_port("127.0.0.1:0", rpc.server_credentials(tls.chain, tls.private_key, client_ca=None))
        await server.start()
        self._stack.push_async_callback(server.stop, 0)
        self._stack.push_async_callback(servicer.drain)
        self.keyservice, self.keyservice_servicer = server, servicer
        return f"127.0.0.1:{port}"

    async def _start_server(self, protected: Protected, name: str) -> str:
        settings = TransformersSettings(slots=20, prefill_chunk=16, gather_window_ms=2.0)
        loaded = load(protected.folder, self.developer.home.developer.public_key(), "cpu")
        card = card_for(loaded.model, loaded.head, settings, manifest=loaded.manifest, digest=loaded.digest)
        engine = TransformersEngine(loaded.model, loaded.head, card, settings)
        service = ModelService(engine, Telemetry("server", simulated=True), name=name, drain_seconds=1.0)
        pump = asyncio.create_task(service.pump())

        async def stop() -> None:
            await engine.stop()
            await pump

        self._stack.push_async_callback(stop)
        server, address = await serving(self._stack, service.register, self.operator)
        self.replicas.append((service, server))
        return address

    async def _start_gateway(self, servers: list[str]) -> str:
        inner, manifest = self.operator.issue("gateway"), self.protected.manifest
        table = [
            gateway_config.ReplicaSettings(
                name=f"replica-{number}", address=server, instance=manifest.instance, epoch=manifest.epoch
            )
            for number, server in enumerate(servers)
        ]
        limits = gateway_config.Limits()
        identity = (inner.certificate, inner.private_key)
        replicas = Replicas(table, roots=self.operator.pem, identity=identity, limits=limits)
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
        self.accounts = Accounts(self.releases, self.instances, self.limits, self.telemetry)
        self._stack.push_async_callback(self.accounts.stop)
        self.service = EnclaveService(self.identity, self.provider, self.accounts, self.limits, self.telemetry)
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
