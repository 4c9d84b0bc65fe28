"""Conditions that evidence of every TEE must meet, and how a table of conditions is gone through.

The gates of a table come first and establish that the evidence is genuine; after a gate that fails nothing further is
known, so the rest is skipped. What follows compares genuine values with the policy, each on its own. The tables:
`checks` for SGX enclaves, `hosts` for TDX hosts.
"""

from __future__ import annotations

import hashlib
import hmac
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from stip_protocol.attestation import dcap
from stip_protocol.attestation.certificates import Certificate, read_chain, require_pck_chain, require_tcb_signer
from stip_protocol.attestation.collateral import Collateral, Window, parsed
from stip_protocol.attestation.evidence import REPORT_DATA, Evidence
from stip_protocol.attestation.policy import EvidenceRules
from stip_protocol.attestation.roots import intel_sgx_root
from stip_protocol.errors import (
    AttestationError,
    CollateralExpired,
    EvidenceRefused,
    ReportDataMismatch,
    SimulatedEvidenceRefused,
)

TCB_INFO_VERSION = 3
QE_IDENTITY_VERSION = 2


class Quote(Protocol):
    """What every kind of quote has."""

    @property
    def certification_data(self) -> bytes:
        """The embedded PCK chain."""

    @property
    def report_data(self) -> bytes:
        """64 bytes."""


class Tee(NamedTuple):
    """How a TEE is called in its collateral."""

    title: str
    tcb_info_id: str
    qe_identity_id: str


Q = TypeVar("Q", bound=Quote)
P = TypeVar("P", bound=EvidenceRules)
C = TypeVar("C", bound="Case[Any, Any]")


