"""Evidence that a simulated platform would never give: quotes and collateral altered, and signed again by its keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from stip_protocol.attestation.certificates import SGX_EXTENSION
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.verifier import verify
from stip_stack.tee import Faults, SimulatedPlatform, SimulatedProvider
from stip_stack.tee import collateral as simulated
from stip_stack.tee.pki import Pki, sgx_extension
from stip_stack.tee.quoting import EnclaveIdentity, quote

DAY = 24 * 3600
Edit = Callable[[dict[str, Any]], None]


class Forge:
    """Whoever holds all keys of a simulated platform."""

    def __init__(self, pki: Pki, now: int) -> None:
        self.pki, self.now = pki, now

    @classmethod
    def of(cls, platform: SimulatedPlatform, now: int) -> Self:
        return cls(Pki.load(platform.directory), now)

    def collateral(self, **faults: Any) -> dict[str, Any]:
        """What the platform would give now, as a mapping."""
        found = json.loads(simulated.issue(self.pki, self.at(0), Faults(**faults)))
        assert isinstance(found, dict)
        return found

    def with_tcb_info(self, edit: Edit) -> bytes:
        """Collateral with an edited TCB info, signed by the TCB signer."""
        return self._edited("tcb_info", edit)

    def with_qe_identity(self, edit: Edit) -> bytes:
        return self._edited("qe_identity", edit)

    def with_crl(self, field: str, role: str, *, revoked: Iterable[str] = (), opens: int, closes: int) -> bytes:
        """Collateral with a revocation list by `role` that holds from `opens` to `closes` (seconds from now)."""
        crl = self.pki.crl(role, revoked, self.at(opens), self.at(closes)).hex()
        return dump(self.collateral() | {field: crl})

    def reissued(
        self, role: str, by: str, *, opens: int = -DAY, closes: int = DAY, name: str | None = None, sgx: bytes = b""
    ) -> Forge:
        """The same hierarchy with one certificate issued anew: for its dates, its name or what it says of SGX."""
        old = self.pki.certificates[role]
        subject = old.subject if name is None else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.pki.certificates[by].subject)
            .public_key(old.public_key())
            .serial_number(old.serial_number)
            .not_valid_before(self.at(opens))
            .not_valid_after(self.at(closes))
        )
        for extension in old.extensions:
            value = extension.value
            if sgx and extension.oid == SGX_EXTENSION:
                value = x509.UnrecognizedExtension(SGX_EXTENSION, sgx)
            builder = builder.add_extension(value, critical=extension.critical)
        made = builder.sign(self.pki.keys[by], hashes.SHA256())
        return type(self)(replace(self.pki, certificates=self.pki.certificates | {role: made}), self.now)

    def elsewhere(self) -> Forge:
        """Another platform under the same root."""
        other = sgx_extension(ppid=b"elsewhere-ppid!!", platform_instance_id=b"i" * 16)
        return self.reissued("pck", "pck_ca", sgx=other)

    def ppid(self) -> bytes:
        """Of this platform: what a policy enrols."""
        enclave = EnclaveIdentity(bytes(32), bytes(32), 1, 1)
        evidence = Evidence(quote(self.pki, enclave, bytes(64), Faults()), dump(self.collateral()))
        root = self.pki.certificates["root"].public_bytes(Encoding.DER)
        pinned = hashlib.sha256(root).digest()
        rules = EvidencePolicy(mode="development", measurements=(bytes(32),), simulated_root_sha256=pinned)
        return verify(evidence, rules, report_data=bytes(64), now=self.now).platform.ppid

    def at(self, seconds: int) -> datetime:
        return datetime.fromtimestamp(self.now, tz=UTC) + timedelta(seconds=seconds)

    def provider(self, like: SimulatedProvider) -> SimulatedProvider:
        """A provider as `like`, of this hierarchy."""
        return replace(like, _pki=self.pki)

    def _edited(self, field: str, edit: Edit) -> bytes:
        collateral = self.collateral()
        value = json.loads(collateral[field])
        edit(value)
        text = json.dumps(value, separators=(",", ":"))
        signature = self.pki.sign("tcb_signer", text.encode()).hex()
        return dump(collateral | {field: text, f"{field}_signature": signature})


def dump(collateral: dict[str, Any]) -> bytes:
    return json.dumps(collateral).encode()


def date(value: datetime) -> str:
    return f"{value:%Y-%m-%dT%H:%M:%SZ}"


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
