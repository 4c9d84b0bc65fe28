"""The policy file: what refuses to load, and that every rule stands in the digest."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from stip_keyservice.service.policy import Budgets, InstanceRule, Policy
from stip_keyservice.service.policy.access import require_listed
from stip_keyservice.service.policy.diff import LISTS, RULES, diff
from stip_protocol.errors import ConfigurationError, InstanceRefused, PolicyInvalid, VersionUnsupported

from .policies import CHANGES, FULL, MAXIMUM, PLATFORM, SIGNER, A, Edit, add, drop, edited, policy, put

REFUSED: dict[str, Edit] = {
    "nothing at all": lambda tables: tables.clear(),
    "no evidence": drop("evidence"),
    "evidence that accepts nobody": put("evidence", {"mode": "production"}),
    "an unknown table": put("hardening", {"strict": True}),
    "an unknown rule": put("lease", "minutes", 15),
    "an unknown rule of an instance": put("instances", 1, "user", "alice"),
    "an unknown rule of evidence": put("evidence", "allow_debug", True),
    "production without a serial": drop("serial"),
    "serial 0": put("serial", 0),
    "a serial in words": put("serial", "7"),
    "a serial that is true": put("serial", True),
    "production that serves nothing": put("instances", []),
    "production that does not say what it serves": drop("instances"),
    "a manifest that is no digest": put("instances", 0, "manifest", "aa"),
    "a manifest that is no hex": put("instances", 0, "manifest", "zz" * 32),
    "an instance without a manifest": add("instances", {"kind": "shared"}),
    "a manifest named twice": add("instances", {"manifest": A, "kind": "dedicated"}),
    "an unknown kind": put("instances", 0, "kind", "public"),
    "an instance for no user": put("instances", 0, "users", []),
    "an instance for no domain": put("instances", 0, "domains", []),
    "a user named twice": put("instances", 0, "users", ["alice", "alice"]),
    "a user with a space": put("instances", 0, "users", ["al ice"]),
    "a measurement named twice": add("evidence", "measurements", A),
    "a platform named twice": add("evidence", "platforms", PLATFORM),
    "a signer's product named twice": add(
        "evidence", "signers", SIGNER | {"mrsigner": "bb" * 32, "minimum_isv_svn": 9}
    ),
    "an advisory named twice": add("evidence", "accepted_statuses", 1, "advisories", "INTEL-SA-00615"),
    "a status named twice": add("evidence", "accepted_statuses", {"status": "UpToDate"}),
    "no status": put("evidence", "accepted_statuses", []),
    "a revoked status": add("evidence", "accepted_statuses", {"status": "Revoked"}),
    "a simulated root in production": put("evidence", "simulated_root_sha256", A),
    "a client's policy": put("evidence", "audience", "client"),
    "a maximum named twice": add("leakage", "maxima", FULL["leakage"]["maxima"][0] | {"attacks": ["B", "A"]}),
    "the attacks of a maximum named twice": add("leakage", "maxima", MAXIMUM | {"attacks": ["A", "A"]}),
    "a budget of nothing": put("budgets", "tokens_per_day", 0),
    "a negative budget": put("budgets", "tokens_per_user", -1),
    "a budget beyond any": put("budgets", "tokens_per_user", 2**40 + 1),
    "a budget that is true": put("budgets", "tokens_per_user", True),
    "seconds in words": put("lease", "seconds", "900"),
    "seconds with a fraction": put("lease", "seconds", 900.0),
    "a lease of a second": put("lease", "seconds", 1),
    "a lease of a week": put("lease", "seconds", 7 * 86400),
    "a revocation bound beyond the chunk": put("lease", "heartbeat_tokens", 1025),
    "a revocation bound of 0": put("lease", "heartbeat_tokens", 0),
    "nonces for an hour": put("release", "nonce_seconds", 3600),
    "delegations beyond a day": put("release", "delegation_seconds", 86401),
    "seventeen canaries": put("canaries", "per_bundle", 17),
    "minus one canary": put("canaries", "per_bundle", -1),
    "another major version": put("version", [2, 0]),
    "a newer minor version": put("version", [1, 2]),
    "a version of one number": put("version", [1]),
    "a version in words": put("version", ["1", "1"]),
    "a version that is true": put("version", [True, True]),
}


def parse(tables: dict[str, Any]) -> Policy:
    return Policy.parse(tomli_w.dumps(tables).encode(), name="policy.toml")


@pytest.mark.parametrize("case", REFUSED)
def test_a_policy_refuses_to_load_with(case: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(edited(REFUSED[case]))
    assert caught.value.code in ("policy_invalid", "version_unsupported")
    assert "policy" in caught.value.message


def test_the_full_policy_loads_as_it_stands_and_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(tomli_w.dumps(FULL).encode())
    loaded = Policy.load(path)
    assert loaded == policy()
    assert loaded.instances[0] == InstanceRule(
        manifest=bytes.fromhex(A), kind="shared", users=("alice",), domains=("acme",)
    )
    assert (loaded.serial, loaded.canaries.per_bundle, loaded.budgets.tokens_per_day) == (7, 4, 50_000)


def test_a_policy_for_development_may_do_without_serial_and_instances() -> None:
    loaded = parse({"evidence": {"mode": "development", "measurements": [A], "simulated_root_sha256": A}})
    assert (loaded.serial, loaded.instances, loaded.canaries.per_bundle) == (None, (), 0)
    require_listed(loaded.instances, bytes(32), "shared")


@pytest.mark.parametrize("case", CHANGES)
def test_every_change_of_a_rule_changes_the_digest(case: str) -> None:
    assert policy(CHANGES[case][0]).digest() != policy().digest()


def test_every_rule_of_every_table_is_among_the_changes_and_known_to_diff() -> None:
    """A new rule without a row in `CHANGES` fails here: it would be in nobody's review."""
    changed = {pattern(rule) for _, rule, _ in CHANGES.values()}
    never_changed = {"evidence.audience", "evidence.simulated_root_sha256"}
    for rule in leaves(Policy, ""):
        assert rule in RULES or rule in LISTS, rule
        assert rule in never_changed or any(one == rule or one == f"{rule}.*" for one in changed), rule


