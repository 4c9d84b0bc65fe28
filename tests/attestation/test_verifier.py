from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from stip_protocol.attestation.checks import CHECKS
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.quote import Attributes
from stip_protocol.attestation.verifier import Status, examine, verify
from stip_protocol.errors import (
    AttestationError,
    CollateralExpired,
    DebugEnclaveRefused,
    EvidenceMalformed,
    EvidenceRefused,
    MeasurementRefused,
    ReportDataMismatch,
    SimulatedEvidenceRefused,
)
from stip_stack.tee import SimulatedPlatform
from stip_stack.tee.pki import PCE_SVN

DAY = 24 * 3600
ORDINARY = Attributes.INIT | Attributes.MODE64

Build = Callable[..., Evidence]
Rules = Callable[..., EvidencePolicy]


def changed(evidence: Evidence, **fields: object) -> Evidence:
    collateral = json.loads(evidence.collateral)
    return Evidence(evidence.quote, json.dumps(collateral | fields).encode())


def test_genuine_evidence_is_accepted_and_says_what_it_establishes(
    evidence: Build, policy: Rules, platform: SimulatedPlatform, measurement: bytes, report_data: bytes, now: int
) -> None:
    verified = verify(evidence(), policy(), report_data=report_data, now=now, root_der=platform.root_der)
    assert verified.measurement == measurement
    assert (verified.isv_prod_id, verified.isv_svn) == (1, 1)
    assert (verified.tcb_status, verified.advisories) == ("UpToDate", ())
    assert verified.simulated
    assert verified.collateral_expires == now + 30 * DAY - 1
    assert verified.platform.fmspc == b"STIPSM"


def test_the_pinned_hash_suffices_where_the_root_is_in_the_evidence(
    evidence: Build, policy: Rules, report_data: bytes, now: int
) -> None:
    assert verify(evidence(), policy(), report_data=report_data, now=now).simulated


