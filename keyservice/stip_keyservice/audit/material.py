"""What an audit of one instance works with: its truth, what was said, and what attackers may be given of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stip_keyservice.audit.network import Network
from stip_keyservice.audit.truth import Truth
from stip_keyservice.audit.view import Ids, Labelled

Words = Callable[[Ids], Sequence[str]]
"""The words of a text that true ids spell."""


@dataclass(frozen=True, repr=False)
class Twin:
    """Another instance of the same model, under keys of its own."""

    truth: Truth
    labelled: Sequence[Labelled]
    """Sessions of a user there."""


@dataclass(frozen=True, repr=False)
class Material:
    """Holds keys and prompts: never log, pickle or keep it longer than an audit.

    What is not there (no base, no accomplice, no twin) makes its rows of the matrix not applicable.
    """

    truth: Truth
    victims: Sequence[Labelled]
    """At least one session."""
    public_text: Sequence[Ids]
    """Text of the same kind as the victims', as true ids."""
    held_out: Sequence[Ids]
    """Text that no attacker sees, by which stolen models are judged; each of two ids or more."""
    surrogate: Network
    seed: int
    words: Words
    accomplice: Sequence[Labelled] = ()
    base: Network | None = None
    twin: Twin | None = None
