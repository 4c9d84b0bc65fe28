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

from stip_protocol.attestation import dcap
from stip_protocol.attestation.collateral import Collateral
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.quote import SgxQuote
from stip_protocol.attestation.roots import INTEL_SGX_ROOT_SHA256, intel_sgx_root
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
@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_every_byte_of_a_real_quote_is_covered(real: Evidence) -> None:
    rules = policy(real)
    for offset in range(len(real.quote)):
        flipped = bytearray(real.quote)
        flipped[offset] ^= 1 << (offset % 8)
        with pytest.raises(AttestationError):
            verify(Evidence(bytes(flipped), real.collateral), rules, report_data=REPORT_DATA, now=at(OPENS))


@vectors_only
def test_a_real_tdx_quote_is_appraised_but_no_policy_accepts_one_yet(vectors: Path) -> None:
    quote = (vectors / "tdx_quote").read_bytes()
    data = (vectors / "tdx_quote_collateral.json").read_bytes()
    appraisal = dcap.appraise(quote, Collateral.parse(data), intel_sgx_root(), at(OPENS))
    assert (appraisal.status, appraisal.advisories) == ("UpToDate", ())
    with pytest.raises(EvidenceMalformed, match="TDX is not supported"):
        SgxQuote.parse(quote[:5000])