@pytest.mark.parametrize(
    ("faults", "rules", "refusal", "step"),
    [
        pytest.param({"attributes": ORDINARY | Attributes.DEBUG}, {}, DebugEnclaveRefused, "debug", id="debug"),
        pytest.param(
            {"attributes": ORDINARY | Attributes.PROVISION_KEY}, {}, EvidenceRefused, "attributes", id="provision key"
        ),
        pytest.param(
            {"attributes": ORDINARY | Attributes.EINITTOKEN_KEY}, {}, EvidenceRefused, "attributes", id="launch key"
        ),
        pytest.param({"attributes": Attributes.INIT}, {}, EvidenceRefused, "attributes", id="32 bit"),
        pytest.param({"attributes": Attributes.MODE64}, {}, EvidenceRefused, "attributes", id="not initialised"),
        pytest.param(
            {"attributes": ORDINARY | Attributes(1 << 40)}, {}, EvidenceRefused, "attributes", id="unknown attribute"
        ),
        pytest.param({"tcb_status": "Revoked"}, {}, EvidenceRefused, "signatures", id="TCB revoked"),
        pytest.param({"tcb_status": "OutOfDate"}, {}, EvidenceRefused, "TCB status", id="TCB out of date"),
        pytest.param({"tcb_status": "SWHardeningNeeded"}, {}, EvidenceRefused, "TCB status", id="hardening"),
        pytest.param({"tcb_status": "ConfigurationNeeded"}, {}, EvidenceRefused, "TCB status", id="configuration"),
        pytest.param({"advisories": ("INTEL-SA-00334",)}, {}, EvidenceRefused, "TCB status", id="advisory"),
        pytest.param(
            {"tcb_status": "SWHardeningNeeded", "advisories": ("INTEL-SA-00334", "INTEL-SA-00615")},
            {"accepted_statuses": [{"status": "SWHardeningNeeded", "advisories": ["INTEL-SA-00334"]}]},
            EvidenceRefused,
            "TCB status",
            id="one advisory too many",
        ),
        pytest.param({"qe_isv_svn": 7}, {}, EvidenceRefused, "TCB status", id="QE out of date"),
        pytest.param({"qe_isv_svn": 0}, {}, EvidenceRefused, "signatures", id="QE below every level"),
        pytest.param({"required_pce_svn": PCE_SVN + 1}, {}, EvidenceRefused, "TCB status", id="PCE out of date"),
        pytest.param(
            {"required_pce_svn": PCE_SVN + 2, "oldest_pce_svn": PCE_SVN + 1},
            {},
            EvidenceRefused,
            "signatures",
            id="PCE below every level",
        ),
        pytest.param({"pck_revoked": True}, {}, EvidenceRefused, "signatures", id="PCK revoked"),
        pytest.param({"intermediate_revoked": True}, {}, EvidenceRefused, "signatures", id="PCK CA revoked"),
        pytest.param({"tcb_signer_revoked": True}, {}, EvidenceRefused, "signatures", id="TCB signer revoked"),
        pytest.param({"age": 30 * DAY}, {}, CollateralExpired, "dates", id="expired collateral"),
        pytest.param({"age": -1}, {}, CollateralExpired, "dates", id="collateral of the future"),
        pytest.param(
            {"age": 8 * DAY},
            {"collateral_max_age_seconds": 7 * DAY},
            CollateralExpired,
            "collateral age",
            id="old collateral",
        ),
        pytest.param(
            {}, {"minimum_tcb_evaluation_number": 18}, EvidenceRefused, "TCB evaluation number", id="old evaluation"
        ),
        pytest.param({"pce_id": b"\x00\x01"}, {}, EvidenceRefused, "platform binding", id="another PCEID"),
        pytest.param({"fmspc": b"OTHERS"}, {}, EvidenceRefused, "signatures", id="another FMSPC"),
        pytest.param({"tcb_info_version": 2}, {}, EvidenceRefused, "platform binding", id="TCB info version 2"),
        pytest.param({"tcb_info_id": "TDX"}, {}, EvidenceRefused, "signatures", id="TCB info of TDX"),
        pytest.param({"signer": "pck"}, {}, EvidenceRefused, "certificate roles", id="signed by a PCK key"),
        pytest.param({"signer": "renamed"}, {}, EvidenceRefused, "certificate roles", id="signed under another name"),
        pytest.param({"measurement": bytes(32)}, {}, MeasurementRefused, "measurement", id="another measurement"),
        pytest.param({}, {"platforms": ["ab" * 16]}, EvidenceRefused, "platform", id="platform not enrolled"),
    ],
)
def test_what_is_wrong_is_refused_at_its_step(
    evidence: Build,
    policy: Rules,
    report_data: bytes,
    now: int,
    faults: dict[str, Any],
    rules: dict[str, Any],
    refusal: type[AttestationError],
    step: str,
) -> None:
    given, rule = evidence(**faults), policy(**rules)
    with pytest.raises(refusal) as refused:
        verify(given, rule, report_data=report_data, now=now)
    assert type(refused.value) is refusal
    steps = examine(given, rule, report_data=report_data, now=now)
    failed = next(one for one in steps if one.status is Status.FAILED)
    assert failed.name == step
    assert failed.error is not None
    assert failed.remedy
    assert failed.error.message == refused.value.message


@pytest.mark.parametrize(
    ("faults", "accepted", "status"),
    [
        ({"qe_isv_svn": 7}, {"status": "OutOfDate", "advisories": ["INTEL-SA-00615"]}, "OutOfDate"),
        (
            {"tcb_status": "SWHardeningNeeded", "advisories": ("INTEL-SA-00334",)},
            {"status": "SWHardeningNeeded", "advisories": ["INTEL-SA-00334", "INTEL-SA-00615"]},
            "SWHardeningNeeded",
        ),
        (
            {"required_pce_svn": PCE_SVN + 1},
            {"status": "OutOfDate", "advisories": ["INTEL-SA-00828"]},
            "OutOfDate",
        ),
    ],
)
def test_a_status_is_accepted_with_exactly_the_advisories_the_policy_names(
    evidence: Build,
    policy: Rules,
    report_data: bytes,
    now: int,
    faults: dict[str, Any],
    accepted: dict[str, Any],
    status: str,
) -> None:
    rules = policy(accepted_statuses=[{"status": "UpToDate"}, accepted])
    assert verify(evidence(**faults), rules, report_data=report_data, now=now).tcb_status == status


def test_an_enrolled_platform_is_accepted_by_ppid_and_by_instance_id(
    evidence: Build, policy: Rules, report_data: bytes, now: int
) -> None:
    found = verify(evidence(), policy(), report_data=report_data, now=now).platform
    assert found.instance_id is not None
    for name in (found.ppid, found.instance_id):
        verify(evidence(), policy(platforms=[name.hex()]), report_data=report_data, now=now)


