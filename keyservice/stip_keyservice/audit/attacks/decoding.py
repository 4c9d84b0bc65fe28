"""What a candidate key explains: rows read by it, and whether enough of them look like rows of the table.

A wrong orthogonal key turns a row into one that is near no token's; a right one leaves the drift of the table only. So
a key is believed where it explains most rows, and nothing is read by one that does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stip_keyservice.audit.attacks.matching import Alignment, nearest
from stip_keyservice.audit.attacks.public_text import GUESSES
from stip_keyservice.audit.attacks.sightings import Sightings
from stip_keyservice.audit.view import Entry, Ids, View

DRIFTS = (0.0, 0.003, 0.01, 0.03, 0.1)
"""How far a table may be off, as `Entry.drift`, to those who do not know better: 0.003 is bfloat16's rounding."""
ROUNDING = 1e-4
"""Distance over length of a row that rounding in float32 makes at most, through keys of a few thousand dimensions."""
SPREAD = 3.0
"""Largest distance over the expected one of a match."""
BELIEVED = 0.5
"""Share of distinct rows that a believed key explains."""


@dataclass(frozen=True)
class Reading:
    """Every distinct row read by one key."""

    guesses: Ids
    """[m, k] true ids, the nearest first."""
    explained: NDArray[np.bool_]
    """[m] whether the nearest is near enough."""

    @property
    def believed(self) -> bool:
        """Whether the key explains enough rows to be right."""
        return bool(self.explained.mean() >= BELIEVED)


def drifts(entry: Entry, width: int) -> list[float]:
    """Drifts to try, rising: those that `entry` may have. None where its rows are of another width than `width`."""
    if entry.rows.shape[1] != width:
        return []
    if not np.isfinite(entry.drift):
        return list(DRIFTS)
    return [entry.drift, *(drift for drift in DRIFTS if drift > entry.drift)]


def noise(entry: Entry, drift: float) -> float:
    """Standard deviation of an entry of the table about the true one."""
    return float(drift * entry.rows.std(dtype=np.float64))


def read(view: View, sightings: Sightings, alignment: Alignment, drift: float) -> Reading:
    """Every distinct row by `alignment`, if the table is off by `drift`."""
    count = min(GUESSES, view.vocabulary)
    guesses = np.zeros((len(sightings.rows), count), np.int64)
    explained = np.zeros(len(sightings.rows), np.bool_)
    for position, rows in sightings.places(view):
        keyed = alignment.keyed_features(sightings.rows[rows])
        found, distances = nearest(keyed, alignment.plain_features(sightings.table(view, position)), count)
        expected = noise(view.entry, drift) * np.sqrt(keyed.shape[1])
        guesses[rows] = found
        explained[rows] = distances[:, 0] <= SPREAD * expected + ROUNDING * np.linalg.norm(keyed, axis=1)
    return Reading(guesses, explained)
