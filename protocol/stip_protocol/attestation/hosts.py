"""Verification of a TDX host's evidence: the table of its conditions, and the decision.

The gates are those of SGX (`gates`): the same certificates, revocation lists and quoting, another report. No
environment variable, file or clock is read here: time, policy and the simulated root are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import ClassVar

from stip_protocol.attestation import gates
from stip_protocol.attestation.collateral import TcbInfo, TdxModule
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.gates import (
    PLATFORM_REMEDY,
    Case,
    Check,
    Finding,
    Platform,
    Step,
    Tee,
    at,
    compare,
    decide,
    listed,
    require_report_data,
    steps,
)
from stip_protocol.attestation.hostpolicy import HostPolicy
from stip_protocol.attestation.tdx import UNTRUSTED, TdAttributes, TdReport, TdxQuote
from stip_protocol.errors import DebugEnclaveRefused, EvidenceRefused, MeasurementRefused

REQUIRED = TdAttributes.SEPT_VE_DISABLE
"""Without it the host can make the guest handle page faults of the host's choice."""
REFUSED = TdAttributes.MIGRATABLE | TdAttributes.PKS | TdAttributes.KL
"""A migratable TD moves to where its migration TD lets it, which the quote does not show."""
PERMITTED = REQUIRED | TdAttributes.LASS | TdAttributes.TPA | TdAttributes.PERFMON
"""Bits that this version does not know are refused."""


class HostCase(Case[TdxQuote, HostPolicy]):
    """Evidence of a TDX host."""

    tee: ClassVar[Tee] = Tee("TDX quote version 4", "TDX", "TD_QE")

    def read_quote(self) -> TdxQuote:
        return TdxQuote.parse(self.evidence.quote)


@dataclass(frozen=True, slots=True)
class VerifiedHost:
    """What accepted evidence establishes. `measurement` is MRTD."""

    measurement: bytes
    rtmrs: tuple[bytes, ...]
    mrseam: bytes
    attributes: TdAttributes
    tcb_status: str
    advisories: tuple[str, ...]
    simulated: bool
    platform: Platform
    collateral_expires: int
    """Unix seconds at which the first piece of collateral runs out."""


def verify(
    evidence: Evidence, policy: HostPolicy, *, report_data: bytes, now: int, root_der: bytes | None = None
) -> VerifiedHost:
    """Accept `evidence` under `policy`, or raise the refusal of the first condition that fails.

    Arguments and refusals are those of `stip_protocol.attestation.verifier.verify`.
    """
    case = decide(_case(evidence, policy, report_data, now, root_der), CHECKS)
    report, found = case.quote.report, case.appraisal
    return VerifiedHost(
        measurement=report.mrtd,
        rtmrs=report.rtmrs,
        mrseam=report.mrseam,
        attributes=report.td_attributes,
        tcb_status=found.status,
        advisories=found.advisories,
        simulated=case.simulated,
        platform=Platform.of(found),
        collateral_expires=int(case.expires.timestamp()),
    )


def examine(
    evidence: Evidence, policy: HostPolicy, *, report_data: bytes, now: int, root_der: bytes | None = None
) -> list[Step]:
    """Every condition with its outcome, in order, for people to read. Same arguments and decisions as `verify`."""
    return steps(_case(evidence, policy, report_data, now, root_der), CHECKS)


def _case(evidence: Evidence, policy: HostPolicy, report_data: bytes, now: int, root_der: bytes | None) -> HostCase:
    return HostCase(evidence, policy, require_report_data(report_data), at(now), root_der)


def _not_debug(case: HostCase) -> Finding:
    bits = int(case.quote.report.td_attributes) & UNTRUSTED
    return compare(DebugEnclaveRefused, "TD under debug (TUD)", not bits, f"{bits:#04x}", "0x00")


def _module(case: HostCase) -> Finding:
    """Intel, "PCS for TDX, API version 4", Get TDX TCB Info: which identity speaks of which TDX module.

    Its SVN against the identity's TCB levels is dcap-qvl's business.
    """
    report = case.quote.report
    identity = _identity(case.collateral.tcb_info, report)
    got = (report.mrsignerseam.hex(), _masked(report.seam_attributes, identity.mask))
    wanted = (identity.mrsigner.hex(), _masked(identity.attributes, identity.mask))
    return compare(EvidenceRefused, "TDX module signer, attributes", got == wanted, listed(got), listed(wanted))


