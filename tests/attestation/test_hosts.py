"""TDX hosts: the same gates as SGX, another report. Simulated here; real evidence in `test_real_evidence`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stip_protocol.attestation import gates, hosts, verifier
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.gates import Status
from stip_protocol.attestation.hostpolicy import HostPolicy
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.quote import tee_type, without_padding
from stip_protocol.attestation.tdx import TdAttributes, TdxQuote
from stip_protocol.errors import (
    AttestationError,
    CollateralExpired,
    DebugEnclaveRefused,
    EvidenceMalformed,
    EvidenceRefused,
    MeasurementRefused,
    PolicyInvalid,
    ReportDataMismatch,
    SimulatedEvidenceRefused,
)
from stip_stack.tee import Faults, SimulatedPlatform
from stip_stack.tee.collateral import TEE_TCB_SVN
from stip_stack.tee.pki import PCE_SVN

DAY = 24 * 3600
MRTD = bytes(range(48))
RTMR = tuple(bytes([index]) * 48 for index in range(1, 5))
ORDINARY = TdAttributes.SEPT_VE_DISABLE

Build = Callable[..., Evidence]
Rules = Callable[..., HostPolicy]


@pytest.fixture(scope="module")
def host_policy(platform: SimulatedPlatform) -> Rules:
    def build(**changes: Any) -> HostPolicy:
        mapping: dict[str, Any] = {
            "mode": "development",
            "measurements": [MRTD.hex()],
            "rtmr1": [RTMR[1].hex()],
            "simulated_root_sha256": platform.root_sha256.hex(),
        }
        return HostPolicy.from_mapping({k: v for k, v in (mapping | changes).items() if v is not None})

    return build


@pytest.fixture(scope="module")
def host(platform: SimulatedPlatform, report_data: bytes, now: int) -> Build:
    """Evidence of a TDX host, with faults, its collateral issued `age` seconds before now."""

    def build(*, age: int = 0, mrtd: bytes = MRTD, xfam: int = 0xE7, **faults: Any) -> Evidence:
        wrong = Faults(**faults)
        quote = platform.host_quote(mrtd, report_data, rtmrs=RTMR, xfam=xfam, faults=wrong)
        return Evidence(quote, platform.collateral(now - age, faults=wrong, tee="TDX"))

    return build


def test_a_genuine_host_is_accepted_and_says_what_it_establishes(
    host: Build, host_policy: Rules, report_data: bytes, now: int
) -> None:
    verified = hosts.verify(host(), host_policy(), report_data=report_data, now=now)
    assert (verified.measurement, verified.rtmrs) == (MRTD, RTMR)
    assert (verified.tcb_status, verified.advisories, verified.simulated) == ("UpToDate", (), True)
    assert verified.platform.fmspc == b"STIPSM"
    assert verified.collateral_expires == now + 30 * DAY - 1
    steps = hosts.examine(host(), host_policy(), report_data=report_data, now=now)
    assert [step.name for step in steps] == [check.name for check in hosts.CHECKS]
    assert {step.status for step in steps} == {Status.PASSED}
    assert next(step for step in steps if step.name == "RTMR3").expected == "any: not pinned"


@pytest.mark.parametrize(
    ("faults", "rules", "refusal", "step"),
    [
        pytest.param({"td_attributes": ORDINARY | bit}, {}, DebugEnclaveRefused, "debug", id=f"TUD bit {bit:#x}")
        for bit in (TdAttributes.DEBUG, TdAttributes.PERF_PROF, TdAttributes(0x80))
    ]
    + [
        pytest.param({"td_attributes": TdAttributes(0)}, {}, EvidenceRefused, "signatures", id="faults not disabled"),
        pytest.param(
            {"td_attributes": ORDINARY | TdAttributes.MIGRATABLE}, {}, EvidenceRefused, "signatures", id="migratable"
        ),
        pytest.param({"td_attributes": ORDINARY | TdAttributes.PKS}, {}, EvidenceRefused, None, id="PKS"),
        pytest.param({"td_attributes": ORDINARY | TdAttributes.KL}, {}, EvidenceRefused, None, id="KL"),
        pytest.param(
            {"td_attributes": ORDINARY | TdAttributes.PERFMON}, {}, EvidenceRefused, "attributes", id="counters"
        ),
        pytest.param(
            {"td_attributes": ORDINARY | TdAttributes(1 << 40)},
            {},
            EvidenceRefused,
            "signatures",
            id="unknown attribute",
        ),
        pytest.param({}, {"required_attributes": ["LASS"]}, EvidenceRefused, "attributes", id="LASS required"),
        pytest.param({}, {"xfam_mask": 0x3}, EvidenceRefused, "XFAM", id="more features than allowed"),
        pytest.param({"mrtd": bytes(48)}, {}, MeasurementRefused, "MRTD", id="another firmware"),
        pytest.param({}, {"mrseams": ["ab" * 48]}, MeasurementRefused, "MRSEAM", id="another TDX module"),
        pytest.param({"mrsignerseam": b"\x01" * 48}, {}, EvidenceRefused, "signatures", id="another module signer"),
        pytest.param(
            {"tee_tcb_svn": bytes([5, 7, 2, *bytes(13)])},
            {},
            EvidenceRefused,
            "signatures",
            id="a module without identity",
        ),
        pytest.param(
            {"required_module_svn": TEE_TCB_SVN[0] + 1}, {}, EvidenceRefused, "TCB status", id="module out of date"
        ),
        pytest.param(
            {"tee_tcb_svn": bytes([1, 1, 2, *bytes(13)])}, {}, EvidenceRefused, "signatures", id="module below all"
        ),
        pytest.param({"tdx_module_status": "Revoked"}, {}, EvidenceRefused, "signatures", id="module revoked"),
        pytest.param(
            {"required_tdx_svn": TEE_TCB_SVN[2] + 1}, {}, EvidenceRefused, "TCB status", id="TDX component low"
        ),
        pytest.param({"required_pce_svn": PCE_SVN + 1}, {}, EvidenceRefused, "TCB status", id="PCE out of date"),
        pytest.param({"tcb_status": "OutOfDate"}, {}, EvidenceRefused, "TCB status", id="TCB out of date"),
        pytest.param({"tcb_status": "Revoked"}, {}, EvidenceRefused, "signatures", id="TCB revoked"),
        pytest.param({"advisories": ("INTEL-SA-00334",)}, {}, EvidenceRefused, "TCB status", id="advisory"),
        pytest.param({"qe_isv_svn": 7}, {}, EvidenceRefused, "TCB status", id="QE out of date"),
        pytest.param({"qe_isv_svn": 0}, {}, EvidenceRefused, "signatures", id="QE below every level"),
        pytest.param({"pck_revoked": True}, {}, EvidenceRefused, "signatures", id="PCK revoked"),
        pytest.param({"intermediate_revoked": True}, {}, EvidenceRefused, "signatures", id="PCK CA revoked"),
        pytest.param({"tcb_signer_revoked": True}, {}, EvidenceRefused, "signatures", id="TCB signer revoked"),
        pytest.param({"signer": "pck"}, {}, EvidenceRefused, "certificate roles", id="signed by a PCK key"),
        pytest.param({"signer": "renamed"}, {}, EvidenceRefused, "certificate roles", id="signed under another name"),
        pytest.param({"tcb_info_version": 2}, {}, EvidenceRefused, "signatures", id="TCB info version 2"),
        pytest.param({"tcb_info_id": "SGX"}, {}, EvidenceRefused, "signatures", id="TCB info of SGX"),
        pytest.param({"qe_identity_id": "QE"}, {}, EvidenceRefused, "signatures", id="the QE identity of SGX"),
        pytest.param({"pce_id": b"\x00\x01"}, {}, EvidenceRefused, "platform binding", id="another PCEID"),
        pytest.param({"fmspc": b"OTHERS"}, {}, EvidenceRefused, "signatures", id="another FMSPC"),
        pytest.param({}, {"minimum_tcb_evaluation_number": 18}, EvidenceRefused, "TCB evaluation number", id="old"),
        pytest.param({"age": 31 * DAY}, {}, CollateralExpired, "dates", id="expired collateral"),
        pytest.param({"age": -1}, {}, CollateralExpired, "dates", id="collateral of the future"),
        pytest.param(
            {"age": 8 * DAY}, {"collateral_max_age_seconds": 7 * DAY}, CollateralExpired, "collateral age", id="aged"
        ),
        pytest.param({}, {"platforms": ["ab" * 16]}, EvidenceRefused, "platform", id="platform not enrolled"),
    ]
    + [
        pytest.param({}, {f"rtmr{index}": ["ab" * 48]}, MeasurementRefused, f"RTMR{index}", id=f"another RTMR{index}")
        for index in range(4)
    ],
)
def test_what_is_wrong_with_a_host_is_refused_at_its_step(
    host: Build,
    host_policy: Rules,
    report_data: bytes,
    now: int,
    faults: dict[str, Any],
    rules: dict[str, Any],
    refusal: type[AttestationError],
    step: str | None,
) -> None:
    given_, rule = host(**faults), host_policy(**rules)
    with pytest.raises(refusal) as refused:
        hosts.verify(given_, rule, report_data=report_data, now=now)
    failed = next(
        one for one in hosts.examine(given_, rule, report_data=report_data, now=now) if one.status is Status.FAILED
    )
    assert step is None or failed.name == step
    assert failed.remedy
    assert failed.error is not None
    assert failed.error.message == refused.value.message


@pytest.mark.parametrize("attribute", ["LASS", "TPA", "PERFMON"])
def test_what_the_policy_may_decide_about_attributes_is_its_decision(
    host: Build, host_policy: Rules, report_data: bytes, now: int, attribute: str
) -> None:
    given_ = host(td_attributes=ORDINARY | TdAttributes[attribute])
    assert hosts.verify(given_, host_policy(forbidden_attributes=[]), report_data=report_data, now=now)
    with pytest.raises(EvidenceRefused, match="TD attributes"):
        hosts.verify(given_, host_policy(forbidden_attributes=[attribute]), report_data=report_data, now=now)


def test_the_module_signer_is_held_to_the_tcb_info_also_without_the_library(
    host: Build, host_policy: Rules, report_data: bytes, now: int
) -> None:
    """The library refuses first; the table has the condition of its own for a version that would not."""
    module = next(check for check in hosts.CHECKS if check.name == "TDX module")
    for faults in ({"mrsignerseam": b"\x01" * 48}, {"tee_tcb_svn": bytes([5, 7, 2, *bytes(13)])}):
        case = hosts.HostCase(host(**faults), host_policy(), report_data, hosts.at(now), None)
        steps = gates.steps(case, (module,))
        assert [type(step.error) for step in steps] == [EvidenceRefused]


def test_a_module_of_major_version_0_is_held_to_its_own_identity(
    host: Build, host_policy: Rules, report_data: bytes, now: int
) -> None:
    old = bytes([5, 0, 2, *bytes(13)])
    assert hosts.verify(host(tee_tcb_svn=old), host_policy(), report_data=report_data, now=now)
    with pytest.raises(EvidenceRefused):
        hosts.verify(host(tee_tcb_svn=old, mrsignerseam=b"\x01" * 48), host_policy(), report_data=report_data, now=now)


@pytest.mark.filterwarnings("ignore:Parsed a serial number", "ignore:Attribute.s length")
def test_every_byte_of_a_host_quote_is_covered(host: Build, host_policy: Rules, report_data: bytes, now: int) -> None:
    genuine, rules = host(), host_policy()
    for offset in range(len(genuine.quote)):
        flipped = bytearray(genuine.quote)
        flipped[offset] ^= 1 << (offset % 8)
        with pytest.raises(AttestationError):
            hosts.verify(Evidence(bytes(flipped), genuine.collateral), rules, report_data=report_data, now=now)


@settings(max_examples=200, deadline=None)
@given(quote=st.binary(min_size=1, max_size=3000), collateral=st.binary(min_size=1, max_size=300))
def test_arbitrary_host_evidence_gives_a_refusal_and_nothing_else(
    host_policy: Rules, report_data: bytes, now: int, quote: bytes, collateral: bytes
) -> None:
    with pytest.raises(EvidenceMalformed):
        hosts.verify(Evidence(quote, collateral), host_policy(), report_data=report_data, now=now)


@settings(max_examples=200, deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True), patch=st.binary(min_size=1, max_size=8), at=st.floats(0, 1))
def test_a_quote_that_was_cut_or_patched_parses_or_is_malformed(
    genuine_quote: bytes, cut: float, patch: bytes, at: float
) -> None:
    offset = int(at * len(genuine_quote))
    for data in (
        genuine_quote[: int(cut * len(genuine_quote))],
        genuine_quote[:offset] + patch + genuine_quote[offset + len(patch) :],
        genuine_quote + patch,
    ):
        try:
            parsed = TdxQuote.parse(data)
        except EvidenceMalformed:
            continue
        assert len(data) == len(genuine_quote)
        assert data.endswith(parsed.certification_data)


@pytest.fixture(scope="module")
def genuine_quote(host: Build) -> bytes:
    return host().quote


def test_every_host_field_lies_where_the_layout_says(genuine_quote: bytes, report_data: bytes) -> None:
    parsed = TdxQuote.parse(genuine_quote)
    assert parsed.report.tee_tcb_svn == genuine_quote[48:64] == TEE_TCB_SVN
    assert parsed.report.mrtd == genuine_quote[184:232] == MRTD
    assert b"".join(parsed.report.rtmrs) == genuine_quote[376:568]
    assert parsed.report_data == genuine_quote[568:632] == report_data
    assert parsed.signature == genuine_quote[636:700]
    assert parsed.attestation_key == genuine_quote[700:764]
    assert genuine_quote[764:766] == b"\x06\x00"
    assert parsed.certification_data.startswith(b"-----BEGIN CERTIFICATE-----")


@pytest.mark.parametrize(
    ("offset", "value", "field"),
    [
        (0, b"\x03\x00", "quote version"),
        (0, b"\x05\x00", "quote version"),
        (2, b"\x03\x00", "attestation key type"),
        (4, b"\x00", "TEE type"),
        (12, b"\x00", "QE vendor id"),
        (632, b"\x00" * 4, "signature data length"),
        (632, b"\xff" * 4, "signature data length"),
        (764, b"\x05\x00", "certification data type"),
        (766, b"\xff" * 4, "certification data length"),
        (1218, b"\x1f\x00", "QE authentication data length"),
        (1252, b"\x06\x00", "nested certification data type"),
        (1254, b"\x00" * 4, "nested certification data length"),
    ],
)
def test_a_host_field_with_another_value_is_refused_by_name(
    genuine_quote: bytes, offset: int, value: bytes, field: str
) -> None:
    with pytest.raises(EvidenceMalformed) as refused:
        TdxQuote.parse(genuine_quote[:offset] + value + genuine_quote[offset + len(value) :])
    assert refused.value.field == field


def test_policies_of_enclaves_and_of_hosts_refuse_each_others_quotes(
    host: Build,
    host_policy: Rules,
    evidence: Build,
    policy: Callable[..., EvidencePolicy],
    report_data: bytes,
    now: int,
) -> None:
    with pytest.raises(EvidenceMalformed, match="a TDX quote"):
        verifier.verify(host(), policy(), report_data=report_data, now=now)
    with pytest.raises(EvidenceMalformed, match="quote version"):
        hosts.verify(evidence(), host_policy(), report_data=report_data, now=now)
    with pytest.raises(EvidenceRefused):
        hosts.verify(Evidence(host().quote, evidence().collateral), host_policy(), report_data=report_data, now=now)


def test_other_report_data_of_a_host_is_refused(host: Build, host_policy: Rules, now: int) -> None:
    for wrong in (b"\x01" * 64, b""):
        with pytest.raises(ReportDataMismatch):
            hosts.verify(host(), host_policy(), report_data=wrong, now=now)


def test_a_simulated_host_is_refused_in_production_under_any_environment_variable(
    host: Build, host_policy: Rules, platform: SimulatedPlatform, report_data: bytes, now: int, monkeypatch: Any
) -> None:
    rules = host_policy(mode="production", simulated_root_sha256=None)
    for name in ("STIP_MODE", "STIP_DEV", "STIP_SIMULATED"):
        monkeypatch.setenv(name, "development")
        for root in (None, platform.root_der):
            with pytest.raises(SimulatedEvidenceRefused):
                hosts.verify(host(), rules, report_data=report_data, now=now, root_der=root)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"measurements": []}, id="no MRTD"),
        pytest.param({"measurements": ["ab" * 32]}, id="an MRENCLAVE"),
        pytest.param({"rtmr2": []}, id="an empty list"),
        pytest.param({"rtmr4": ["ab" * 48]}, id="an unknown rule"),
        pytest.param({"signers": []}, id="a rule of enclaves"),
        pytest.param({"required_attributes": ["DEBUG"]}, id="debug required"),
        pytest.param({"required_attributes": ["PERFMON"]}, id="required and forbidden"),
        pytest.param({"mode": "production"}, id="a simulated root in production"),
        pytest.param({"xfam_mask": -1}, id="a negative mask"),
        pytest.param({"accepted_statuses": [{"status": "Revoked"}]}, id="revoked accepted"),
    ],
)
def test_a_host_policy_that_contradicts_itself_refuses_to_exist(host_policy: Rules, changes: dict[str, Any]) -> None:
    with pytest.raises(PolicyInvalid):
        host_policy(**changes)


def test_zeros_after_a_collected_quote_are_cut_and_nothing_else(genuine_quote: bytes, evidence: Build) -> None:
    for quote in (genuine_quote, evidence().quote):
        assert without_padding(quote) == without_padding(quote + bytes(70)) == quote
        with pytest.raises(EvidenceMalformed, match="after the quote"):
            without_padding(quote + bytes(3) + b"\x01")
        for short in (b"", quote[:50], quote[:433]):
            with pytest.raises(EvidenceMalformed):
                without_padding(short)
    assert tee_type(genuine_quote) == 0x81


def test_a_flipped_bit_of_a_hosts_collateral_changes_no_verdict(
    host: Build, host_policy: Rules, report_data: bytes, now: int
) -> None:
    genuine, rules = host(), host_policy()
    expected = hosts.verify(genuine, rules, report_data=report_data, now=now)
    parsed = json.loads(genuine.collateral)
    for name in ("tcb_info", "qe_identity"):
        changed = genuine.collateral.replace(json.dumps(parsed[name]).encode(), json.dumps(parsed[name] + " ").encode())
        assert changed != genuine.collateral
        with pytest.raises(AttestationError):
            hosts.verify(Evidence(genuine.quote, changed), rules, report_data=report_data, now=now)
    assert expected.simulated