@dataclass(frozen=True)
class Case(ABC, Generic[Q, P]):
    """One piece of evidence before one policy. Derived values are computed once and raise their own refusals."""

    tee: ClassVar[Tee]

    evidence: Evidence
    policy: P
    report_data: bytes
    now: datetime
    root_der: bytes | None

    @abstractmethod
    def read_quote(self) -> Q:
        """The parsed quote. Raises `EvidenceMalformed`."""

    @cached_property
    def quote(self) -> Q:
        return self.read_quote()

    @cached_property
    def collateral(self) -> Collateral:
        return parsed(self.evidence.collateral)

    @cached_property
    def pck_chain(self) -> tuple[Certificate, ...]:
        """Leaf, PCK CA, root as embedded in the quote; quoting enclaves close the PEM with a NUL."""
        return read_chain(self.quote.certification_data.removesuffix(b"\x00"), what="PCK chain")

    @cached_property
    def anchor(self) -> bytes:
        """DER of the only root that evidence may chain to under this policy."""
        pinned = self.policy.simulated_root_sha256
        if pinned is None:
            if self.root_der is not None:
                raise SimulatedEvidenceRefused.because("trust anchor", "a simulated root", "Intel SGX Root CA only")
            return intel_sgx_root()
        candidate = self.pck_chain[-1].der if self.root_der is None else self.root_der
        if not hmac.compare_digest(hashlib.sha256(candidate).digest(), pinned):
            raise EvidenceRefused.because("trust anchor", _sha256(candidate), f"SHA-256 {pinned.hex()}")
        return candidate

    @property
    def simulated(self) -> bool:
        return self.anchor != intel_sgx_root()

    @cached_property
    def appraisal(self) -> dcap.Appraisal:
        return dcap.appraise(self.evidence.quote, self.collateral, self.anchor, int(self.now.timestamp()))

    @property
    def windows(self) -> tuple[Window, ...]:
        chain = (Window(f"certificate {one.name!a}", one.not_before, one.not_after) for one in self.pck_chain)
        return (*self.collateral.windows(), *chain)

    @property
    def expires(self) -> datetime:
        return min(window.closes for window in self.windows)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check compared. `error` is the refusal, None where the check passed."""

    expected: str
    got: str
    error: AttestationError | None = None


@dataclass(frozen=True, slots=True)
class Check(Generic[C]):
    name: str
    run: Callable[[C], Finding]
    remedy: str
    gate: bool


class Status(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Step:
    """One condition and how it went. `remedy` is empty unless it failed."""

    name: str
    status: Status
    expected: str = ""
    got: str = ""
    remedy: str = ""
    error: AttestationError | None = field(default=None, repr=False, compare=False)
    """What `decide` raises for this step."""


@dataclass(frozen=True, slots=True)
class Platform:
    """Who signed: identifiers from the PCK certificate."""

    ppid: bytes
    instance_id: bytes | None
    fmspc: bytes

    @classmethod
    def of(cls, found: dcap.Appraisal) -> Platform:
        return cls(ppid=found.ppid, instance_id=found.platform_instance_id, fmspc=found.fmspc)


def steps(case: C, checks: Sequence[Check[C]]) -> list[Step]:
    """Every condition with its outcome, in order."""
    taken: list[Step] = []
    open_gate = True
    for check in checks:
        if not open_gate:
            taken.append(Step(check.name, Status.SKIPPED))
            continue
        try:
            finding = check.run(case)
        except AttestationError as error:
            finding = Finding("no refusal", error.message, error)
        failed = finding.error is not None
        taken.append(
            Step(
                check.name,
                Status.FAILED if failed else Status.PASSED,
                finding.expected,
                finding.got,
                check.remedy if failed else "",
                finding.error,
            )
        )
        open_gate = not (failed and check.gate)
    return taken


def decide(case: C, checks: Sequence[Check[C]]) -> C:
    """`case`, where every condition holds. Raises the refusal of the first one that does not."""
    for step in steps(case, checks):
        if step.error is not None:
            raise step.error
    return case


def require_report_data(report_data: bytes) -> bytes:
    """What a caller wants bound, where it is 64 bytes. Raises `ReportDataMismatch`."""
    if len(report_data) != REPORT_DATA:
        raise ReportDataMismatch.because("expected report data", f"{len(report_data)} bytes", f"{REPORT_DATA} bytes")
    return report_data


def at(now: int) -> datetime:
    """Unix seconds as an aware date."""
    return datetime.fromtimestamp(now, tz=UTC)


def _sha256(data: bytes) -> str:
    return f"SHA-256 {hashlib.sha256(data).hexdigest()}"


def compare(refusal: type[AttestationError], name: str, ok: bool, got: object, expected: object) -> Finding:
    return Finding(str(expected), str(got), None if ok else refusal.because(name, got, expected))


def well_formed(case: Case[Any, Any]) -> Finding:
    quote, collateral = len(case.evidence.quote), len(case.evidence.collateral)
    size = f"{case.tee.title}, {quote} bytes; collateral, {collateral} bytes"
    chains = (case.pck_chain, case.collateral.tcb_chain, case.collateral.qe_chain, case.collateral.crl_chain)
    return compare(
        EvidenceRefused, "certificate chains", all(chains), size if all(chains) else "an empty chain", "well-formed"
    )


def trust_anchor(case: Case[Any, Any]) -> Finding:
    anchor = case.anchor
    for name, chain in (
        ("embedded root", case.pck_chain),
        ("TCB info root", case.collateral.tcb_chain),
        ("QE identity root", case.collateral.qe_chain),
        ("PCK CRL root", case.collateral.crl_chain),
    ):
        if chain[-1].der != anchor:
            return compare(_foreign_root(case, chain), name, False, _sha256(chain[-1].der), _sha256(anchor))
    return Finding(_sha256(anchor), _sha256(anchor))


def _foreign_root(case: Case[Any, Any], chain: tuple[Certificate, ...]) -> type[AttestationError]:
    """A whole hierarchy under another root is somebody's simulation; a root that signed nothing is tampering."""
    whole = all(child.issued_by(parent) for child, parent in zip(chain, (*chain[1:], chain[-1]), strict=True))
    return SimulatedEvidenceRefused if whole and case.policy.simulated_root_sha256 is None else EvidenceRefused


