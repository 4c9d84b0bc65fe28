"""Policies for tests: one that has every rule, and what changes each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from stip_keyservice.service.policy import Policy

A, B, C = ("aa" * 32, "bb" * 32, "cc" * 32)
PLATFORM, OTHER_PLATFORM = "01" * 16, "02" * 16

Tables = dict[str, Any]

FULL: Tables = {
    "version": [1, 1],
    "serial": 7,
    "evidence": {
        "mode": "production",
        "measurements": [A],
        "signers": [{"mrsigner": B, "isv_prod_id": 1, "minimum_isv_svn": 3}],
        "accepted_statuses": [
            {"status": "UpToDate"},
            {"status": "SWHardeningNeeded", "advisories": ["INTEL-SA-00615"]},
        ],
        "minimum_tcb_evaluation_number": 17,
        "collateral_max_age_seconds": 86400,
        "platforms": [PLATFORM],
    },
    "lease": {
        "seconds": 900,
        "tokens": 1024,
        "heartbeat_tokens": 64,
        "audience": "gateway.stip",
        "grace_seconds": 300,
    },
    "release": {"nonce_seconds": 60, "delegation_seconds": 3600},
    "budgets": {"tokens_per_user": 1_000_000, "tokens_per_day": 50_000},
    "instances": [
        {"manifest": A, "kind": "shared", "users": ["alice"], "domains": ["acme"]},
        {"manifest": B},
    ],
    "leakage": {
        "required": True,
        "maxima": [{"knowledge": ["server"], "metric": "token_top1", "at_most": 0.5, "attacks": ["A", "B"]}],
    },
    "canaries": {"per_bundle": 4},
}

Edit = Callable[[Tables], object]


def edited(*edits: Edit, tables: Tables = FULL) -> Tables:
    """A copy with the edits made."""
    made = copy.deepcopy(tables)
    for edit in edits:
        edit(made)
    return made


def policy(*edits: Edit, tables: Tables = FULL) -> Policy:
    """The validated policy of a copy with the edits made."""
    return Policy.model_validate(edited(*edits, tables=tables))


def put(*path: Any) -> Edit:
    """Set what `path` leads to; its last element is the value."""
    *way, last, value = path

    def edit(tables: Tables) -> None:
        at: Any = tables
        for step in way:
            at = at.setdefault(step, {}) if isinstance(at, dict) else at[step]
        at[last] = copy.deepcopy(value)

    return edit


def add(*path: Any) -> Edit:
    """Append to the list that `path` leads to; its last element is the value."""
    *way, value = path

    def edit(tables: Tables) -> None:
        at: Any = tables
        for step in way:
            at = at[step]
        at.append(copy.deepcopy(value))

    return edit


def drop(*path: Any) -> Edit:
    """Remove what `path` leads to."""
    *way, last = path

    def edit(tables: Tables) -> None:
        at: Any = tables
        for step in way:
            at = at[step]
        del at[last]

    return edit


SIGNER = {"mrsigner": C, "isv_prod_id": 1, "minimum_isv_svn": 3}
MAXIMUM = {"knowledge": ["drifted"], "metric": "token_top1", "at_most": 0.5}

CHANGES: dict[str, tuple[Edit, str, str]] = {
    "a higher serial": (put("serial", 8), "serial", "neutral"),
    "an older version": (put("version", [1, 0]), "version", "neutral"),
    "development mode": (put("evidence", "mode", "development"), "evidence.mode", "widens"),
    "another measurement": (add("evidence", "measurements", B), f"evidence.measurements[{B}]", "widens"),
    "no measurement": (put("evidence", "measurements", []), f"evidence.measurements[{A}]", "narrows"),
    "another signer": (
        add("evidence", "signers", SIGNER), f"evidence.signers[mrsigner={C} isv_prod_id=1]", "widens",
    ),
    "no signer": (put("evidence", "signers", []), f"evidence.signers[mrsigner={B} isv_prod_id=1]", "narrows"),
    "an older product": (
        put("evidence", "signers", 0, "minimum_isv_svn", 2),
        f"evidence.signers[mrsigner={B} isv_prod_id=1].minimum_isv_svn", "widens",
    ),
    "a newer product": (
        put("evidence", "signers", 0, "minimum_isv_svn", 4),
        f"evidence.signers[mrsigner={B} isv_prod_id=1].minimum_isv_svn", "narrows",
    ),
    "another status": (
        add("evidence", "accepted_statuses", {"status": "OutOfDate"}),
        "evidence.accepted_statuses[status=OutOfDate]", "widens",
    ),
    "a status less": (
        drop("evidence", "accepted_statuses", 1), "evidence.accepted_statuses[status=SWHardeningNeeded]", "narrows",
    ),
    "another advisory": (
        add("evidence", "accepted_statuses", 1, "advisories", "INTEL-SA-00289"),
        "evidence.accepted_statuses[status=SWHardeningNeeded].advisories[INTEL-SA-00289]", "widens",
    ),
    "no advisory": (
        put("evidence", "accepted_statuses", 1, "advisories", []),
        "evidence.accepted_statuses[status=SWHardeningNeeded].advisories[INTEL-SA-00615]", "narrows",
    ),
    "an older recovery": (
        put("evidence", "minimum_tcb_evaluation_number", 16), "evidence.minimum_tcb_evaluation_number", "widens",
    ),
    "a newer recovery": (
        put("evidence", "minimum_tcb_evaluation_number", 18), "evidence.minimum_tcb_evaluation_number", "narrows",
    ),
    "older collateral": (
        put("evidence", "collateral_max_age_seconds", 86401), "evidence.collateral_max_age_seconds", "widens",
    ),
    "any platform": (drop("evidence", "platforms"), "evidence.platforms", "widens"),
    "another platform": (
        add("evidence", "platforms", OTHER_PLATFORM), f"evidence.platforms[{OTHER_PLATFORM}]", "widens",
    ),
    "another platform in its place": (
        put("evidence", "platforms", [OTHER_PLATFORM]), f"evidence.platforms[{PLATFORM}]", "narrows",
    ),
    "longer leases": (put("lease", "seconds", 901), "lease.seconds", "widens"),
    "shorter leases": (put("lease", "seconds", 899), "lease.seconds", "narrows"),
    "larger chunks": (put("lease", "tokens", 1025), "lease.tokens", "widens"),
    "later revocation": (put("lease", "heartbeat_tokens", 65), "lease.heartbeat_tokens", "widens"),
    "another gateway": (put("lease", "audience", "other.stip"), "lease.audience", "both"),
    "a longer grace": (put("lease", "grace_seconds", 301), "lease.grace_seconds", "widens"),
    "older nonces": (put("release", "nonce_seconds", 61), "release.nonce_seconds", "widens"),
    "longer delegations": (put("release", "delegation_seconds", 3601), "release.delegation_seconds", "widens"),
    "no cap on a user": (drop("budgets", "tokens_per_user"), "budgets.tokens_per_user", "widens"),
    "a lower cap on a user": (put("budgets", "tokens_per_user", 10), "budgets.tokens_per_user", "narrows"),
    "a higher cap on a day": (put("budgets", "tokens_per_day", 50_001), "budgets.tokens_per_day", "widens"),
    "another instance": (add("instances", {"manifest": C}), f"instances[manifest={C}]", "widens"),
    "an instance less": (drop("instances", 1), f"instances[manifest={B}]", "narrows"),
    "another kind": (put("instances", 0, "kind", "dedicated"), f"instances[manifest={A}].kind", "both"),
    "any kind": (drop("instances", 0, "kind"), f"instances[manifest={A}].kind", "widens"),
    "another user": (add("instances", 0, "users", "bob"), f"instances[manifest={A}].who[user=bob]", "widens"),
    "a domain less": (drop("instances", 0, "domains"), f"instances[manifest={A}].who[domain=acme]", "narrows"),
    "for certain users": (put("instances", 1, "users", ["bob"]), f"instances[manifest={B}].who", "narrows"),
    "no leakage rules": (drop("leakage"), "leakage", "widens"),
    "audits not required": (put("leakage", "required", False), "leakage.required", "widens"),
    "a higher maximum": (
        put("leakage", "maxima", 0, "at_most", 0.6),
        "leakage.maxima[metric=token_top1 knowledge=server attacks=A,B].at_most", "widens",
    ),
    "a maximum less": (
        put("leakage", "maxima", []), "leakage.maxima[metric=token_top1 knowledge=server attacks=A,B]", "widens",
    ),
    "another maximum": (
        add("leakage", "maxima", MAXIMUM), "leakage.maxima[metric=token_top1 knowledge=drifted]", "narrows",
    ),
    "fewer canaries": (put("canaries", "per_bundle", 3), "canaries.per_bundle", "widens"),
    "more canaries": (put("canaries", "per_bundle", 5), "canaries.per_bundle", "narrows"),
}  # fmt: skip
"""By name: one change of `FULL`, the rule that it names, and what it does."""
