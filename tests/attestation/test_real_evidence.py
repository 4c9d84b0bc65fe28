"""Quotes of real hardware with Intel's collateral, where they are at hand.

They belong to no licence of this project, so they are not in the repository: STIP_DCAP_VECTORS names a directory
with `sgx_quote`, `sgx_quote_collateral.json`, `tdx_quote` and `tdx_quote_collateral.json`.
"""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stip_protocol.attestation import hosts
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.hostpolicy import HostPolicy
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.quote import SgxQuote, without_padding
from stip_protocol.attestation.roots import INTEL_SGX_ROOT_SHA256, intel_sgx_root
from stip_protocol.attestation.tdx import TdxQuote
from stip_protocol.attestation.verifier import verify
from stip_protocol.errors import (
    AttestationError,
    CollateralExpired,
    EvidenceMalformed,
    EvidenceRefused,
    MeasurementRefused,
)

OPENS = datetime(2025, 6, 19, 10, 56, 11, tzinfo=UTC)
CLOSES = datetime(2025, 7, 19, 10, 1, 18, tzinfo=UTC)
HOST_OPENS = datetime(2025, 6, 19, 10, 32, 27, tzinfo=UTC)
HOST_CLOSES = datetime(2025, 7, 19, 10, 0, 34, tzinfo=UTC)
REPORT_DATA = b"Hello, world!".ljust(64, b"\x00")
STATUS = "ConfigurationAndSWHardeningNeeded"
ADVISORIES = ("INTEL-SA-00289", "INTEL-SA-00615")

vectors_only = pytest.mark.dcap_vectors


@pytest.fixture(scope="module")
def vectors() -> Path:
    named = os.environ.get("STIP_DCAP_VECTORS")
    if not named:
        pytest.skip("STIP_DCAP_VECTORS is not set: NO REAL QUOTE WAS VERIFIED in this run")
    return Path(named)


@pytest.fixture(scope="module")
def real(vectors: Path) -> Evidence:
    return Evidence((vectors / "sgx_quote").read_bytes(), (vectors / "sgx_quote_collateral.json").read_bytes())


def policy(real: Evidence, **changes: object) -> EvidencePolicy:
    mapping: dict[str, object] = {
        "mode": "production",
        "measurements": [SgxQuote.parse(real.quote).mrenclave.hex()],
        "accepted_statuses": [{"status": STATUS, "advisories": list(ADVISORIES)}],
    }
    return EvidencePolicy.from_mapping(mapping | changes)


def at(moment: datetime) -> int:
    return int(moment.timestamp())


def test_the_built_in_root_is_intels() -> None:
    assert hashlib.sha256(intel_sgx_root()).digest() == INTEL_SGX_ROOT_SHA256


@vectors_only
@pytest.mark.parametrize("moment", [OPENS, CLOSES])
def test_real_sgx_evidence_verifies_in_production(real: Evidence, moment: datetime) -> None:
    verified = verify(real, policy(real), report_data=REPORT_DATA, now=at(moment))
    assert (verified.tcb_status, verified.advisories) == (STATUS, ADVISORIES)
    assert not verified.simulated
    assert verified.collateral_expires == at(CLOSES)


@vectors_only
def test_real_evidence_outside_its_time_is_refused(real: Evidence) -> None:
    for moment in (at(OPENS) - 1, at(CLOSES) + 1):
        with pytest.raises(CollateralExpired):
            verify(real, policy(real), report_data=REPORT_DATA, now=moment)


@vectors_only
def test_real_evidence_is_held_to_the_policy(real: Evidence) -> None:
    strict = policy(real, accepted_statuses=[{"status": "UpToDate"}])
    with pytest.raises(EvidenceRefused, match="TCB status"):
        verify(real, strict, report_data=REPORT_DATA, now=at(OPENS))
    with pytest.raises(MeasurementRefused):
        verify(real, policy(real, measurements=["ab" * 32]), report_data=REPORT_DATA, now=at(OPENS))