def dates(case: Case[Any, Any]) -> Finding:
    for window in case.windows:
        if not window.opens <= case.now <= window.closes:
            allowed = f"{window.opens:%Y-%m-%dT%H:%M:%SZ} to {window.closes:%Y-%m-%dT%H:%M:%SZ}"
            return compare(CollateralExpired, window.what, False, f"{case.now:%Y-%m-%dT%H:%M:%SZ}", allowed)
    return Finding(f"before {case.expires:%Y-%m-%dT%H:%M:%SZ}", f"{case.now:%Y-%m-%dT%H:%M:%SZ}")


def roles(case: Case[Any, Any]) -> Finding:
    require_pck_chain(case.pck_chain)
    require_tcb_signer(case.collateral.tcb_chain, "TCB info")
    require_tcb_signer(case.collateral.qe_chain, "QE identity")
    _, authority, root = case.pck_chain
    crl_chain = [one.der for one in case.collateral.crl_chain]
    if crl_chain != [authority.der, root.der]:
        raise EvidenceRefused.because("PCK CRL chain", "another PCK CA", "the one that issued the PCK certificate")
    issuers = (case.collateral.root_crl.issuer, case.collateral.pck_crl.issuer)
    if issuers != (root.parsed.subject, authority.parsed.subject):
        raise EvidenceRefused.because("CRL issuers", "others", "the root and the PCK CA of this chain")
    return Finding("PCK chain of three, TCB signing directly below the root", "PCK chain of three, TCB signing")


def genuine(case: Case[Any, Any]) -> Finding:
    return Finding("signatures, revocation lists and TCB levels hold", f"verified, {case.appraisal.status}")


def platform_binding(case: Case[Any, Any]) -> Finding:
    info, identity, found = case.collateral.tcb_info, case.collateral.qe_identity, case.appraisal
    got = (info.id, info.version, identity.id, identity.version, info.fmspc.hex(), info.pce_id.hex())
    tee = case.tee
    labels = (tee.tcb_info_id, TCB_INFO_VERSION, tee.qe_identity_id, QE_IDENTITY_VERSION)
    wanted = (*labels, found.fmspc.hex(), found.pce_id.hex())
    names = "TCB info id, version, QE identity id, version, FMSPC, PCEID"
    return compare(EvidenceRefused, names, got == wanted, listed(got), listed(wanted))


def tcb_status(case: Case[Any, Any]) -> Finding:
    found = case.appraisal
    accepted = {rule.status: rule.advisories for rule in case.policy.accepted_statuses}
    ok = set(found.advisories) <= set(accepted.get(found.status, ())) if found.status in accepted else False
    expected = "; ".join(listed((status, *advisories)) for status, advisories in accepted.items())
    return compare(EvidenceRefused, "TCB status", ok, listed((found.status, *found.advisories)), expected)


def evaluation_number(case: Case[Any, Any]) -> Finding:
    got, least = case.appraisal.evaluation_number, case.policy.minimum_tcb_evaluation_number
    return compare(EvidenceRefused, "TCB evaluation number", got >= least, got, f"at least {least}")


def collateral_age(case: Case[Any, Any]) -> Finding:
    age, most = case.now - case.collateral.issued, timedelta(seconds=case.policy.collateral_max_age_seconds)
    return compare(CollateralExpired, "collateral age", age <= most, age, f"at most {most}")


def platform(case: Case[Any, Any]) -> Finding:
    found, enrolled = case.appraisal, case.policy.platforms
    names = [name for name in (found.platform_instance_id, found.ppid) if name is not None]
    ok = enrolled is None or any(name in enrolled for name in names)
    expected = "any genuine platform" if enrolled is None else f"one of {len(enrolled)} enrolled platforms"
    return compare(EvidenceRefused, "platform", ok, listed(name.hex() for name in names), expected)


def report_data(case: Case[Any, Any]) -> Finding:
    ok = hmac.compare_digest(case.quote.report_data, case.report_data)
    return compare(ReportDataMismatch, "report data", ok, case.quote.report_data.hex(), case.report_data.hex())


def listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


PLATFORM_REMEDY = "The operator updates microcode, BIOS and quoting enclave, or the policy accepts what is known."
STOP = "Do not use this enclave. Ask its operator for genuine evidence."
