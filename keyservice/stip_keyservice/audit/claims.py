"""What an attack says it found. `scoring` holds it against the truth, which no attack sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stip_keyservice.audit.view import Floats, Ids

NO_GUESS = -1
"""In place of an id that an attack has no guess for."""


class Stolen(Protocol):
    """A model that the attacker can run now, without any user."""

    def logits(self, ids: Ids) -> Floats:
        """[n, V] next-token logits after each of true ids [n], in true order. At least one id."""


@dataclass(frozen=True)
class Point:
    """One point of a curve: what an attack gets for what it pays."""

    curve: str
    """What is counted along x, e.g. "labelled tokens"."""
    x: float
    tokens: Sequence[Ids]
    """As `Claims.tokens`, for this price."""


@dataclass(frozen=True)
class Claims:
    """The findings of one attack. What it does not look for stays None."""

    tokens: Sequence[Ids] | None = None
    """For each victim's session, [n, k] guesses of the true id at each position, the best first."""
    scope: Literal["all", "answers"] = "all"
    """Which positions the guesses are about: all that were fed, or those the server's answers led to."""
    vocabulary: Ids | None = None
    """[V]: the true id of each permuted id of the server, `NO_GUESS` where unknown."""
    residual: NDArray[np.float64] | None = None
    """[d, d] estimate of K, where a keyed row is K·x. For a sibling: K of this instance over K of the other."""
    relative: bool = False
    """Whether `residual` is relative to a sibling's key."""
    unordered: bool = False
    """Whether columns of `residual` are K's in any order and sign: axes, which is all that some attacks can tell."""
    stolen: Sequence[tuple[str, Stolen]] = ()
    """Models by name."""
    points: Sequence[Point] = ()
    figures: dict[str, float] = field(default_factory=dict)
    """Anything else that was counted, by a name for the report; not checked against the truth."""
