"""Targets that read files which travel between rooms: policies, configuration, manifests, audit exports, kept heads."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from fuzz import material
from fuzz.target import Target
from stip_gateway.config import GatewaySettings
from stip_keyservice.service import auditexport
from stip_keyservice.service.auditlog import AuditEntry
from stip_keyservice.service.policy import Policy
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.documents import Signed
from stip_protocol.heads import Heads, open_head
from stip_protocol.manifest import ClientManifest, FileDigest, Manifest
from stip_protocol.release import AuditHead, service_id
from stip_protocol.runtime import config

POLICIES = Path(__file__).parents[1] / "manifests" / "compose"
PLACEHOLDERS = {"<MRENCLAVE>": "ab" * 32, "<simulated root>": "ef" * 32, "<SHA-256 of manifest.json>": "12" * 32,
                "<32 hex digits>": material.INSTANCE}  # fmt: skip


def _shown(pattern: str) -> list[bytes]:
    found = []
    for path in sorted(POLICIES.glob(pattern)):
        text = path.read_text()
        for placeholder, value in PLACEHOLDERS.items():
            text = text.replace(placeholder, value)
        found.append(text.encode())
    return found


def _file(data: bytes) -> Path:
    path = material.scratch() / "input"
    path.write_bytes(data)
    return path


def _policy(data: bytes) -> None:
    Policy.parse(data, name="policy.toml").digest()


def _evidence_policy(data: bytes) -> None:
    EvidencePolicy.load(_file(data)).digest()


def _evidence_policies() -> list[bytes]:
    client = f'version = [1, 0]\nmode = "production"\naudience = "client"\nmeasurements = ["{"ab" * 32}"]\n'
    status = '[[accepted_statuses]]\nstatus = "SWHardeningNeeded"\nadvisories = ["INTEL-SA-00615"]\n'
    return [client.encode(), (client + status).encode()]


def _settings(data: bytes) -> None:
    config.load(GatewaySettings, _file(data))


def _manifest(data: bytes) -> None:
    """A manifest whose signature is good, as a developer's tool gone wrong would write: the first byte says which."""
    kind, text = (ClientManifest if data[:1] > b"\x7f" else Manifest), data[1:]
    context = f"stip/{kind.__name__}\x00".encode()
    kind.parse(text, material.SIGNING.sign(context + text), material.SIGNING.public_key())


def _manifests() -> list[bytes]:
    digest = FileDigest(sha256="ab" * 32, size=4)
    server = Manifest(
        instance=material.INSTANCE, epoch=0, preset="hardened", dtype="float32", width=64, vocabulary=512,
        max_positions=256, output="hidden", server={"config.json": digest}, enclave={"embedding.sealed": digest},
        certificate={"top1_agreement": 1.0},
    )  # fmt: skip
    client = ClientManifest(instance=material.INSTANCE, epoch=0, vocabulary=512, max_positions=256, stop_ids=(2,),
                            files={"tokenizer.json": digest})  # fmt: skip
    return [b"\x00" + server.to_json(), b"\xff" + client.to_json()]


def _signed_head() -> bytes:
    return Signed.sign(AuditHead(sequence=0, hash=bytes(32), at=material.NOW), material.SIGNING).to_bytes()


def _heads(data: bytes) -> None:
    for head in Heads.from_json(data).heads:
        open_head(head, material.SIGNING.public_key())


def _export(data: bytes) -> None:
    path = _file(data)
    for _ in auditexport.entries_of(path):
        pass
    auditexport.verify_file(path, material.SIGNING.public_key())


def _exports() -> list[bytes]:
    key = material.SIGNING.public_key()
    header: dict[str, object] = {"format": auditexport.FORMAT, "version": [1, 0], "service": service_id(key).hex(),
              "public_key": key.public_bytes_raw().hex(), "at": material.NOW}  # fmt: skip
    entry = AuditEntry.model_construct(sequence=1, at=material.NOW, event="release", code="granted")
    lines: list[list[dict[str, object]]] = [
        [header, {"head": None, "entries": 0}],
        [header, {"head": base64.b64encode(_signed_head()).decode(), "entries": 0}],
        [header, {"entry": base64.b64encode(entry.to_bytes()).decode()},
         {"head": base64.b64encode(_signed_head()).decode(), "entries": 1}],
    ]  # fmt: skip
    return ["".join(json.dumps(line) + "\n" for line in export).encode() for export in lines]


TARGETS = (
    Target("policy", _policy, lambda: _shown("config*/policy.toml")),
    Target("evidence-policy", _evidence_policy, _evidence_policies),
    Target("configuration", _settings, lambda: _shown("config*/gateway.toml")),
    Target("manifest", _manifest, _manifests),
    Target(
        "audit-heads", _heads, lambda: [Heads(service_id(material.SIGNING.public_key()), (_signed_head(),)).to_json()]
    ),
    Target("audit-export", _export, _exports),
)
