"""Verification of an SGX enclave's evidence: one implementation, told step by step or as one answer.

No environment variable, file or clock is read here: time, policy and the simulated root are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

from stip_protocol.attestation.checks import CHECKS, EnclaveCase
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.gates import Platform, Status, Step, at, decide, require_report_data, steps
from stip_protocol.attestation.policy import EvidencePolicy

__all__ = ["Platform", "Status", "Step", "Verified", "examine", "verify"]


@dataclass(frozen=True, slots=True)
class Verified:
    """What accepted evidence establishes. `measurement` is MRENCLAVE, `signer` MRSIGNER."""

    measurement: bytes
    signer: bytes
    isv_prod_id: int
    isv_svn: int
    tcb_status: str
    advisories: tuple[str, ...]
    tcb_evaluation_number: int
    """Of the collateral: Intel's round of TCB recovery."""
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
    case = decide(_case(evidence, policy, report_data, now, root_der), CHECKS)
    quote, found = case.quote, case.appraisal
    return Verified(
        measurement=quote.mrenclave,
        signer=quote.mrsigner,
        isv_prod_id=quote.isv_prod_id,
        isv_svn=quote.isv_svn,
        tcb_status=found.status,
        advisories=found.advisories,
        tcb_evaluation_number=found.evaluation_number,
        simulated=case.simulated,
        platform=Platform.of(found),
        collateral_expires=int(case.expires.timestamp()),
    )


def examine(
    evidence: Evidence, policy: EvidencePolicy, *, report_data: bytes, now: int, root_der: bytes | None = None
) -> list[Step]:
    """Every condition with its outcome, in order, for people to read. Same arguments and decisions as `verify`."""
    return steps(_case(evidence, policy, report_data, now, root_der), CHECKS)


def _case(
    evidence: Evidence, policy: EvidencePolicy, report_data: bytes, now: int, root_der: bytes | None
) -> EnclaveCase:
    return EnclaveCase(evidence, policy, require_report_data(report_data), at(now), root_der)