@pytest.mark.parametrize(("svn", "accepted"), [(1, True), (2, False)])
def test_a_key_service_accepts_a_signer_from_its_minimum_svn_on(
    evidence: Build, policy: Rules, report_data: bytes, now: int, svn: int, accepted: bool
) -> None:
    signer = verify(evidence(), policy(), report_data=report_data, now=now).signer
    rules = policy(
        audience="keyservice",
        measurements=None,
        signers=[{"mrsigner": signer.hex(), "isv_prod_id": 1, "minimum_isv_svn": svn}],
    )
    steps = examine(evidence(measurement=b"m" * 32), rules, report_data=report_data, now=now)
    assert all(step.status is Status.PASSED for step in steps) is accepted


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_every_byte_of_the_quote_is_covered(evidence: Build, policy: Rules, report_data: bytes, now: int) -> None:
    genuine, rules = evidence(), policy()
    for offset in range(len(genuine.quote)):
        flipped = bytearray(genuine.quote)
        flipped[offset] ^= 1 << (offset % 8)
        with pytest.raises(AttestationError):
            verify(Evidence(bytes(flipped), genuine.collateral), rules, report_data=report_data, now=now)


@pytest.fixture(scope="module")
def genuine(evidence: Build) -> Evidence:
    return evidence()


@settings(max_examples=300, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_collateral_changes_no_verdict(
    genuine: Evidence, policy: Rules, report_data: bytes, now: int, position: float, bit: int
) -> None:
    rules = policy()
    expected = verify(genuine, rules, report_data=report_data, now=now)
    flipped = bytearray(genuine.collateral)
    flipped[int(position * len(flipped))] ^= 1 << bit
    try:
        verified = verify(Evidence(genuine.quote, bytes(flipped)), rules, report_data=report_data, now=now)
    except AttestationError:
        return
    assert verified == expected  # a hexadecimal digit in the other case is the same byte


@settings(max_examples=200, deadline=None)
@given(quote=st.binary(min_size=1, max_size=3000), collateral=st.binary(min_size=1, max_size=300))
def test_arbitrary_evidence_gives_a_refusal_and_nothing_else(
    policy: Rules, report_data: bytes, now: int, quote: bytes, collateral: bytes
) -> None:
    with pytest.raises(EvidenceMalformed):
        verify(Evidence(quote, collateral), policy(), report_data=report_data, now=now)


def test_other_report_data_is_refused(evidence: Build, policy: Rules, now: int) -> None:
    with pytest.raises(ReportDataMismatch):
        verify(evidence(), policy(), report_data=b"\x01" * 64, now=now)
    with pytest.raises(ReportDataMismatch):
        verify(evidence(), policy(), report_data=b"", now=now)


def test_trailing_bytes_after_a_genuine_quote_are_refused(
    evidence: Build, policy: Rules, report_data: bytes, now: int
) -> None:
    genuine = evidence()
    with pytest.raises(EvidenceMalformed):
        verify(Evidence(genuine.quote + b"\n", genuine.collateral), policy(), report_data=report_data, now=now)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"pck_certificate_chain": "x"}, id="a chain that would replace the quote's"),
        pytest.param({"root_ca_crl": "zz"}, id="CRL not hex"),
        pytest.param({"root_ca_crl": "00"}, id="CRL not DER"),
        pytest.param({"tcb_info": "{}"}, id="TCB info without fields"),
        pytest.param({"qe_identity": "["}, id="QE identity not JSON"),
        pytest.param({"tcb_info_signature": "00"}, id="short signature"),
        pytest.param({"tcb_info_issuer_chain": ""}, id="no chain"),
        pytest.param({"tcb_info_issuer_chain": None}, id="chain not text"),
    ],
)
def test_malformed_collateral_is_refused(
    evidence: Build, policy: Rules, report_data: bytes, now: int, fields: dict[str, object]
) -> None:
    with pytest.raises(EvidenceMalformed):
        verify(changed(evidence(), **fields), policy(), report_data=report_data, now=now)


def test_text_between_certificates_is_refused(evidence: Build, policy: Rules, report_data: bytes, now: int) -> None:
    chain = json.loads(evidence().collateral)["tcb_info_issuer_chain"]
    with pytest.raises(EvidenceMalformed, match="canonical PEM"):
        verify(
            changed(evidence(), tcb_info_issuer_chain="comment\n" + chain),
            policy(),
            report_data=report_data,
            now=now,
        )


