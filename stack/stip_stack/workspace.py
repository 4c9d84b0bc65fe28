"""The folder a stack lives in: keys, certificates and one configuration file a part.

WORK/
  home/            the key service's home (stip_keyservice.home)
  tee/             the simulated platform
  operator/        the operator's CA, gateway and server certificates
  user/            the demo user's key
  *.toml           what each part is started with
  logs/            one JSON-lines file a process
"""

from __future__ import annotations

import hashlib
import os
import time
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from stip_keyservice.home import Home
from stip_protocol.manifest import Manifest
from stip_stack.pki import Authority, Identity
from stip_stack.tee import SimulatedPlatform

AUDIENCE = "gateway.stip"
ENCLAVE_NAME = "enclave.stip"
SNAPSHOT_SECONDS = 0.0
"""A demo and its tests read metrics right after they happen; production keeps the default of 15 s."""
MEASUREMENT = hashlib.sha256(b"stip simulated enclave").digest()


@dataclass(frozen=True)
class Published:
    """A protected instance on disk: its folder, its public manifest, and the digest that names it."""

    folder: Path
    manifest: Manifest
    digest: bytes


class Workspace:
    """Keys and certificates for one stack, made once; configuration files written as addresses become known."""

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()
        self.logs = path / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.home = Home.open(path / "home")
        self.platform = SimulatedPlatform.create(path / "tee")
        self.root = self._write_bytes("simulated-root.der", self.platform.root_der)
        self.operator = path / "operator"
        self.operator.mkdir()
        self._authority = Authority("STIP stack operator CA")
        (self.operator / "ca.pem").write_bytes(self._authority.pem)
        self.user_key = path / "user" / "key.pem"
        self.profile = path / "profile.toml"

    def published(self, folder: Path) -> Published:
        """Read a protected instance. Raises where its manifest is not signed by this home's developer."""
        manifest, digest = Manifest.load(folder / "manifest.json", self.home.developer.public_key())
        return Published(folder, manifest, digest)

    def identity(self, name: str) -> Identity:
        """A certificate of the operator's CA."""
        return self._authority.issue(name)

    def keyservice(self, *, policy: Mapping[str, Any] | None = None) -> Path:
        """`keyservice.toml` and `policy.toml`; `policy` overrides its tables."""
        tables: dict[str, dict[str, Any]] = {
            "evidence": {
                "mode": "development",
                "measurements": [MEASUREMENT.hex()],
                "simulated_root_sha256": self.platform.root_sha256.hex(),
            },
            "lease": {"audience": AUDIENCE},
        }
        for name, table in (policy or {}).items():
            tables[name] = {**tables.get(name, {}), **table}
        self.write("policy.toml", tables)
        return self.write(
            "keyservice.toml",
            {
                "serving": self._serving(),
                "home": str(self.home.path),
                "policy": "policy.toml",
                "dns_name": "localhost",
                "simulated_root": str(self.root),
                "simulated": True,
            },
        )

    def server(self, name: str, published: Published, *, engine: Mapping[str, Any] | None = None) -> Path:
        """`<name>.toml` of one replica."""
        certificate, key = self.identity(name).write(self.operator, name)
        return self.write(
            f"{name}.toml",
            {
                "serving": self._serving(),
                "name": name,
                "instance": str(published.folder),
                "developer_key": str(self.home.path / "developer.pub"),
                "certificate": str(certificate),
                "private_key": str(key),
                "client_ca": str(self.operator / "ca.pem"),
                "engine": dict(engine or {}),
                "simulated": True,
            },
        )

    def recorder(self, name: str, *, server: str, tape: Path) -> Path:
        """`<name>.toml` of a process that stands before the server at an address and writes `tape`."""
        certificate, key = self.identity(name).write(self.operator, name)
        return self.write(
            f"{name}.toml",
            {
                "serving": self._serving(),
                "server": server,
                "certificate": str(certificate),
                "private_key": str(key),
                "ca": str(self.operator / "ca.pem"),
                "tape": str(tape),
                "simulated": True,
            },
        )

    def gateway(self, replicas: Mapping[str, tuple[str, Published]]) -> Path:
        """`gateway.toml` for replicas given as name: (address, instance)."""
        certificate, key = self.identity("gateway").write(self.operator, "gateway")
        inner, inner_key = self.identity("gateway-client").write(self.operator, "gateway-client")
        return self.write(
            "gateway.toml",
            {
                "serving": self._serving(),
                "audience": AUDIENCE,
                "service_key": str(self.home.path / "service.pub"),
                "link_ca": str(self.home.path / "link-ca.pem"),
                "certificate": str(certificate),
                "private_key": str(key),
                "replica_ca": str(self.operator / "ca.pem"),
                "replica_certificate": str(inner),
                "replica_private_key": str(inner_key),
                "simulated": True,
                "replicas": [_route(name, address, published) for name, (address, published) in replicas.items()],
            },
        )

    def enclave(
        self, *, keyservice: str, gateway: str, published: list[Published], limits: Mapping[str, Any] | None = None
    ) -> Path:
        """`enclave.toml`, given the addresses of key service and gateway; `limits` is its table of that name."""
        collateral = self._write_bytes("collateral.json", self.platform.collateral(int(time.time())))
        return self.write(
            "enclave.toml",
            {
                "serving": self._serving(),
                "dns_name": ENCLAVE_NAME,
                "collateral": str(collateral),
                "developer_key": str(self.home.path / "developer.pub"),
                "instances": [{"directory": str(each.folder)} for each in published],
                "keyservice": {
                    "address": keyservice,
                    "server_name": "localhost",
                    "ca": str(self.home.path / "tls-ca.pem"),
                    "service_key": str(self.home.path / "service.pub"),
                },
                "gateway": {
                    "address": gateway,
                    "server_name": "gateway",
                    "ca": str(self.operator / "ca.pem"),
                    "audience": AUDIENCE,
                },
                "limits": dict(limits or {}),
                "simulated": True,
            },
        )

    def client(self, *, enclave: str, published: Published, user_key: Path, name: str = "profile") -> Path:
        """`<name>.toml` and `client-policy.toml` of one user."""
        self.write(
            "client-policy.toml",
            {
                "mode": "development",
                "audience": "client",
                "measurements": [MEASUREMENT.hex()],
                "simulated_root_sha256": self.platform.root_sha256.hex(),
            },
        )
        return self.write(
            f"{name}.toml",
            {
                "enclave": enclave,
                "server_name": ENCLAVE_NAME,
                "instance": published.manifest.instance,
                "tokenizer": str(published.folder / "client"),
                "developer_key": str(self.home.path / "developer.pub"),
                "service_key": str(self.home.path / "service.pub"),
                "audit_heads": "heads",
                "user_key": str(user_key),
                "policy": "client-policy.toml",
                "mode": "development",
                "simulated_root": str(self.root),
            },
        )

    def route(self, replicas: Mapping[str, tuple[str, Published]]) -> None:
        """Another routing table of the gateway; nothing else of its file changes."""
        rows = [_route(name, address, published) for name, (address, published) in replicas.items()]
        self._change("gateway", {"replicas": rows})

    def hold(self, published: Collection[Published]) -> None:
        """Another list of the enclave's instances; nothing else of its file changes."""
        self._change("enclave", {"instances": [{"directory": str(each.folder)} for each in published]})

    def listen(self, name: str, *, address: str, metrics: str) -> None:
        """Fix where the part configured by `<name>.toml` listens."""
        serving = tomllib.loads((self.path / f"{name}.toml").read_text())["serving"]
        self._change(name, {"serving": serving | {"listen": address, "metrics": metrics}})

    def write(self, name: str, content: Mapping[str, Any]) -> Path:
        """A TOML file of this workspace."""
        return self._write_bytes(name, tomli_w.dumps(content).encode())

    def _change(self, name: str, tables: Mapping[str, Any]) -> None:
        content = tomllib.loads((self.path / f"{name}.toml").read_text())
        self.write(f"{name}.toml", {**content, **tables})

    def _write_bytes(self, name: str, content: bytes) -> Path:
        path = self.path / name
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.write_bytes(content)
        temporary.replace(path)
        return path

    def _serving(self) -> dict[str, Any]:
        return {"metrics_snapshot_seconds": SNAPSHOT_SECONDS, "drain_seconds": 5.0}


def _route(name: str, address: str, published: Published) -> dict[str, Any]:
    manifest = published.manifest
    return {"name": name, "address": address, "instance": manifest.instance, "epoch": manifest.epoch}