def pattern(rule: str) -> str:
    """`instances[manifest=aa…].kind` as the tables of `diff` have it."""
    made, depth = "", 0
    for character in rule:
        if character == "[" and not depth:
            made += ".*"
        depth += (character == "[") - (character == "]")
        if not depth and character != "]":
            made += character
    return made


IDENTIFYING = {"mrsigner", "isv_prod_id", "status", "manifest", "metric", "knowledge", "attacks", "presets"}


def leaves(kind: type[BaseModel], path: str) -> Iterator[str]:
    """Every rule of a table, lists of tables followed, as `diff` names them."""
    for name, found in kind.model_fields.items():
        rule = f"{path}.{name}".lstrip(".")
        if name in IDENTIFYING and path:
            continue
        below, many = table_of(found.annotation)
        if rule in ("instances.*.users", "instances.*.domains"):
            yield "instances.*.who"
        elif below is None:
            yield rule
        else:
            yield from leaves(below, f"{rule}.*" if many else rule)


def table_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in get_args(annotation):
        found, _ = table_of(part)
        if found is not None:
            return found, getattr(annotation, "__origin__", None) is tuple or table_of(part)[1]
    return None, False


def shuffled(tables: Any, by: random.Random) -> Any:
    """The same tables, every list and every table in another order."""
    if isinstance(tables, dict):
        names = [*tables]
        by.shuffle(names)
        return {name: tables[name] if name == "version" else shuffled(tables[name], by) for name in names}
    if isinstance(tables, list):
        made = [shuffled(one, by) for one in tables]
        by.shuffle(made)
        return made
    return tables


some_changes = st.lists(st.sampled_from(sorted(CHANGES)), max_size=6, unique=True)


def changed(names: list[str]) -> Policy | None:
    """`FULL` after those changes; None where they do not go together."""
    try:
        return policy(*(CHANGES[name][0] for name in names))
    except (KeyError, IndexError, ValidationError, PolicyInvalid):
        return None


@given(names=some_changes, by=st.randoms(use_true_random=False))
def test_order_never_counts(names: list[str], by: random.Random) -> None:
    loaded = changed(names)
    if loaded is not None:
        again = parse(shuffled(edited(*(CHANGES[name][0] for name in names)), by))
        assert again.digest() == loaded.digest()
        assert diff(loaded, again) == ()


