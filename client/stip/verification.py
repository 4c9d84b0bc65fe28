"""The verification document: what was checked about an enclave before a prompt may go there, step by step.

No network here: bytes, policy and time come in, a `Verification` comes out; `stip.channel` fetches. The order is
fixed, the first failure ends it, and what was not reached is `skipped`, so that a document never looks
better than it is.

1. `client manifest`: the tokenizer files are those the model developer signed.
2. `certificate`: the TLS certificate names the host and carries a quote that binds its key.
3. `channel`, `freshness`: the holder of that key answered this nonce over this channel.
4. `certificate evidence: …` and `fresh evidence: …`: both quotes, by every condition of
   `stip_protocol.attestation.checks`, under the user's policy.
5. `same enclave`: both quotes are about one measurement.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from stip.profile import Profile, Trust
from stip.tokenizer import Tokenizer
from stip_protocol.attestation import freshness, ratls
from stip_protocol.attestation.checks import CHECKS
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.verifier import Status, Step, Verified, examine, verify
from stip_protocol.errors import (
    AttestationError,
    ChannelChanged,
    EvidenceRefused,
    IntegrityError,
    MeasurementRefused,
    StipError,
)

CERTIFICATE_EVIDENCE = "certificate evidence: "
FRESH_EVIDENCE = "fresh evidence: "
STEPS: tuple[str, ...] = (
    "client manifest",
    "certificate",
    "channel",
    "freshness",
    *(CERTIFICATE_EVIDENCE + check.name for check in CHECKS),
    *(FRESH_EVIDENCE + check.name for check in CHECKS),
    "same enclave",
)
"""Names of all steps, in order."""
SIMULATION_WARNING = (
    "WARNING: SIMULATED ENCLAVE. Development mode: the evidence was made by software, no hardware protects "
    "prompts or answers. Never send real data."
)
AUDIT_LOG_CHECKED = "checked with every session"
AUDIT_LOG_SKIPPED = "skipped: the profile names no service_key"
_ANOTHER_ENCLAVE = "Do not use this enclave. Ask its operator for genuine evidence."


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, when, and what it came to. `refusal` is what `stip.connect` raises; None where verified."""

    enclave: str
    instance: str
    mode: str
    at: int
    """Unix seconds."""
    steps: tuple[Step, ...]
    refusal: StipError | None = None
    measurement: bytes | None = None
    enclave_key: bytes | None = None
    """SHA-256 of the certificate's SubjectPublicKeyInfo."""
    tcb_status: str | None = None
    advisories: tuple[str, ...] = ()
    simulated: bool | None = None
    """None where it was refused before this could be told."""
    collateral_expires: int | None = None
    """Unix seconds."""
    audit_log: str = ""
    """Whether the heads of the key service's audit log will be held against each other."""

    @property
    def verified(self) -> bool:
        return self.refusal is None and all(step.status is Status.PASSED for step in self.steps)

    def summary(self) -> dict[str, Any]:
        """The document without its steps."""
        return {
            "verified": self.verified,
            "simulated": self.simulated,
            **({"warning": SIMULATION_WARNING} if self.simulated else {}),
            "enclave": self.enclave,
            "instance": self.instance,
            "mode": self.mode,
            "at": _utc(self.at),
            "measurement": self.measurement.hex() if self.measurement else None,
            "enclave_key": self.enclave_key.hex() if self.enclave_key else None,
            "tcb_status": self.tcb_status,
            "advisories": list(self.advisories),
            "collateral_expires": _utc(self.collateral_expires),
            "audit_log": self.audit_log,
            "refusal": None
            if self.refusal is None
            else {"code": self.refusal.code, "action": self.refusal.action.value, "message": self.refusal.message},
        }

    def document(self) -> dict[str, Any]:
        """The whole document, as JSON takes it."""
        steps = [
            {
                "name": step.name,
                "status": step.status.value,
                "expected": step.expected,
                "got": step.got,
                "remedy": step.remedy,
            }
            for step in self.steps
        ]
        return {**self.summary(), "steps": steps}

    def to_json(self) -> str:
        return json.dumps(self.document(), indent=2)


@dataclass
class _Note:
    """What a step got, once it is known."""

    got: str = ""


