"""Verification of evidence: one implementation, told step by step or as one answer.

No environment variable, file or clock is read here: time, policy and the simulated root are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from stip_protocol.attestation.checks import CHECKS, Case, Finding, at
from stip_protocol.attestation.evidence import REPORT_DATA, Evidence
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.errors import AttestationError, ReportDataMismatch


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
    """What `verify` raises for this step."""


@dataclass(frozen=True, slots=True)
class Platform:
    """Who signed: identifiers from the PCK certificate."""

    ppid: bytes
    instance_id: bytes | None
    fmspc: bytes


@dataclass(frozen=True, slots=True)
class Verified:
    """What accepted evidence establishes. `measurement` is MRENCLAVE, `signer` MRSIGNER."""

    measurement: bytes
    signer: bytes
    isv_prod_id: int
    isv_svn: int
    tcb_status: str
    advisories: tuple[str, ...]
    simulated: bool
    platform: Platform
    collateral_expires: int
    """Unix seconds at which the first piece of collateral runs out."""


def verify(
    evidence: Evidence, policy: EvidencePolicy, *, report_data: bytes, now: int, root_der: bytes | None = None
) -> Verified:
    """Accept `evidence` under `policy`, or raise the refusal of the first condition that fails.

    `report_data`: the 64 bytes the quote must bind. `now`: Unix seconds. `root_der`: the simulated root, which
    must have the hash that a development policy pins; without it the root in the evidence must have that hash.
    A production policy takes Intel's root alone.

    Raises `EvidenceMalformed`, `EvidenceRefused`, `CollateralExpired`, `SimulatedEvidenceRefused`,
    `DebugEnclaveRefused`, `MeasurementRefused`, `ReportDataMismatch`.
    """
    case = _case(evidence, policy, report_data, now, root_der)
    for step in _steps(case):
        if step.error is not None:
            raise step.error
    quote, found = case.quote, case.appraisal
    return Verified(
        measurement=quote.mrenclave,
        signer=quote.mrsigner,
        isv_prod_id=quote.isv_prod_id,
        isv_svn=quote.isv_svn,
        tcb_status=found.status,
        advisories=found.advisories,
        simulated=case.simulated,
        platform=Platform(ppid=found.ppid, instance_id=found.platform_instance_id, fmspc=found.fmspc),
        collateral_expires=int(case.expires.timestamp()),
    )


def examine(
    evidence: Evidence, policy: EvidencePolicy, *, report_data: bytes, now: int, root_der: bytes | None = None
) -> list[Step]:
    """Every condition with its outcome, in order, for people to read. Same arguments and decisions as `verify`."""
    return _steps(_case(evidence, policy, report_data, now, root_der))


def _case(evidence: Evidence, policy: EvidencePolicy, report_data: bytes, now: int, root_der: bytes | None) -> Case:
    if len(report_data) != REPORT_DATA:
        raise ReportDataMismatch.because("expected report data", f"{len(report_data)} bytes", f"{REPORT_DATA} bytes")
    return Case(evidence, policy, report_data, at(now), root_der)


def _steps(case: Case) -> list[Step]:
    steps: list[Step] = []
    open_gate = True
    for check in CHECKS:
        if not open_gate:
            steps.append(Step(check.name, Status.SKIPPED))
            continue
        try:
            finding = check.run(case)
        except AttestationError as error:
            finding = Finding("no refusal", error.message, error)
        failed = finding.error is not None
        steps.append(
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
    return steps