def test_an_embedded_root_other_than_the_anchor_is_refused(
    evidence: Build, policy: Rules, platform: SimulatedPlatform, report_data: bytes, now: int, tmp_path: Any
) -> None:
    other = x509.load_der_x509_certificate(SimulatedPlatform.create(tmp_path / "other", now=now).root_der)
    mine = x509.load_der_x509_certificate(platform.root_der)
    chain = json.loads(evidence().collateral)["tcb_info_issuer_chain"]
    swapped = chain.replace(mine.public_bytes(Encoding.PEM).decode(), other.public_bytes(Encoding.PEM).decode())
    assert swapped != chain
    with pytest.raises(EvidenceRefused, match="TCB info root"):
        verify(changed(evidence(), tcb_info_issuer_chain=swapped), policy(), report_data=report_data, now=now)


def test_evidence_of_another_simulated_platform_is_refused(
    evidence: Build, policy: Rules, measurement: bytes, report_data: bytes, now: int, tmp_path: Any
) -> None:
    provider = SimulatedPlatform.create(tmp_path / "other", now=now).provider(measurement, clock=lambda: now)
    foreign = Evidence(provider.quote(report_data), provider.collateral())
    with pytest.raises(EvidenceRefused, match="trust anchor"):
        verify(foreign, policy(), report_data=report_data, now=now)
    mixed = Evidence(foreign.quote, evidence().collateral)
    with pytest.raises(EvidenceRefused):
        verify(mixed, policy(), report_data=report_data, now=now)


def test_a_root_that_the_policy_does_not_pin_is_refused(
    evidence: Build, policy: Rules, report_data: bytes, now: int
) -> None:
    rules = policy(simulated_root_sha256="ab" * 32)
    with pytest.raises(EvidenceRefused, match="trust anchor"):
        verify(evidence(), rules, report_data=report_data, now=now)


@pytest.mark.parametrize("mode", ["production", "development"])
def test_simulated_evidence_is_refused_without_a_policy_that_pins_its_root(
    evidence: Build, policy: Rules, platform: SimulatedPlatform, report_data: bytes, now: int, mode: str
) -> None:
    rules = policy(mode=mode, simulated_root_sha256=None)
    for root in (None, platform.root_der):
        with pytest.raises(SimulatedEvidenceRefused):
            verify(evidence(), rules, report_data=report_data, now=now, root_der=root)


def test_no_environment_variable_makes_a_production_policy_accept_simulated_evidence(
    evidence: Build, policy: Rules, report_data: bytes, now: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules, genuine = policy(mode="production", simulated_root_sha256=None), evidence()
    for name in ("STIP_MODE", "STIP_DEV", "STIP_SIMULATED", "RA_TLS_ALLOW_DEBUG_ENCLAVE_INSECURE", "SGX_AESM_ADDR"):
        for value in ("1", "development", "any"):
            monkeypatch.setenv(name, value)
            with pytest.raises(SimulatedEvidenceRefused):
                verify(genuine, rules, report_data=report_data, now=now)


class Unreadable(dict[str, str]):
    """An environment in which nobody may look."""

    def _refuse(self, *_: object) -> NoReturn:
        raise AssertionError("the verifier read an environment variable")

    __getitem__ = __contains__ = __iter__ = get = keys = items = values = _refuse


def test_the_verifier_reads_no_environment_variable(
    evidence: Build, policy: Rules, report_data: bytes, now: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, rules = evidence(), policy()
    with monkeypatch.context() as patched:
        patched.setattr(os, "environ", Unreadable())
        verified = verify(given, rules, report_data=report_data, now=now)
    assert verified.simulated


def test_examination_tells_every_condition_in_order_and_skips_what_cannot_be_known(
    evidence: Build, policy: Rules, report_data: bytes, now: int
) -> None:
    names = [check.name for check in CHECKS]
    passed = examine(evidence(), policy(), report_data=report_data, now=now)
    assert [step.name for step in passed] == names
    assert {step.status for step in passed} == {Status.PASSED}
    assert not any(step.remedy for step in passed)

    forged = examine(evidence(pck_revoked=True), policy(), report_data=report_data, now=now)
    failed = names.index("signatures")
    assert [step.status for step in forged] == (
        [Status.PASSED] * failed + [Status.FAILED] + [Status.SKIPPED] * (len(names) - failed - 1)
    )


def test_examination_of_genuine_evidence_tells_all_that_the_policy_refuses(
    evidence: Build, policy: Rules, now: int
) -> None:
    rules = policy(minimum_tcb_evaluation_number=99, measurements=["ab" * 32])
    steps = examine(evidence(), rules, report_data=bytes(64), now=now)
    failed = {step.name: step for step in steps if step.status is Status.FAILED}
    assert set(failed) == {"TCB evaluation number", "measurement", "report data"}
    assert failed["measurement"].expected == "ab" * 32
    assert failed["TCB evaluation number"].got == "17"
