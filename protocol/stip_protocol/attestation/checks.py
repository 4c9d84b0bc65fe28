"""Every condition that evidence must meet, as one table in the order they are tried.

The gates come first and establish that the evidence is genuine; after a gate that fails nothing further is
known, so the rest is skipped. What follows compares genuine values with the policy, each on its own.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property

from stip_protocol.attestation import dcap
from stip_protocol.attestation.certificates import Certificate, read_chain, require_pck_chain, require_tcb_signer
from stip_protocol.attestation.collateral import Collateral, Window
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.quote import Attributes, SgxQuote
from stip_protocol.attestation.roots import intel_sgx_root
from stip_protocol.errors import (
    AttestationError,
    CollateralExpired,
    DebugEnclaveRefused,
    EvidenceRefused,
    MeasurementRefused,
    ReportDataMismatch,
    SimulatedEvidenceRefused,
)

REQUIRED = Attributes.INIT | Attributes.MODE64
PERMITTED = REQUIRED | Attributes.CET | Attributes.KSS | Attributes.AEX_NOTIFY
"""Attributes of an ordinary enclave. PROVISION_KEY and EINITTOKEN_KEY belong to Intel's own enclaves; bits that
this version does not know are refused."""
TCB_INFO_VERSION = 3
QE_IDENTITY_VERSION = 2


@dataclass(frozen=True)
class Case:
    """One piece of evidence before one policy. Derived values are computed once and raise their own refusals."""

    evidence: Evidence
    policy: EvidencePolicy
    report_data: bytes
    now: datetime
    root_der: bytes | None

    @cached_property
    def quote(self) -> SgxQuote:
        return SgxQuote.parse(self.evidence.quote)

    @cached_property
    def collateral(self) -> Collateral:
        return Collateral.parse(self.evidence.collateral)

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
class Check:
    name: str
    run: Callable[[Case], Finding]
    remedy: str
    gate: bool


def _sha256(data: bytes) -> str:
    return f"SHA-256 {hashlib.sha256(data).hexdigest()}"


def _compare(refusal: type[AttestationError], name: str, ok: bool, got: object, expected: object) -> Finding:
    return Finding(str(expected), str(got), None if ok else refusal.because(name, got, expected))


def _well_formed(case: Case) -> Finding:
    size = f"SGX quote version 3, {len(case.evidence.quote)} bytes; collateral, {len(case.evidence.collateral)} bytes"
    chains = (case.pck_chain, case.collateral.tcb_chain, case.collateral.qe_chain, case.collateral.crl_chain)
    return _compare(
        EvidenceRefused, "certificate chains", all(chains), size if all(chains) else "an empty chain", "well-formed"
    )


def _trust_anchor(case: Case) -> Finding:
    anchor = case.anchor
    for name, chain in (
        ("embedded root", case.pck_chain),
        ("TCB info root", case.collateral.tcb_chain),
        ("QE identity root", case.collateral.qe_chain),
        ("PCK CRL root", case.collateral.crl_chain),
    ):
        if chain[-1].der != anchor:
            return _compare(_foreign_root(case, chain), name, False, _sha256(chain[-1].der), _sha256(anchor))
    return Finding(_sha256(anchor), _sha256(anchor))


def _foreign_root(case: Case, chain: tuple[Certificate, ...]) -> type[AttestationError]:
    """A whole hierarchy under another root is somebody's simulation; a root that signed nothing is tampering."""
    whole = all(child.issued_by(parent) for child, parent in zip(chain, (*chain[1:], chain[-1]), strict=True))
    return SimulatedEvidenceRefused if whole and case.policy.simulated_root_sha256 is None else EvidenceRefused


def _dates(case: Case) -> Finding:
    for window in case.windows:
        if not window.opens <= case.now <= window.closes:
            allowed = f"{window.opens:%Y-%m-%dT%H:%M:%SZ} to {window.closes:%Y-%m-%dT%H:%M:%SZ}"
            return _compare(CollateralExpired, window.what, False, f"{case.now:%Y-%m-%dT%H:%M:%SZ}", allowed)
    return Finding(f"before {case.expires:%Y-%m-%dT%H:%M:%SZ}", f"{case.now:%Y-%m-%dT%H:%M:%SZ}")


def _roles(case: Case) -> Finding:
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


def _not_debug(case: Case) -> Finding:
    debug = Attributes.DEBUG in case.quote.attributes
    return _compare(DebugEnclaveRefused, "enclave", not debug, "debug" if debug else "production", "production")


def _genuine(case: Case) -> Finding:
    return Finding("signatures, revocation lists and TCB levels hold", f"verified, {case.appraisal.status}")


