from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stip_protocol.attestation.hostpolicy import HostPolicy
from stip_protocol.attestation.policy import EvidencePolicy, EvidenceRules
from stip_protocol.attestation.roots import INTEL_SGX_ROOT_SHA256
from stip_protocol.errors import ConfigurationError, PolicyInvalid, VersionUnsupported

HASH = "ab" * 32
SIGNER = {"mrsigner": HASH, "isv_prod_id": 1, "minimum_isv_svn": 3}
VALID: dict[str, Any] = {"mode": "production", "measurements": [HASH]}

TEXT = f"""
version = [1, 0]
mode = "production"
audience = "client"
measurements = ["{HASH}"]
minimum_tcb_evaluation_number = 17
collateral_max_age_seconds = 86400
platforms = ["{"cd" * 16}"]

[[accepted_statuses]]
status = "UpToDate"

[[accepted_statuses]]
status = "SWHardeningNeeded"
advisories = ["INTEL-SA-00615"]
"""


def test_a_policy_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(TEXT)
    policy = EvidencePolicy.load(path)
    assert policy.measurements == (bytes.fromhex(HASH),)
    assert [rule.status for rule in policy.accepted_statuses] == ["UpToDate", "SWHardeningNeeded"]
    assert policy.platforms == (b"\xcd" * 16,)


def test_a_policy_survives_its_canonical_bytes_and_its_digest_tells_it_apart() -> None:
    policy = EvidencePolicy.from_mapping(VALID)
    assert EvidencePolicy.from_bytes(policy.to_bytes()) == policy
    assert len(policy.digest()) == 32
    assert EvidencePolicy.from_mapping(VALID | {"minimum_tcb_evaluation_number": 1}).digest() != policy.digest()


def test_only_up_to_date_platforms_without_advisories_are_accepted_unless_the_policy_says_so() -> None:
    (rule,) = EvidencePolicy.from_mapping(VALID).accepted_statuses
    assert (rule.status, rule.advisories) == ("UpToDate", ())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param({"measurements": []}, "measurements", id="empty"),
        pytest.param({"measurements": ["ab" * 31]}, "measurements", id="short measurement"),
        pytest.param({"measurements": ["xy" * 32]}, "measurements", id="measurement not hex"),
        pytest.param({"measurements": [7]}, "measurements", id="measurement not text"),
        pytest.param({"measurements": HASH}, "measurements", id="measurement not a list"),
        pytest.param({"mode": "debug"}, "mode", id="unknown mode"),
        pytest.param({"audience": "anyone"}, "audience", id="unknown audience"),
        pytest.param({"measurement": [HASH]}, "measurement", id="unknown key"),
        pytest.param({"signers": [SIGNER]}, "signers", id="client with signers"),
        pytest.param({"signers": [SIGNER], "measurements": []}, "signers", id="client with signers only"),
        pytest.param(
            {"audience": "keyservice", "signers": [SIGNER | {"mrsigner": "00"}]}, "signers", id="short signer"
        ),
        pytest.param(
            {"audience": "keyservice", "signers": [{"mrsigner": HASH}]}, "signers", id="signer without product"
        ),
        pytest.param({"simulated_root_sha256": HASH}, "simulated_root_sha256", id="simulated root in production"),
        pytest.param(
            {"mode": "development", "simulated_root_sha256": INTEL_SGX_ROOT_SHA256.hex()},
            "simulated_root_sha256",
            id="Intel's root as a simulated one",
        ),
        pytest.param({"accepted_statuses": []}, "accepted_statuses", id="no status"),
        pytest.param({"accepted_statuses": [{"status": "Revoked"}]}, "accepted_statuses", id="revoked accepted"),
        pytest.param(
            {"accepted_statuses": [{"status": "UpToDate"}, {"status": "UpToDate"}]},
            "accepted_statuses",
            id="status twice",
        ),
        pytest.param(
            {"accepted_statuses": [{"status": "UpToDate", "advisories": ["*"]}]}, "accepted_statuses", id="wildcard"
        ),
        pytest.param({"platforms": []}, "platforms", id="nobody enrolled"),
        pytest.param({"platforms": ["ab"]}, "platforms", id="short platform"),
        pytest.param({"collateral_max_age_seconds": 0}, "collateral_max_age_seconds", id="no age"),
        pytest.param({"collateral_max_age_seconds": "1"}, "collateral_max_age_seconds", id="age as text"),
        pytest.param({"minimum_tcb_evaluation_number": -1}, "minimum_tcb_evaluation_number", id="negative number"),
        pytest.param({"version": "1"}, "version", id="version of another form"),
    ],
)
def test_an_invalid_policy_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(PolicyInvalid) as refused:
        EvidencePolicy.from_mapping(VALID | change)
    assert refused.value.field == field
    assert field in refused.value.message


def test_a_missing_mode_is_refused() -> None:
    with pytest.raises(PolicyInvalid, match="mode"):
        EvidencePolicy.from_mapping({"measurements": [HASH]})


def test_an_unknown_major_version_is_refused_and_a_newer_minor_accepted() -> None:
    with pytest.raises(VersionUnsupported):
        EvidencePolicy.from_mapping(VALID | {"version": [2, 0]})
    EvidencePolicy.from_mapping(VALID | {"version": [1, 1]})


def test_a_key_service_may_accept_signers_alone() -> None:
    policy = EvidencePolicy.from_mapping({"mode": "production", "audience": "keyservice", "signers": [SIGNER]})
    assert policy.signers[0].minimum_isv_svn == 3


def test_a_missing_file_and_a_file_that_is_not_toml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        EvidencePolicy.load(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_bytes(b"mode = \xff")
    with pytest.raises(PolicyInvalid):
        EvidencePolicy.load(tmp_path / "bad.toml")
    (tmp_path / "worse.toml").write_text("mode = ")
    with pytest.raises(PolicyInvalid):
        EvidencePolicy.load(tmp_path / "worse.toml")
    (tmp_path / "huge.toml").write_bytes(b"#" * 300_000)
    with pytest.raises(PolicyInvalid):
        EvidencePolicy.load(tmp_path / "huge.toml")


@pytest.mark.parametrize("kind", [EvidencePolicy, HostPolicy])
def test_a_key_of_a_hundred_thousand_parts_is_refused_before_it_costs_the_memory_of_the_machine(
    kind: type[EvidenceRules], tmp_path: Path
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("a" + ".a" * 120_000 + " = 1\n")
    with pytest.raises(PolicyInvalid, match="more than 1024 dots"):
        kind.load(path)
