"""A key service over real TLS sockets and a real database, with a simulated TEE and the parties that talk to it."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_keyservice.home import Home
from stip_keyservice.service import instances, users
from stip_keyservice.service.auditlog import AuditEntry, AuditLog
from stip_keyservice.service.config import Limits
from stip_keyservice.service.issuer import Issuer
from stip_keyservice.service.policy import Policy
from stip_keyservice.service.server import KeyServiceServicer
from stip_keyservice.service.state.store import Store
from stip_keyservice.service.vault import Vault, open_vault
from stip_protocol import rpc
from stip_protocol.documents import Signed
from stip_protocol.keys.stream import derive
from stip_protocol.leakage import REPORT_NAME, Leakage, LeakageCell
from stip_protocol.lease import Lease
from stip_protocol.manifest import ClientManifest, FileDigest, Manifest, file_digest
from stip_protocol.release import (
    Bundle,
    Claims,
    Delegation,
    Grant,
    Heartbeat,
    Renewal,
    report_data,
    sign_heartbeat,
    unseal,
)
from stip_protocol.sealed import SealedWriter
from stip_protocol.secrets_file import PART_LABEL, InstanceSecrets, seal_secrets
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc
from stip_stack.tee import SimulatedPlatform

from ..services.postgres import postgres
from ..services.softhsm import softhsm
from .place import Place

__all__ = ["postgres", "softhsm"]
"""Fixtures of the session: one server and one token for all modules."""

MEASUREMENT = hashlib.sha256(b"an enclave that the policy names").digest()
START = int(time.time())
"""The machine's own time, because TLS libraries check certificates by it."""


@dataclass
class Clock:
    """The key service's time, moved by tests."""

    now: int = START

    def __call__(self) -> float:
        return float(self.now)


@dataclass(frozen=True)
class MadeInstance:
    directory: Path
    id: str
    root: bytes
    preset: str


def make_instance(
    folder: Path,
    home: Home,
    *,
    preset: str = "hardened",
    secrets_of: dict[str, Any] | None = None,
    measured: Sequence[LeakageCell] | None = None,
    instance: str | None = None,
    epoch: int = 0,
) -> MadeInstance:
    """A small instance directory in its real form, made with the home's own keys: of `instance` or of a fresh one.

    `measured` is what an audit found; None: there was none.
    """
    instance, root = instance or secrets.token_hex(16), secrets.token_bytes(32)
    for part in ("server", "enclave", "client"):
        (folder / part).mkdir(parents=True)
    (folder / "server" / "config.json").write_text("{}")
    (folder / "server" / "model.safetensors").write_bytes(os.urandom(512))
    (folder / "client" / "tokenizer.json").write_text("{}")
    with SealedWriter(
        folder / "enclave" / "embedding.sealed",
        key=derive(root, PART_LABEL),
        instance=instance,
        epoch=epoch,
        preset=preset,
    ) as writer:
        writer.write(os.urandom(256))
    certificate = b'{"top1": 1.0}\n'
    (folder / "certificate.json").write_bytes(certificate)

    def digests(part: str) -> dict[str, FileDigest]:
        return {path.name: file_digest(path) for path in (folder / part).iterdir()}

    client = ClientManifest(
        instance=instance, epoch=epoch, vocabulary=50, max_positions=64, stop_ids=(0,), files=digests("client")
    )
    client.write(folder / "client" / "manifest.json", home.developer)
    manifest = Manifest.model_validate(
        {
            "instance": instance,
            "epoch": epoch,
            "preset": preset,
            "dtype": "float32",
            "width": 16,
            "vocabulary": 50,
            "max_positions": 64,
            "output": "hidden" if preset == "hardened" else "top",
            "server": digests("server"),
            "enclave": digests("enclave"),
            "certificate": {"top1": 1.0, "sha256": hashlib.sha256(certificate).hexdigest()},
            "leakage": None if measured is None else _audit(folder, measured),
        }
    )
    digest = manifest.write(folder / "manifest.json", home.developer)
    fields = {"instance": instance, "epoch": epoch, "preset": preset, "manifest_digest": digest, "root": root}
    sealed = seal_secrets(InstanceSecrets.model_validate(fields | (secrets_of or {})), home.sealing.public_key())
    (folder / "secrets.sealed").write_bytes(sealed)
    return MadeInstance(folder, instance, root, preset)


def _audit(folder: Path, cells: Sequence[LeakageCell]) -> Leakage:
    """What the manifest says of the report that lies beside it."""
    report = b'{"cells": "in full"}\n'
    (folder / REPORT_NAME).write_bytes(report)
    return Leakage(report_sha256=hashlib.sha256(report).hexdigest(), seed=1, cells=tuple(cells))