def _platform_binding(case: Case) -> Finding:
    info, identity, found = case.collateral.tcb_info, case.collateral.qe_identity, case.appraisal
    got = (info.id, info.version, identity.id, identity.version, info.fmspc.hex(), info.pce_id.hex())
    wanted = ("SGX", TCB_INFO_VERSION, "QE", QE_IDENTITY_VERSION, found.fmspc.hex(), found.pce_id.hex())
    names = "TCB info id, version, QE identity id, version, FMSPC, PCEID"
    return _compare(EvidenceRefused, names, got == wanted, _listed(got), _listed(wanted))


def _tcb_status(case: Case) -> Finding:
    found = case.appraisal
    accepted = {rule.status: rule.advisories for rule in case.policy.accepted_statuses}
    ok = set(found.advisories) <= set(accepted.get(found.status, ())) if found.status in accepted else False
    expected = "; ".join(_listed((status, *advisories)) for status, advisories in accepted.items())
    return _compare(EvidenceRefused, "TCB status", ok, _listed((found.status, *found.advisories)), expected)


def _evaluation_number(case: Case) -> Finding:
    got, least = case.appraisal.evaluation_number, case.policy.minimum_tcb_evaluation_number
    return _compare(EvidenceRefused, "TCB evaluation number", got >= least, got, f"at least {least}")


def _age(case: Case) -> Finding:
    age, most = case.now - case.collateral.issued, timedelta(seconds=case.policy.collateral_max_age_seconds)
    return _compare(CollateralExpired, "collateral age", age <= most, age, f"at most {most}")


def _attributes(case: Case) -> Finding:
    got = case.quote.attributes
    # As integers: the complement of an IntFlag leaves out the bits that the flag does not name.
    ok = REQUIRED in got and not int(got) & ~int(PERMITTED)
    return _compare(EvidenceRefused, "attributes", ok, f"{got:#x}", f"{REQUIRED:#x}, others only of {PERMITTED:#x}")


def _measurement(case: Case) -> Finding:
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
    expected = _listed([*(measurement.hex() for measurement in policy.measurements), *signers])
    got = quote.mrenclave.hex()
    if signers:
        got += f" (signer {quote.mrsigner.hex()} product {quote.isv_prod_id} SVN {quote.isv_svn})"
    return _compare(MeasurementRefused, "measurement", ok, got, expected)


def _platform(case: Case) -> Finding:
    found, enrolled = case.appraisal, case.policy.platforms
    names = [name for name in (found.platform_instance_id, found.ppid) if name is not None]
    ok = enrolled is None or any(name in enrolled for name in names)
    expected = "any genuine platform" if enrolled is None else f"one of {len(enrolled)} enrolled platforms"
    return _compare(EvidenceRefused, "platform", ok, _listed(name.hex() for name in names), expected)


def _report_data(case: Case) -> Finding:
    ok = hmac.compare_digest(case.quote.report_data, case.report_data)
    return _compare(ReportDataMismatch, "report data", ok, case.quote.report_data.hex(), case.report_data.hex())


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


_PLATFORM_REMEDY = "The operator updates microcode, BIOS and quoting enclave, or the policy accepts what is known."
_STOP = "Do not use this enclave. Ask its operator for genuine evidence."

CHECKS: tuple[Check, ...] = (
    Check("form", _well_formed, _STOP, gate=True),
    Check(
        "trust anchor",
        _trust_anchor,
        "A simulated TEE protects nothing: use SGX hardware, or choose development mode explicitly for a trial.",
        gate=True,
    ),
    Check("dates", _dates, "The enclave's host fetches new collateral; check this machine's clock.", gate=True),
    Check("certificate roles", _roles, _STOP, gate=True),
    Check("debug", _not_debug, "The operator runs the enclave with sgx.debug = false.", gate=True),
    Check("signatures", _genuine, _STOP, gate=True),
    Check("platform binding", _platform_binding, "The host fetches the collateral of its own platform.", gate=True),
    Check("TCB status", _tcb_status, _PLATFORM_REMEDY, gate=False),
    Check("TCB evaluation number", _evaluation_number, "The enclave's host fetches new collateral.", gate=False),
    Check("collateral age", _age, "The enclave's host fetches new collateral.", gate=False),
    Check("attributes", _attributes, _STOP, gate=False),
    Check(
        "measurement",
        _measurement,
        "Compare the release notes: update the policy for a release you trust, otherwise do not use this enclave.",
        gate=False,
    ),
    Check("platform", _platform, "Enrol the platform in the policy, or use an enrolled one.", gate=False),
    Check("report data", _report_data, "Connect and attest again: the evidence is for another channel.", gate=False),
)


def at(now: int) -> datetime:
    """Unix seconds as an aware date."""
    return datetime.fromtimestamp(now, tz=UTC)