@vectors_only
def test_real_evidence_is_refused_where_a_simulated_root_is_pinned(real: Evidence) -> None:
    rules = policy(real, mode="development", simulated_root_sha256="ab" * 32)
    with pytest.raises(EvidenceRefused, match="trust anchor"):
        verify(real, rules, report_data=REPORT_DATA, now=at(OPENS))


@vectors_only
@pytest.mark.filterwarnings("ignore:Parsed a serial number", "ignore:Attribute.s length")
def test_every_byte_of_a_real_quote_is_covered(real: Evidence) -> None:
    rules = policy(real)
    for offset in range(len(real.quote)):
        flipped = bytearray(real.quote)
        flipped[offset] ^= 1 << (offset % 8)
        with pytest.raises(AttestationError):
            verify(Evidence(bytes(flipped), real.collateral), rules, report_data=REPORT_DATA, now=at(OPENS))


@vectors_only
@pytest.mark.filterwarnings("ignore:Parsed a serial number", "ignore:Attribute.s length")
def test_every_byte_of_a_real_host_quote_is_covered(host: Evidence) -> None:
    rules = host_policy(host)
    for offset in range(len(host.quote)):
        flipped = bytearray(host.quote)
        flipped[offset] ^= 1 << (offset % 8)
        with pytest.raises(AttestationError):
            hosts.verify(
                Evidence(bytes(flipped), host.collateral),
                rules,
                report_data=TdxQuote.parse(host.quote).report_data,
                now=at(HOST_OPENS),
            )


@pytest.fixture(scope="module")
def host(vectors: Path) -> Evidence:
    """The file holds 70 zeros after the quote, as its driver's buffer did."""
    collected = (vectors / "tdx_quote").read_bytes()
    quote = without_padding(collected)
    assert collected == quote + bytes(70)
    return Evidence(quote, (vectors / "tdx_quote_collateral.json").read_bytes())


def host_policy(host: Evidence, **changes: object) -> HostPolicy:
    report = TdxQuote.parse(host.quote).report
    mapping: dict[str, object] = {
        "mode": "production",
        "measurements": [report.mrtd.hex()],
        "mrseams": [report.mrseam.hex()],
        **{f"rtmr{index}": [value.hex()] for index, value in enumerate(report.rtmrs)},
        "minimum_tcb_evaluation_number": 17,
        "xfam_mask": 0x602E7,
    }
    return HostPolicy.from_mapping(mapping | changes)


@vectors_only
@pytest.mark.parametrize("moment", [HOST_OPENS, HOST_CLOSES])
def test_real_tdx_evidence_verifies_in_production(host: Evidence, moment: datetime) -> None:
    bound = TdxQuote.parse(host.quote).report_data
    verified = hosts.verify(host, host_policy(host), report_data=bound, now=at(moment))
    assert (verified.tcb_status, verified.advisories, verified.simulated) == ("UpToDate", (), False)
    assert verified.collateral_expires == at(HOST_CLOSES)


@vectors_only
def test_real_tdx_evidence_is_refused_outside_its_time_padded_or_by_another_policy(host: Evidence) -> None:
    bound = TdxQuote.parse(host.quote).report_data
    for moment in (at(HOST_OPENS) - 1, at(HOST_CLOSES) + 1):
        with pytest.raises(CollateralExpired):
            hosts.verify(host, host_policy(host), report_data=bound, now=moment)
    padded = Evidence(host.quote + bytes(70), host.collateral)
    with pytest.raises(EvidenceMalformed):
        hosts.verify(padded, host_policy(host), report_data=bound, now=at(HOST_OPENS))
    with pytest.raises(MeasurementRefused, match="RTMR2"):
        hosts.verify(host, host_policy(host, rtmr2=["ab" * 48]), report_data=bound, now=at(HOST_OPENS))


@vectors_only
def test_real_quotes_are_refused_by_policies_of_the_other_tee(real: Evidence, host: Evidence) -> None:
    with pytest.raises(EvidenceMalformed, match="a TDX quote"):
        verify(host, policy(real), report_data=REPORT_DATA, now=at(OPENS))
    with pytest.raises(EvidenceMalformed, match="quote version"):
        hosts.verify(real, host_policy(host), report_data=REPORT_DATA, now=at(OPENS))
