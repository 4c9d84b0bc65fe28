"""What people see of a policy before they sign it: lint and diff."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stip_keyservice.service.policy import Policy
from stip_keyservice.service.policy.diff import Effect, diff
from stip_keyservice.service.policy.lint import lint, lint_host
from stip_protocol.attestation.hostpolicy import HostPolicy
from stip_protocol.errors import PolicyInvalid

from .place import told_here
from .policies import CHANGES, FULL, MAXIMUM, A, B, C, Edit, Tables, add, drop, edited, policy, put

OPPOSITE: dict[Effect, Effect] = {"widens": "narrows", "narrows": "widens", "both": "both", "neutral": "neutral"}


@pytest.mark.parametrize("case", CHANGES)
def test_diff_names_a_change_and_says_what_it_lets_in(case: str) -> None:
    edit, rule, effect = CHANGES[case]
    found = {change.rule: change.effect for change in diff(policy(), policy(edit))}
    assert found[rule] == effect
    # one edit changes one rule, except where a value takes the place of another
    assert len(found) == 1 or case == "another platform in its place"


@pytest.mark.parametrize("case", CHANGES)
def test_what_widens_one_way_narrows_the_other(case: str) -> None:
    new = policy(CHANGES[case][0])
    forth = {change.rule: change.effect for change in diff(policy(), new)}
    back = {change.rule: change.effect for change in diff(new, policy())}
    assert back == {rule: OPPOSITE[effect] for rule, effect in forth.items()}


@given(names=st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=5, unique=True))
def test_diff_names_every_rule_that_differs(names: list[str]) -> None:
    try:
        new = policy(*(CHANGES[name][0] for name in names))
    except (KeyError, IndexError, ValidationError, PolicyInvalid):
        return
    found = diff(policy(), new)
    for change in found:
        assert change.before != change.after
    patched = policy().meaning() == new.meaning()
    assert patched == (found == ())
    tops = {change.rule.split(".")[0].split("[")[0] for change in found}
    differing = {name for name, value in policy().meaning().items() if value != new.meaning()[name]}
    assert tops == differing


def test_a_development_policy_is_a_widening_of_the_same_for_production() -> None:
    new = policy(put("evidence", "mode", "development"), put("evidence", "simulated_root_sha256", A))
    assert [(change.rule, change.effect) for change in diff(policy(), new)] == [
        ("evidence.mode", "widens"),
        ("evidence.simulated_root_sha256", "both"),
    ]


def test_serving_everything_is_a_widening_of_any_list() -> None:
    everything = policy(put("evidence", "mode", "development"), drop("instances"))
    assert ("instances", "widens") in [(change.rule, change.effect) for change in diff(policy(), everything)]


UNWISE: dict[str, tuple[Edit, str, str]] = {
    "a simulated TEE": (
        lambda tables: (
            put("evidence", "mode", "development")(tables), put("evidence", "simulated_root_sha256", C)(tables),
        ), "warning", "evidence.simulated_root_sha256",
    ),
    "development with real evidence": (put("evidence", "mode", "development"), "error", "evidence.mode"),
    "OutOfDate": (
        add("evidence", "accepted_statuses", {"status": "OutOfDate", "advisories": ["INTEL-SA-00615"]}),
        "error", "evidence.accepted_statuses",
    ),
    "OutOfDateConfigurationNeeded": (
        add("evidence", "accepted_statuses", {"status": "OutOfDateConfigurationNeeded"}),
        "error", "evidence.accepted_statuses",
    ),
    "a status without advisories": (
        add("evidence", "accepted_statuses", {"status": "ConfigurationNeeded"}),
        "warning", "evidence.accepted_statuses",
    ),
    "no minimum evaluation number": (
        drop("evidence", "minimum_tcb_evaluation_number"), "warning", "evidence.minimum_tcb_evaluation_number",
    ),
    "old collateral": (
        put("evidence", "collateral_max_age_seconds", 31 * 86400), "warning", "evidence.collateral_max_age_seconds",
    ),
    "any platform": (drop("evidence", "platforms"), "warning", "evidence.platforms"),
    "a signer": (
        put("evidence", "signers", [{"mrsigner": B, "isv_prod_id": 1, "minimum_isv_svn": 3}]),
        "warning", "evidence.signers",
    ),
    "a signer from SVN 0": (
        put("evidence", "signers", [{"mrsigner": B, "isv_prod_id": 1, "minimum_isv_svn": 0}]),
        "error", "evidence.signers",
    ),
    "many measurements": (
        put("evidence", "measurements", [f"{number:02x}" * 32 for number in range(5)]),
        "note", "evidence.measurements",
    ),
    "long leases": (put("lease", "seconds", 3601), "warning", "lease.seconds"),
    "a long grace": (put("lease", "grace_seconds", 901), "note", "lease.grace_seconds"),
    "a large revocation bound": (put("lease", "heartbeat_tokens", 257), "warning", "lease.heartbeat_tokens"),
    "large chunks": (put("lease", "tokens", 65_537), "note", "lease.tokens"),
    "old nonces": (put("release", "nonce_seconds", 301), "note", "release.nonce_seconds"),
    "no caps": (drop("budgets"), "note", "budgets"),
    "a shared instance for anybody": (
        put("instances", 0, {"manifest": A, "kind": "shared"}), "note", f"instances[{A[:16]}…]",
    ),
    "no leakage rules": (drop("leakage"), "warning", "leakage"),
    "audits not required": (put("leakage", "required", False), "warning", "leakage.required"),
    "no maxima": (put("leakage", "maxima", []), "warning", "leakage.maxima"),
    "no maximum for the operator alone": (
        put("leakage", "maxima", [MAXIMUM | {"attacks": ["A"]}]), "warning", "leakage.maxima",
    ),
    "a maximum that refuses nothing": (put("leakage", "maxima", 0, "at_most", 1.0), "error", "leakage.maxima[1]"),
    "a maximum without attacks": (drop("leakage", "maxima", 0, "attacks"), "warning", "leakage.maxima[1]"),
    "no canaries": (drop("canaries"), "note", "canaries.per_bundle"),
}  # fmt: skip
SOUND: Tables = edited(drop("evidence", "signers"))


@pytest.mark.parametrize("case", UNWISE)
def test_lint_finds(case: str) -> None:
    edit, level, rule = UNWISE[case]
    before = {(finding.level, finding.rule, finding.why) for finding in lint(policy(tables=SOUND))}
    after = {(finding.level, finding.rule, finding.why) for finding in lint(policy(edit, tables=SOUND))}
    assert (level, rule) in {(one, name) for one, name, _ in after - before}


def test_lint_has_nothing_but_the_loophole_to_say_of_a_sound_policy() -> None:
    (finding,) = lint(policy(tables=SOUND))
    assert (finding.level, finding.rule) == ("note", "leakage.maxima[1]")
    assert "not applicable" in finding.why
    assert policy(tables=SOUND).evidence.measurements


def test_lint_puts_the_gravest_first() -> None:
    levels = [finding.level for finding in lint(policy(drop("leakage"), put("evidence", "mode", "development")))]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    assert levels[0] == "error"


@given(names=st.lists(st.sampled_from(sorted(UNWISE)), max_size=6, unique=True))
def test_lint_reads_every_policy_that_loads(names: list[str]) -> None:
    try:
        loaded = Policy.model_validate(edited(*(UNWISE[name][0] for name in names)))
    except (KeyError, IndexError, ValidationError, PolicyInvalid):
        return
    for finding in lint(loaded):
        assert finding.why
        assert finding.advice


def test_the_full_policy_has_every_table() -> None:
    assert set(FULL) == set(Policy.model_fields)


SOUND_HOST: Tables = {
    "mode": "production",
    "measurements": ["aa" * 48],
    "rtmr0": ["ab" * 48],
    "rtmr1": ["bb" * 48],
    "rtmr2": ["cc" * 48],
    "minimum_tcb_evaluation_number": 17,
    "platforms": ["dd" * 16],
    "xfam_mask": 0x602E7,
}
HOSTS: dict[str, tuple[Tables, str, str]] = {
    "any kernel": ({"rtmr1": None}, "error", "rtmr1"),
    "any command line": ({"rtmr2": None}, "error", "rtmr2"),
    "any virtual hardware": ({"rtmr0": None}, "note", "rtmr0"),
    "any features": ({"xfam_mask": None}, "note", "xfam_mask"),
    "performance counters": ({"forbidden_attributes": []}, "warning", "forbidden_attributes"),
    "any platform": ({"platforms": None}, "warning", "platforms"),
    "any TCB recovery": ({"minimum_tcb_evaluation_number": 0}, "warning", "minimum_tcb_evaluation_number"),
    "collateral of last year": (
        {"collateral_max_age_seconds": 400 * 86400}, "warning", "collateral_max_age_seconds",
    ),
    "unpatched platforms": ({"accepted_statuses": [{"status": "OutOfDate"}]}, "error", "accepted_statuses"),
    "development with Intel's evidence": ({"mode": "development"}, "error", "mode"),
    "a simulated TEE": ({"mode": "development", "simulated_root_sha256": A}, "warning", "simulated_root_sha256"),
}  # fmt: skip


def host_policy(changed: Tables) -> HostPolicy:
    return HostPolicy.from_mapping({key: value for key, value in (SOUND_HOST | changed).items() if value is not None})


def test_lint_has_nothing_to_say_of_a_sound_policy_for_hosts() -> None:
    assert lint_host(host_policy({})) == ()


@pytest.mark.parametrize("case", HOSTS)
def test_lint_finds_in_a_policy_for_hosts(case: str) -> None:
    changed, level, rule = HOSTS[case]
    assert (level, rule) in {(finding.level, finding.rule) for finding in lint_host(host_policy(changed))}


def test_the_command_lints_a_policy_for_hosts(tmp_path: Path) -> None:
    path = tmp_path / "host-policy.toml"
    path.write_bytes(tomli_w.dumps(SOUND_HOST).encode())
    assert told_here("policy", "lint", "--host", str(path), "--strict").exit_code == 0
    path.write_bytes(tomli_w.dumps({k: v for k, v in SOUND_HOST.items() if k != "rtmr2"}).encode())
    told = told_here("policy", "lint", "--host", str(path))
    assert (told.exit_code, "any command line" in told.stdout) == (1, True)
    assert told_here("policy", "lint", str(path)).exit_code == 2
