"""Two policies compared by meaning: what is accepted now that was not, and what no longer is.

A change *widens* where it lets in anything that was refused before: another measurement, an older security version, a
longer lease, a maximum that is gone. It *narrows* where it refuses anything that was let in. Some do both (another
gateway), some neither (a new serial). How a rule behaves stands in two tables; a rule that is in neither is an error,
so no new rule can slip through a review unmarked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from stip_keyservice.service.policy.document import Policy
from stip_keyservice.service.policy.meaning import Leaf, Meaning

Effect = Literal["widens", "narrows", "both", "neutral"]
Node: TypeAlias = "Leaf | Meaning"
Rate: TypeAlias = Callable[[Node, Node], Effect]


@dataclass(frozen=True)
class Change:
    """One rule that differs. `before` and `after` are for people; None: the rule is not there."""

    rule: str
    effect: Effect
    before: str | None
    after: str | None

    @property
    def widens(self) -> bool:
        """Whether anything is accepted that was not."""
        return self.effect in ("widens", "both")

    @property
    def narrows(self) -> bool:
        """Whether anything is refused that was not."""
        return self.effect in ("narrows", "both")


def _more_widens(old: Node, new: Node) -> Effect:
    """Numbers; none is no bound."""
    return "widens" if _number(new) > _number(old) else "narrows"


def _less_widens(old: Node, new: Node) -> Effect:
    return "widens" if _number(new) < _number(old) else "narrows"


def _none_widens(old: Node, new: Node) -> Effect:
    """A list, where none at all means everyone."""
    return "widens" if new is None else "narrows"


def _choice(old: Node, new: Node) -> Effect:
    """One value in place of another: what fits the one does not fit the other. None fits both."""
    if old is None or new is None:
        return _none_widens(old, new)
    return "both"


def _mode(old: Node, new: Node) -> Effect:
    """Development may trust a simulated TEE, and may go without a signature."""
    return "widens" if new == "development" else "narrows"


def _root(old: Node, new: Node) -> Effect:
    """Another root of trust than before, also where Intel's takes the place of a simulated one."""
    return "both"


def _neutral(old: Node, new: Node) -> Effect:
    return "neutral"


RULES: Mapping[str, Rate] = {
    "version": _neutral,
    "serial": _neutral,
    "evidence.mode": _mode,
    "evidence.audience": _neutral,
    "evidence.signers.*.minimum_isv_svn": _less_widens,
    "evidence.minimum_tcb_evaluation_number": _less_widens,
    "evidence.collateral_max_age_seconds": _more_widens,
    "evidence.platforms": _none_widens,
    "evidence.simulated_root_sha256": _root,
    "lease.seconds": _more_widens,
    "lease.tokens": _more_widens,
    "lease.heartbeat_tokens": _more_widens,
    "lease.audience": _choice,
    "lease.grace_seconds": _more_widens,
    "release.nonce_seconds": _more_widens,
    "release.delegation_seconds": _more_widens,
    "budgets.tokens_per_user": _more_widens,
    "budgets.tokens_per_day": _more_widens,
    "instances": _none_widens,
    "instances.*.kind": _choice,
    "instances.*.who": _none_widens,
    "leakage": _none_widens,
    "leakage.required": _less_widens,
    "leakage.maxima.*.at_most": _more_widens,
    "canaries.per_bundle": _less_widens,
}
"""What it means where a rule has another value. `*` stands for one of a list."""

LISTS: Mapping[str, tuple[Effect, Effect]] = {
    "evidence.measurements": ("widens", "narrows"),
    "evidence.signers": ("widens", "narrows"),
    "evidence.accepted_statuses": ("widens", "narrows"),
    "evidence.accepted_statuses.*.advisories": ("widens", "narrows"),
    "evidence.platforms": ("widens", "narrows"),
    "instances": ("widens", "narrows"),
    "instances.*.who": ("widens", "narrows"),
    "leakage.maxima": ("narrows", "widens"),
}
"""What it means where something is added to a list, and where it is taken away."""


def diff(old: Policy, new: Policy) -> tuple[Change, ...]:
    """Every rule that differs, by name; empty exactly where both policies mean the same."""
    return tuple(_changes("", "", old.meaning(), new.meaning()))


def _changes(rule: str, pattern: str, old: Node, new: Node) -> Iterator[Change]:
    if old == new and type(old) is type(new):
        return
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield Change(rule, RULES[pattern](old, new), _words(old), _words(new))
        return
    members = LISTS.get(pattern)
    for name in sorted({*old, *new}):
        below = f"{rule}[{name}]" if members else f"{rule}.{name}".lstrip(".")
        inner = f"{pattern}.{'*' if members else name}".lstrip(".")
        if name in old and name in new:
            yield from _changes(below, inner, old[name], new[name])
            continue
        if members is None:
            raise KeyError(f"{inner}: a rule that one policy has and the other has not")
        added = name in new
        before, after = (None, _words(new[name])) if added else (_words(old[name]), None)
        yield Change(below, members[0 if added else 1], before, after)


def _number(value: Node) -> float:
    return math.inf if value is None else float(value)  # type: ignore[arg-type]


def _words(value: Node) -> str:
    """A value in a few words; a list by what is in it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(name if below == {} else f"{name} {_words(below)}" for name, below in value.items()) or "listed"
