"""Accepted evidence against the policy of today: a lease's enclave does not survive a policy that would refuse it.

What a quote proved does not change after it was verified; what is accepted does. `EnclaveFacts` keep what it proved,
and every renewal asks the same questions again as the release did, except those about time (dates, collateral age),
which have their answer: the lease is short.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.errors import EvidenceRefused, MeasurementRefused, SimulatedEvidenceRefused

if TYPE_CHECKING:
    from stip_keyservice.service.release import EnclaveFacts


def require_enclave(policy: EvidencePolicy, enclave: EnclaveFacts) -> None:
    """Raises `SimulatedEvidenceRefused`, `MeasurementRefused` or `EvidenceRefused`, as its evidence would today."""
    _require_anchor(policy, enclave)
    _require_measurement(policy, enclave)
    _require_tcb(policy, enclave)
    _require_platform(policy, enclave)


def _require_anchor(policy: EvidencePolicy, enclave: EnclaveFacts) -> None:
    if enclave.simulated != (policy.simulated_root_sha256 is not None):
        got, allowed = ("simulated", "Intel's") if enclave.simulated else ("Intel's", "the simulated root's")
        raise SimulatedEvidenceRefused.because("enclave's evidence", got, allowed)


def _require_measurement(policy: EvidencePolicy, enclave: EnclaveFacts) -> None:
    signed = any(
        (rule.mrsigner, rule.isv_prod_id) == (enclave.signer, enclave.isv_prod_id)
        and enclave.isv_svn >= rule.minimum_isv_svn
        for rule in policy.signers
    )
    if enclave.measurement not in policy.measurements and not signed:
        raise MeasurementRefused.because("measurement", enclave.measurement.hex(), "one that the policy accepts")


def _require_tcb(policy: EvidencePolicy, enclave: EnclaveFacts) -> None:
    accepted = {rule.status: rule.advisories for rule in policy.accepted_statuses}
    advisories = next((accepted[status] for status in accepted if status == enclave.tcb_status), None)
    if advisories is None or not set(enclave.advisories) <= set(advisories):
        got = ", ".join((enclave.tcb_status, *enclave.advisories))
        raise EvidenceRefused.because("TCB status", got, "one that the policy accepts, with its advisories")
    least = policy.minimum_tcb_evaluation_number
    if enclave.tcb_evaluation_number < least:
        raise EvidenceRefused.because("TCB evaluation number", enclave.tcb_evaluation_number, f"at least {least}")


def _require_platform(policy: EvidencePolicy, enclave: EnclaveFacts) -> None:
    enrolled = policy.platforms
    if enrolled is not None and not any(name in enrolled for name in enclave.platforms):
        raise EvidenceRefused.because("platform", "one that is not enrolled", f"one of {len(enrolled)} enrolled ones")