class Examination:
    """One verification under way. Each method records its steps and raises the refusal of the first that fails."""

    def __init__(self, profile: Profile, trust: Trust, *, clock: Callable[[], float]) -> None:
        self._profile = profile
        self._trust = trust
        self._clock = clock
        self._steps: list[Step] = []
        self._certificate: ratls.RaTls | None = None
        self._verified: Verified | None = None

    def manifest(self, developer: Ed25519PublicKey) -> Tokenizer:
        """Load the tokenizer that the client manifest vouches for."""
        with self._step(
            "client manifest",
            f"signed by the developer, for instance {self._profile.instance}",
            "Get the client folder of this instance again from the model developer.",
        ) as note:
            loaded = Tokenizer.open(self._profile.tokenizer, developer, instance=self._profile.instance)
            note.got = f"signed, {len(loaded.manifest.files)} files match"
        return loaded

    def certificate(self, der: bytes, *, pinned: bytes | None) -> ratls.RaTls:
        """The certificate that the enclave's address presents: `pinned`, where one was verified before."""
        name = self._profile.server_name
        with self._step(
            "certificate",
            f"an RA-TLS certificate for {name} whose quote binds its key",
            "Check address and server_name; otherwise ask the enclave's operator for an RA-TLS certificate.",
        ) as note:
            if pinned is not None and not hmac.compare_digest(der, pinned):
                raise ChannelChanged("enclave: presents another certificate than the verified one; connect again")
            found = self._certificate = ratls.read(der, now=self._now())
            _require_name(der, name)
            note.got = f"key SHA-256 {found.spki_sha256.hex()}"
        return found

    @contextmanager
    def channel(self) -> Iterator[None]:
        """Around the challenge: the holder of the certificate's key, and nobody else, must answer it."""
        with self._step("channel", "the certificate's key answers", "Connect again.") as note:
            yield
            note.got = "pinned, answered"

    def answer(self, certificate: ratls.RaTls, nonce: bytes, claims: bytes, quote: bytes, collateral: bytes) -> None:
        """What the enclave answered to `nonce` over the channel of that certificate."""
        with self._step(
            "freshness",
            f"nonce {nonce.hex()} and the certificate's key",
            "Connect again. If it stays, somebody replays or relays evidence: do not use this enclave.",
        ) as note:
            report_data = freshness.check(claims, nonce=nonce, tls_key=certificate.spki_sha256)
            note.got = "this nonce and the certificate's key"
        held = self._judge(CERTIFICATE_EVIDENCE, certificate.quote, collateral, certificate.report_data)
        fresh = self._judge(FRESH_EVIDENCE, quote, collateral, report_data)
        with self._step("same enclave", f"measurement {held.measurement.hex()}", _ANOTHER_ENCLAVE) as note:
            if not hmac.compare_digest(held.measurement, fresh.measurement):
                raise MeasurementRefused.because("fresh measurement", fresh.measurement.hex(), held.measurement.hex())
            note.got = f"measurement {fresh.measurement.hex()}"
        self._verified = fresh

    def finish(self, refusal: StipError | None) -> Verification:
        """The document: steps that were not reached are skipped."""
        reached = {step.name: step for step in self._steps}
        steps = tuple(reached.get(name, Step(name, Status.SKIPPED)) for name in STEPS)
        found = self._verified
        return Verification(
            enclave=self._profile.enclave,
            instance=self._profile.instance,
            mode=self._profile.mode,
            at=self._now(),
            steps=steps,
            refusal=refusal,
            measurement=found.measurement if found else None,
            enclave_key=self._certificate.spki_sha256 if self._certificate else None,
            tcb_status=found.tcb_status if found else None,
            advisories=found.advisories if found else (),
            simulated=found.simulated if found else None,
            collateral_expires=found.collateral_expires if found else None,
            audit_log=AUDIT_LOG_SKIPPED if self._profile.service_key is None else AUDIT_LOG_CHECKED,
        )

    def _now(self) -> int:
        return int(self._clock())

    @contextmanager
    def _step(self, name: str, expected: str, remedy: str) -> Iterator[_Note]:
        """Record one check: passed, or failed by the refusal that leaves it."""
        note = _Note()
        try:
            yield note
        except (AttestationError, IntegrityError) as error:
            self._steps.append(Step(name, Status.FAILED, expected, error.message, remedy))
            raise
        self._steps.append(Step(name, Status.PASSED, expected, note.got))

    def _judge(self, prefix: str, quote: bytes, collateral: bytes, report_data: bytes) -> Verified:
        policy, root, now = self._trust.policy, self._trust.simulated_root, self._now()
        try:
            evidence = Evidence(quote, collateral)
        except AttestationError as error:
            self._steps.append(Step(prefix + CHECKS[0].name, Status.FAILED, "", error.message, CHECKS[0].remedy))
            raise
        for step in examine(evidence, policy, report_data=report_data, now=now, root_der=root):
            self._steps.append(replace(step, name=prefix + step.name))
        return verify(evidence, policy, report_data=report_data, now=now, root_der=root)


def _require_name(der: bytes, server_name: str) -> None:
    """The name must stand among the certificate's DNS names: gRPC insists on it later, with less to say."""
    try:
        names = (
            x509.load_der_x509_certificate(der)
            .extensions.get_extension_for_class(x509.SubjectAlternativeName)
            .value.get_values_for_type(x509.DNSName)
        )
    except x509.ExtensionNotFound:
        names = []
    if server_name not in names:
        raise EvidenceRefused.because("certificate name", ascii(", ".join(names)[:256]), server_name)


def _utc(seconds: int | None) -> str | None:
    return None if seconds is None else f"{datetime.fromtimestamp(seconds, tz=UTC):%Y-%m-%dT%H:%M:%SZ}"
