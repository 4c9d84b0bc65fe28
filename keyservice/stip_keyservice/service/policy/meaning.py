"""A policy as nested maps: what is digested, and what `policy diff` compares.

Comments, order and spelling in the file do not count. Every list of a policy is a set, so it becomes a map by name:
of plain values by the value itself, of tables by what identifies them (`KEYS`), with the rest of the table below.

    {"evidence": {"measurements": {"<hex>": {}}, "signers": {"mrsigner=<hex> isv_prod_id=1": {"minimum_isv_svn": 2}}},
     "lease": {"seconds": 900, …}, "instances": {"manifest=<hex>": {"kind": "shared", "who": {"user=alice": {}}}}}

None where there is a set means everyone or everything. Two policies mean the same exactly where these maps are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from stip_keyservice.service.policy.document import Policy

Leaf: TypeAlias = str | int | float | bool | None
Meaning: TypeAlias = dict[str, "Leaf | Meaning"]

KEYS: Mapping[str, tuple[str, ...]] = {
    "evidence.signers": ("mrsigner", "isv_prod_id"),
    "evidence.accepted_statuses": ("status",),
    "instances": ("manifest",),
    "leakage.maxima": ("metric", "knowledge", "attacks", "presets"),
}
"""By rule: the fields that name one table of a list of tables."""


def meaning(policy: Policy) -> Meaning:
    """The maps. Raises `ValueError` where a rule is named twice."""
    tree = _node("", policy.model_dump(mode="python"))
    assert isinstance(tree, dict)
    # Without one, every registered instance is served: that is no empty set.
    served = tree["instances"]
    assert isinstance(served, dict)
    for rule in served.values():
        assert isinstance(rule, dict)
        rule["who"] = _who(rule.pop("users"), rule.pop("domains"))
    tree["instances"] = served or None
    return tree


def _node(path: str, value: object) -> Leaf | Meaning:
    if isinstance(value, Mapping):
        return {str(name): _node(f"{path}.{name}".lstrip("."), below) for name, below in value.items()}
    if path == "version":
        assert isinstance(value, Sequence)
        return ".".join(map(str, value))
    if isinstance(value, tuple | list):
        return _named(path, value)
    if isinstance(value, bytes):
        return value.hex()
    assert value is None or isinstance(value, str | int | float)
    return value


def _named(path: str, values: Sequence[object]) -> Meaning:
    made: Meaning = {}
    for value in values:
        if isinstance(value, Mapping):
            fields = dict(value)
            names = [(field, _text(fields.pop(field))) for field in KEYS[path]]
            key = " ".join(f"{field}={name}" for field, name in names if name)
            below = _node(path, fields)
        else:
            key, below = _text(value), {}
        if key in made:
            raise ValueError(f"{path}: {key} is named twice")
        made[key] = below
    return made


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple | list):
        names = sorted(map(_text, value))
        twice = next((name for name, again in pairwise(names) if name == again), None)
        if twice is not None:
            raise ValueError(f"{twice} is named twice")
        return ",".join(names)
    return str(value)


def _who(users: Leaf | Meaning, domains: Leaf | Meaning) -> Leaf | Meaning:
    """One set of both: a user may be admitted by either, and without both everyone is."""
    if users is None and domains is None:
        return None
    kinds = (("user", users), ("domain", domains))
    return {f"{kind}={name}": {} for kind, names in kinds if isinstance(names, dict) for name in names}
