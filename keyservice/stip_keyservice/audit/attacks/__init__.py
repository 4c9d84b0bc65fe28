"""The attacks, one a module, in a table.

A module defines `ATTACK`. What it may use is a `View`: import-linter keeps the key algebra, secrets, `protect` and the
truth out of here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.view import View


@dataclass(frozen=True)
class Attack:
    """One published attack."""

    letter: str
    name: str
    source: str
    """Paper, venue and identifier; or "ours"."""
    assumes: str
    """What it needs to work, in words."""
    cost: str
    """What it costs the attacker, in words."""
    rows: tuple[str, ...]
    """Names of the rows of the matrix (`KNOWLEDGE`) where it is run: those that give it something."""
    needs: frozenset[Grant]
    """Without these it is not applicable."""
    run: Callable[[View], Claims]
    """Raises `NotApplicable`."""


MODULES = {
    "A": "vocabulary",
    "B": "fingerprint",
    "C": "gram",
    "D": "alignment",
    "E": "linking",
    "F": "arrowmatch",
    "G": "theft",
    "H": "cache",
    "I": "frequency",
    "J": "extraction",
    "K": "splicing",
    "L": "dictionary",
    "M": "inverter",
    "N": "tied_table",
    "O": "pages",
}
"""Letter: module (the letters of the threat catalogue)."""


def attack(letter: str) -> Attack:
    """The attack of that letter; imported when it is asked for. Raises `KeyError` for an unknown letter."""
    found = import_module(f"{__name__}.{MODULES[letter]}").ATTACK
    assert isinstance(found, Attack)
    return found