@given(one=some_changes, other=some_changes)
def test_policies_mean_the_same_exactly_where_their_digests_are_equal(one: list[str], other: list[str]) -> None:
    old, new = changed(one), changed(other)
    if old is not None and new is not None:
        same = old.meaning() == new.meaning()
        assert (old.digest() == new.digest()) == same == (diff(old, new) == ())


toml_values = st.recursive(
    st.none().map(lambda _: "") | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
rule_names = st.sampled_from([*FULL, *(name for table in FULL.values() if isinstance(table, dict) for name in table)])


@given(tables=st.dictionaries(rule_names | st.text(max_size=12), toml_values, max_size=4), whole=st.booleans())
def test_no_values_make_the_reader_raise_anything_but_its_refusals(tables: dict[str, Any], whole: bool) -> None:
    with contextlib.suppress(PolicyInvalid, VersionUnsupported):
        parse((FULL if whole else {}) | tables)


@given(table=st.sampled_from([name for name, below in FULL.items() if isinstance(below, dict)]), data=st.data())
def test_no_value_of_any_rule_makes_the_reader_raise_anything_but_its_refusals(table: str, data: st.DataObject) -> None:
    rule = data.draw(st.sampled_from([*FULL[table]]))
    with contextlib.suppress(PolicyInvalid, VersionUnsupported):
        parse(edited(put(table, rule, data.draw(toml_values))))


@given(st.binary(max_size=300))
def test_no_bytes_make_the_reader_raise_anything_but_its_refusals(data: bytes) -> None:
    with pytest.raises(ConfigurationError):
        Policy.parse(data, name="policy.toml")


@pytest.mark.parametrize("text", ["a = " + "[" * 60_000, "a = " + "{a=" * 30_000, "[" + "a." * 100_000 + "a]"])
def test_what_is_nested_too_deep_is_refused_and_soon(text: str) -> None:
    with pytest.raises(PolicyInvalid):
        Policy.parse(text.encode(), name="policy.toml")


@pytest.mark.parametrize(
    ("caps", "spent", "today", "left"),
    [
        ({}, 10**9, 10**9, None),
        ({"tokens_per_user": 100}, 30, 30, 70),
        ({"tokens_per_user": 100}, 100, 0, 0),
        ({"tokens_per_user": 100}, 130, 0, 0),
        ({"tokens_per_day": 100}, 10**6, 99, 1),
        ({"tokens_per_day": 100, "tokens_per_user": 1000}, 990, 20, 10),
        ({"tokens_per_day": 100, "tokens_per_user": 1000}, 500, 95, 5),
    ],
)
def test_the_lower_cap_decides_what_a_user_may_still_be_given(
    caps: dict[str, int], spent: int, today: int, left: int | None
) -> None:
    assert Budgets.model_validate(caps).allowance(spent, today) == left


def test_only_a_listed_manifest_of_the_right_kind_is_served() -> None:
    rules = policy().instances
    require_listed(rules, bytes.fromhex(A), "shared")
    for kind in ("shared", "dedicated"):
        require_listed(rules, bytes.fromhex("bb" * 32), kind)
    with pytest.raises(InstanceRefused, match="kind: got dedicated, allowed: shared"):
        require_listed(rules, bytes.fromhex(A), "dedicated")
    with pytest.raises(InstanceRefused, match="one of the 2"):
        require_listed(rules, bytes.fromhex("cc" * 32), "shared")


def test_the_example_in_the_documentation_loads_and_has_every_rule() -> None:
    text = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    for placeholder, value in (("<32 hex digits>", PLATFORM), *((f"<{name}>", A) for name in PLACEHOLDERS)):
        example = example.replace(placeholder, value)
    loaded = Policy.parse(example.encode(), name="policy.md")
    shown = {pattern(rule) for rule in rules_of(loaded.meaning(), "")}
    for rule in leaves(Policy, ""):
        assert rule in shown or f"{rule}.*" in shown or rule in NOT_SHOWN, rule


PLACEHOLDERS = ("MRENCLAVE", "MRSIGNER", "SHA-256 of manifest.json")
NOT_SHOWN = {"evidence.audience", "evidence.simulated_root_sha256"}


def rules_of(node: Any, path: str) -> Iterator[str]:
    """Every path of a meaning, as `diff` writes it."""
    for name, below in node.items():
        inner = f"{path}[{name}]" if pattern(path) in LISTS else f"{path}.{name}".lstrip(".")
        yield inner
        if isinstance(below, dict):
            yield from rules_of(below, inner)
