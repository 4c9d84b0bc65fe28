"""A key service with users and instances of their own, over a simulated TEE, in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from benchmarks.machine import ROOT
from stip_keyservice.home import Home
from stip_keyservice.service import instances, users
from stip_keyservice.service.state.store import Store
from stip_keyservice.service.vault import open_vault
from stip_protocol.manifest import FileDigest, Manifest
from stip_protocol.release import Grant
from stip_stack.tee import SimulatedPlatform

MEASUREMENT = hashlib.sha256(b"the enclave of the benchmark of releases").digest()
BUDGET = 2**40
POLICY = """
[evidence]
mode = "development"
measurements = ["{measurement}"]
simulated_root_sha256 = "{root}"
[lease]
audience = "gateway.stip"
"""
CONFIG = """
home = "home"
policy = "policy.toml"
simulated_root = "root.der"
simulated = true
[serving]
log_level = "{level}"
[limits.rates]
challenge = {{ per_second = 100000, burst = 100000 }}
release = {{ per_second = 100000, burst = 100000 }}
"""
KEYSERVICE = ROOT / ".venv" / "bin" / "stip-keyservice"


@dataclass(frozen=True)
class Customer:
    """A user with an instance dedicated to them."""

    key: Ed25519PrivateKey
    instance: str

    @property
    def public(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


@dataclass(frozen=True)
class Place:
    folder: Path
    home: Home
    platform: SimulatedPlatform
    customers: Sequence[Customer]


@dataclass(frozen=True)
class Service:
    address: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Of all its threads, in user and kernel (`getrusage` as the kernel keeps it of another process)."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


def make(folder: Path, *, customers: int, home_toml: str | None = None) -> Place:
    """A home with as many users, each with a dedicated instance. `home_toml` names another database than SQLite."""
    folder.mkdir(parents=True)
    platform = SimulatedPlatform.create(folder / "tee")
    (folder / "root.der").write_bytes(platform.root_der)
    (folder / "policy.toml").write_text(POLICY.format(measurement=MEASUREMENT.hex(), root=platform.root_sha256.hex()))
    (folder / "keyservice.toml").write_text(CONFIG.format(level="info"))
    if home_toml is not None:
        (folder / "home").mkdir(mode=0o700)
        (folder / "home" / "home.toml").write_text(home_toml)
        (folder / "home" / "home.toml").chmod(0o600)
    home = Home.open(folder / "home")
    store = Store(home.database, password_file=home.password_file)
    vault, made, now = open_vault(home), [], int(time.time())
    with store.write() as db:
        for number in range(customers):
            customer = Customer(Ed25519PrivateKey.generate(), secrets.token_hex(16))
            added = users.add(db, f"user{number}", customer.public, budget=BUDGET, now=now)
            inspected = _inspected(customer.instance)
            instances.add(db, inspected, vault=vault, domain=added.domain, now=now)
            made.append(customer)
    store.close()
    return Place(folder, home, platform, made)


@contextmanager
def serving(place: Place, *, core: int) -> Iterator[Service]:
    """The service as a process of its own, on one core."""
    log = (place.folder / "service.log").open("wb")
    process = subprocess.Popen(
        [str(KEYSERVICE), "serve", "--config", str(place.folder / "keyservice.toml")],
        stdout=subprocess.PIPE,
        stderr=log,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    assert process.stdout is not None
    try:
        yield Service(json.loads(process.stdout.readline())["address"], psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(timeout=60)
        log.close()


def _inspected(instance: str) -> instances.Inspected:
    """An instance as if its directory had been checked: a release reads the same rows."""
    digest = {"config.json": FileDigest.of(b"{}")}
    manifest = Manifest.model_validate(
        {
            "instance": instance,
            "epoch": 0,
            "preset": "hardened",
            "dtype": "float32",
            "width": 16,
            "vocabulary": 50,
            "max_positions": 64,
            "output": "hidden",
            "server": digest,
            "enclave": digest,
            "certificate": {"sha256": "00" * 32},
            "leakage": None,
        }
    )
    grant = Grant(
        instance=instance,
        epoch=0,
        preset="hardened",
        manifest_digest=manifest_digest(manifest),
        part_key=secrets.token_bytes(32),
        vocabulary_seed=None,
    )
    return instances.Inspected(manifest, grant)


def manifest_digest(manifest: Manifest) -> bytes:
    return hashlib.sha256(manifest.to_json()).digest()