def _identity(info: TcbInfo, report: TdReport) -> TdxModule:
    major = report.tee_tcb_svn[1]
    if major:
        found = next((one for one in info.tdx_module_identities if one.id == f"TDX_{major:02X}"), None)
    else:
        found = info.tdx_module
    if found is None:
        raise EvidenceRefused.because("TDX module", f"major version {major}", "one that the TCB info identifies")
    return found


def _masked(attributes: bytes, mask: bytes) -> str:
    return bytes(a & m for a, m in zip(attributes, mask, strict=True)).hex()


def _attributes(case: HostCase) -> Finding:
    got, policy = case.quote.report.td_attributes, case.policy
    required, forbidden = _named(REQUIRED, policy.required_attributes), _named(REFUSED, policy.forbidden_attributes)
    # As integers: the complement of an IntFlag leaves out the bits that the flag does not name.
    ok = required in got and not int(got) & (int(forbidden) | ~int(PERMITTED))
    expected = f"{int(required):#x}, without {int(forbidden):#x}, others only of {int(PERMITTED):#x}"
    return compare(EvidenceRefused, "TD attributes", ok, f"{int(got):#x}", expected)


def _named(always: TdAttributes, names: Iterable[str]) -> TdAttributes:
    return reduce(or_, (TdAttributes[name] for name in names), always)


def _xfam(case: HostCase) -> Finding:
    got, mask = case.quote.report.xfam, case.policy.xfam_mask
    ok = mask is None or not got & ~mask
    return compare(EvidenceRefused, "XFAM", ok, f"{got:#x}", "any" if mask is None else f"bits of {mask:#x}")


def _one_of(
    name: str, read: Callable[[TdReport], bytes], allowed: Callable[[HostPolicy], tuple[bytes, ...] | None]
) -> Check[HostCase]:
    """The condition that one measurement is on its list."""

    def run(case: HostCase) -> Finding:
        got, values = read(case.quote.report), allowed(case.policy)
        expected = "any: not pinned" if values is None else listed(value.hex() for value in values)
        return compare(MeasurementRefused, name, values is None or got in values, got.hex(), expected)

    return Check(name, run, _RELEASE, gate=False)


def _rtmr(index: int) -> Check[HostCase]:
    return _one_of(f"RTMR{index}", lambda report: report.rtmrs[index], lambda policy: policy.rtmrs[index])


_STOP = "Do not use this host. Ask its operator for genuine evidence."
_RELEASE = "Compare the release notes: update the policy for an image you trust, otherwise do not use this host."
_COLLATERAL = "Fetch new collateral (stip-keyservice collateral fetch)."

CHECKS: tuple[Check[HostCase], ...] = (
    Check("form", gates.well_formed, _STOP, gate=True),
    Check(
        "trust anchor",
        gates.trust_anchor,
        "A simulated TEE protects nothing: use TDX hardware, or choose development mode explicitly for a trial.",
        gate=True,
    ),
    Check("dates", gates.dates, f"{_COLLATERAL[:-1]}; check this machine's clock.", gate=True),
    Check("certificate roles", gates.roles, _STOP, gate=True),
    Check("debug", _not_debug, "The operator starts the TD without debug and profiling.", gate=True),
    Check("signatures", gates.genuine, _STOP, gate=True),
    Check("platform binding", gates.platform_binding, "Fetch the collateral of the host's own platform.", gate=True),
    Check("TDX module", _module, "The operator updates the TDX module to one that Intel signed.", gate=True),
    Check("TCB status", gates.tcb_status, PLATFORM_REMEDY, gate=False),
    Check("TCB evaluation number", gates.evaluation_number, _COLLATERAL, gate=False),
    Check("collateral age", gates.collateral_age, _COLLATERAL, gate=False),
    Check("attributes", _attributes, "The operator starts the TD with the attributes of the policy.", gate=False),
    Check("XFAM", _xfam, "The operator starts the TD with fewer extended features.", gate=False),
    _one_of("MRSEAM", lambda report: report.mrseam, lambda policy: policy.mrseams),
    _one_of("MRTD", lambda report: report.mrtd, lambda policy: policy.measurements),
    *(_rtmr(index) for index in range(4)),
    Check("platform", gates.platform, "Enrol the platform in the policy, or use an enrolled one.", gate=False),
    Check("report data", gates.report_data, "Attest again: the evidence is for another channel.", gate=False),
)
