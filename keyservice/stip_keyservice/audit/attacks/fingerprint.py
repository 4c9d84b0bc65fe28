"""Sorted-value fingerprint: a permutation of features does not change which values a row has.

The sorted row is the same before and after the key; sorted absolute values are so under signs too. With a table off
by a tenth the nearest sorted row is still mostly the right one, and a few matches give the permutation itself, by
which all others are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.decoding import ROUNDING, drifts, noise, read
from stip_keyservice.audit.attacks.matching import Alignment, Doubles, nearest, signed_permutation
from stip_keyservice.audit.attacks.public_text import GUESSES, PublicText
from stip_keyservice.audit.attacks.sightings import Sightings
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.view import View

SAMPLE = 256
"""Rows of the table from which the threshold is calibrated, and distinct rows by which a key is sought."""
SIGNATURES: tuple[Callable[[Doubles], Doubles], ...] = (
    lambda rows: np.sort(rows, axis=1),
    lambda rows: np.sort(np.abs(rows), axis=1),
)
"""What a permutation keeps of a row, and what a signed one does."""


@dataclass(frozen=True)
class _Found:
    alignment: Alignment
    drift: float
    matched: float
    """Share of the sampled rows matched by their fingerprint alone."""


def _threshold(view: View, table: Doubles, signature: Callable[[Doubles], Doubles], drift: float) -> float:
    """The largest distance of fingerprints that the table's drift makes: seen on rows of the table itself."""
    generator = view.generator("fingerprint")
    sample = table[generator.choice(len(table), min(SAMPLE, len(table)), replace=False)]
    moved = sample + generator.normal(0, noise(view.entry, drift), sample.shape)
    largest = np.linalg.norm(signature(moved) - signature(sample), axis=1).max()
    return float(largest + ROUNDING * np.linalg.norm(sample, axis=1).mean())


def _attempt(view: View, sightings: Sightings, signature: Callable[[Doubles], Doubles], drift: float) -> _Found | None:
    """Match fingerprints, take the permutation from the matches; None where it does not explain the rows."""
    plain, keyed = [], []
    for position, rows in sightings.places(view):
        table, targets = sightings.table(view, position), sightings.rows[rows].astype(np.float64)
        found, distances = nearest(signature(targets), signature(table), 1)
        near = distances[:, 0] <= _threshold(view, table, signature, drift)
        plain.append(table[found[near, 0]])
        keyed.append(targets[near])
    matched = np.concatenate(plain)
    if not len(matched):
        return None
    key = signed_permutation(matched, np.concatenate(keyed))
    alignment = Alignment(np.eye(len(key)), key, key)
    if not read(view, sightings, alignment, drift).believed:
        return None
    return _Found(alignment, drift, len(matched) / len(sightings.rows))


def run(view: View) -> Claims:
    """Tokens and the residual permutation; where no fingerprint fits, the commonest tokens."""
    public, sightings = PublicText.of(view), Sightings.of(view)
    sample = sightings.sample(view.generator("fingerprint rows"), SAMPLE)
    attempts = (
        _attempt(view, sample, signature, drift)
        for drift in drifts(view.entry, sightings.rows.shape[1])
        for signature in SIGNATURES
    )
    found = next((each for each in attempts if each is not None), None)
    if found is None:
        nothing = np.broadcast_to(public.commonest(), (len(sightings.rows), min(GUESSES, view.vocabulary)))
        return Claims(
            tokens=sightings.tokens(nothing),
            vocabulary=sightings.vocabulary(view, nothing, np.zeros(0, np.int64)),
            figures={"rows matched": 0.0},
        )
    reading = read(view, sightings, found.alignment, found.drift)
    return Claims(
        tokens=sightings.tokens(reading.guesses),
        vocabulary=sightings.vocabulary(view, reading.guesses, np.flatnonzero(reading.explained)),
        residual=found.alignment.key,
        figures={"rows matched": found.matched},
    )


ATTACK = Attack(
    letter="B",
    name="Sorted fingerprint",
    source="ours",
    assumes="The residual's key permutes features, perhaps with signs; the embedding table is known, or a relative.",
    cost="One sort of the table and of the rows; seconds.",
    rows=("server", "drifted", "table", "base"),
    needs=frozenset(),
    run=run,
)