def cell(knowledge: str, attack: str, **upper: float) -> LeakageCell:
    """A measured cell by the upper ends of its metrics; each was measured a tenth below."""
    metrics = {name: {"value": 0.9 * high, "low": 0.8 * high, "high": high} for name, high in upper.items()}
    return LeakageCell.model_validate({"knowledge": knowledge, "attack": attack, "metrics": metrics})


def no_cell(knowledge: str, attack: str) -> LeakageCell:
    """One that says not applicable."""
    return LeakageCell(knowledge=knowledge, attack=attack, not_applicable="there is no public base")


@dataclass
class Person:
    """A data owner."""

    name: str
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate, repr=False)

    @property
    def public(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def delegate(self, enclave: Enclave, instance: str, *, expires: int = START + 3600, **other: Any) -> bytes:
        fields = {
            "user": self.public,
            "enclave_key": enclave.tls_key,
            "measurement": enclave.measurement,
            "instance": instance,
            "nonce": secrets.token_bytes(32),
            "expires": expires,
        }
        return Signed.sign(Delegation.model_validate(fields | other), self.key).to_bytes()


class Enclave:
    """What an enclave does towards the key service."""

    def __init__(self, platform: SimulatedPlatform, *, measurement: bytes = MEASUREMENT, **provider: Any) -> None:
        self.measurement = measurement
        self.provider = platform.provider(measurement, clock=lambda: float(START), **provider)
        self.tls_key = secrets.token_bytes(32)
        self.link = ec.generate_private_key(ec.SECP256R1())
        self.hpke = X25519PrivateKey.generate()

    @property
    def link_spki(self) -> bytes:
        return self.link.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def claims(self, challenge: Any, delegation: bytes, instance: str, **other: Any) -> Claims:
        fields = {
            "nonce": challenge.nonce,
            "hpke_key": self.hpke.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
            "tls_key": self.tls_key,
            "link_key": self.link_spki,
            "service": challenge.service,
            "delegation": hashlib.sha256(delegation).digest(),
            "kind": "bundle",
            "instance": instance,
            "tokens": 100,
        }
        return Claims.model_validate(fields | other)

    def request(
        self, claims: Claims | bytes, delegation: bytes, *, quoted: bytes | None = None
    ) -> keyservice_pb2.ReleaseRequest:
        """`quoted` is what the quote vouches for, where that is not the claims sent."""
        data = claims if isinstance(claims, bytes) else claims.to_bytes()
        return keyservice_pb2.ReleaseRequest(
            claims=data,
            quote=self.provider.quote(report_data(quoted or data)),
            collateral=self.provider.collateral(),
            delegation=delegation,
        )


@dataclass
class World:
    """One key service and everything around it."""

    home: Home
    store: Store
    vault: Vault
    policy: Policy
    platform: SimulatedPlatform
    clock: Clock
    telemetry: Telemetry
    stub: Any
    folder: Path
    servicer: KeyServiceServicer
    port: int

    def person(self, name: str, *, budget: int = 10_000) -> Person:
        person = Person(name)
        with self.store.write() as db:
            users.add(db, name, person.public, budget=budget, now=self.clock.now)
        return person

    def instance(self, *, owner: Person | None = None, members: tuple[Person, ...] = (), **made: Any) -> MadeInstance:
        """Made, inspected and added: dedicated to `owner`, or shared by `members`."""
        instance = make_instance(self.folder / secrets.token_hex(4), self.home, **made)
        inspected = instances.inspect(instance.directory, self.home.developer.public_key(), self.home.sealing)
        with self.store.write() as db:
            domain = None if owner is None else users.by_name(db, owner.name).domain
            instances.add(db, inspected, vault=self.vault, domain=domain, now=self.clock.now)
            for member in members:
                instances.allow(db, instance.id, users.by_name(db, member.name))
        return instance

    def remove(self, person: Person) -> None:
        with self.store.write() as db:
            users.remove(db, person.name, now=self.clock.now)

    def user(self, person: Person) -> users.User:
        with self.store.read() as db:
            found = users.by_key(db, person.public)
        assert found is not None
        return found[0]

    def enclave(self, **options: Any) -> Enclave:
        return Enclave(self.platform, **options)

    def entries(self) -> list[AuditEntry]:
        return list(AuditLog(self.store, self.home.service).latest(1000))

    async def challenge(self) -> Any:
        return await self.stub.Challenge(keyservice_pb2.ChallengeRequest())

    async def release(
        self, enclave: Enclave, delegation: bytes, instance: str, **other: Any
    ) -> tuple[Bundle | Grant, Claims]:
        """A whole release, opened as the enclave opens it."""
        claims = enclave.claims(await self.challenge(), delegation, instance, **other)
        reply = await self.stub.Release(enclave.request(claims, delegation))
        opened = unseal(reply.sealed, reply.signature, claims.to_bytes(), enclave.hpke, self.home.service.public_key())
        return opened, claims

    async def bundle(self, enclave: Enclave, person: Person, instance: str, **other: Any) -> tuple[Bundle, Lease]:
        bundle, _ = await self.release(enclave, person.delegate(enclave, instance), instance, **other)
        assert isinstance(bundle, Bundle)
        return bundle, self.lease(bundle.lease)

    def lease(self, signed: bytes) -> Lease:
        return Signed.from_bytes(signed).open(Lease, self.home.service.public_key())

    async def renew(
        self, enclave: Enclave, lease: Lease, *, fed: int, wanted: int, signer: Enclave | None = None
    ) -> tuple[Renewal, Lease]:
        beat = Heartbeat(
            handle=lease.handle, serial=lease.serial, nonce=secrets.token_bytes(32), fed=fed, wanted=wanted
        )
        return await self.send(beat, signer or enclave)

    async def send(self, beat: Heartbeat, signer: Enclave) -> tuple[Renewal, Lease]:
        request = keyservice_pb2.RenewRequest(heartbeat=beat.to_bytes(), signature=sign_heartbeat(beat, signer.link))
        reply = await self.stub.Renew(request)
        renewal = Signed.from_bytes(reply.renewal).open(Renewal, self.home.service.public_key())
        assert renewal.nonce == beat.nonce
        return renewal, self.lease(renewal.lease)


async def refusal(call: Any) -> str:
    """The stable code that a call is refused with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return rpc.from_rpc(caught.value).code


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("tee") / "platform", now=START - 3600)


@pytest.fixture
def policy_tables(platform: SimulatedPlatform) -> dict[str, Any]:
    return {
        "evidence": {
            "mode": "development",
            "measurements": [MEASUREMENT.hex()],
            "simulated_root_sha256": platform.root_sha256.hex(),
        },
        "lease": {"seconds": 900, "tokens": 1000, "heartbeat_tokens": 64, "audience": "gateway.test"},
        "release": {"nonce_seconds": 60},
    }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.made(tmp_path, MEASUREMENT)


Serve = Callable[..., Any]


@asynccontextmanager
async def served(
    folder: Path,
    platform: SimulatedPlatform,
    policy_tables: dict[str, Any],
    clock: Clock | None = None,
    *,
    limits: dict[str, Any] | None = None,
    collateral: Callable[[bytes], bytes] | None = None,
) -> AsyncIterator[World]:
    """A key service over the home and the database in `folder`, new or there already."""
    home = Home.open(folder / "home")
    store = Store(home.database)
    policy = Policy.model_validate(policy_tables)
    telemetry = Telemetry("keyservice", simulated=True)
    clock = clock or Clock()
    issuer = Issuer(home, store, policy, telemetry, root_der=platform.root_der, clock=clock, collateral=collateral)
    servicer = KeyServiceServicer(issuer, Limits.model_validate(limits or {}))
    server = grpc.aio.server(
        interceptors=[rpc.ErrorInterceptor(lambda error: telemetry.refused(getattr(error, "code", "internal")))],
        options=rpc.SERVER_OPTIONS,
    )
    keyservice_pb2_grpc.add_KeyServiceServicer_to_server(servicer, server)
    tls = home.tls("localhost")
    port = server.add_secure_port("127.0.0.1:0", rpc.server_credentials(tls.chain, tls.private_key, client_ca=None))
    await server.start()
    async with rpc.channel(f"127.0.0.1:{port}", roots=home.tls_ca.pem, server_name="localhost") as channel:
        stub = keyservice_pb2_grpc.KeyServiceStub(channel)
        vault = open_vault(home)
        yield World(home, store, vault, policy, platform, clock, telemetry, stub, folder, servicer, port)
    await servicer.drain()
    await server.stop(grace=0)
    store.close()


@pytest.fixture
def serve(tmp_path: Path, platform: SimulatedPlatform, policy_tables: dict[str, Any]) -> Serve:
    """Opens the same home and database again each time: a second replica, or a restart."""

    def opened(clock: Clock | None = None, *, rates: dict[str, Any] | None = None) -> Any:
        return served(tmp_path, platform, policy_tables, clock, limits={"rates": rates or {}})

    return opened


@pytest.fixture
async def world(serve: Serve) -> AsyncIterator[World]:
    async with serve() as opened:
        yield opened
