"""Every condition that evidence of an SGX enclave must meet, as one table in the order they are tried."""

from __future__ import annotations

from typing import ClassVar

from stip_protocol.attestation import gates
from stip_protocol.attestation.gates import PLATFORM_REMEDY, STOP, Case, Check, Finding, Tee, compare, listed
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.quote import Attributes, SgxQuote
from stip_protocol.errors import DebugEnclaveRefused, EvidenceRefused, MeasurementRefused

REQUIRED = Attributes.INIT | Attributes.MODE64
PERMITTED = REQUIRED | Attributes.CET | Attributes.KSS | Attributes.AEX_NOTIFY
"""Attributes of an ordinary enclave. PROVISION_KEY and EINITTOKEN_KEY belong to Intel's own enclaves; bits that
this version does not know are refused."""


class EnclaveCase(Case[SgxQuote, EvidencePolicy]):
    """Evidence of an SGX enclave."""

    tee: ClassVar[Tee] = Tee("SGX quote version 3", "SGX", "QE")

    def read_quote(self) -> SgxQuote:
        return SgxQuote.parse(self.evidence.quote)


def _not_debug(case: EnclaveCase) -> Finding:
    debug = Attributes.DEBUG in case.quote.attributes
    return compare(DebugEnclaveRefused, "enclave", not debug, "debug" if debug else "production", "production")


def _attributes(case: EnclaveCase) -> Finding:
    got = case.quote.attributes
    # As integers: the complement of an IntFlag leaves out the bits that the flag does not name.
    ok = REQUIRED in got and not int(got) & ~int(PERMITTED)
    return compare(EvidenceRefused, "attributes", ok, f"{got:#x}", f"{REQUIRED:#x}, others only of {PERMITTED:#x}")


def _measurement(case: EnclaveCase) -> Finding:
    quote, policy = case.quote, case.policy
    ok = quote.mrenclave in policy.measurements or any(
        (quote.mrsigner, quote.isv_prod_id) == (rule.mrsigner, rule.isv_prod_id)
        and quote.isv_svn >= rule.minimum_isv_svn
        for rule in policy.signers
    )
    signers = [
        f"signer {rule.mrsigner.hex()} product {rule.isv_prod_id} from SVN {rule.minimum_isv_svn}"
        for rule in policy.signers
    ]
    expected = listed([*(measurement.hex() for measurement in policy.measurements), *signers])
    got = quote.mrenclave.hex()
    if signers:
        got += f" (signer {quote.mrsigner.hex()} product {quote.isv_prod_id} SVN {quote.isv_svn})"
    return compare(MeasurementRefused, "measurement", ok, got, expected)


CHECKS: tuple[Check[EnclaveCase], ...] = (
    Check("form", gates.well_formed, STOP, gate=True),
    Check(
        "trust anchor",
        gates.trust_anchor,
        "A simulated TEE protects nothing: use SGX hardware, or choose development mode explicitly for a trial.",
        gate=True,
    ),
    Check("dates", gates.dates, "The enclave's host fetches new collateral; check this machine's clock.", gate=True),
    Check("certificate roles", gates.roles, STOP, gate=True),
    Check("debug", _not_debug, "The operator runs the enclave with sgx.debug = false.", gate=True),
    Check("signatures", gates.genuine, STOP, gate=True),
    Check(
        "platform binding", gates.platform_binding, "The host fetches the collateral of its own platform.", gate=True
    ),
    Check("TCB status", gates.tcb_status, PLATFORM_REMEDY, gate=False),
    Check("TCB evaluation number", gates.evaluation_number, "The enclave's host fetches new collateral.", gate=False),
    Check("collateral age", gates.collateral_age, "The enclave's host fetches new collateral.", gate=False),
    Check("attributes", _attributes, STOP, gate=False),
    Check(
        "measurement",
        _measurement,
        "Compare the release notes: update the policy for a release you trust, otherwise do not use this enclave.",
        gate=False,
    ),
    Check("platform", gates.platform, "Enrol the platform in the policy, or use an enrolled one.", gate=False),
    Check(
        "report data", gates.report_data, "Connect and attest again: the evidence is for another channel.", gate=False
    ),
)
