"""What public text of the victims' kind tells: how often ids come, alone and after one another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stip_keyservice.audit.view import Ids, View

WEIGHT = 8.0
"""Bigrams that the unigram share counts as, in interpolation (Dirichlet smoothing)."""
GUESSES = 10
"""Guesses that an attack makes at a position: as many as the metrics look at."""


@dataclass(frozen=True)
class PublicText:
    """Statistics of texts of true ids below `vocabulary`."""

    counts: Ids
    """[V] how often each id comes."""
    pairs: Ids
    """[p] distinct pairs (a, b) of ids as a·V + b, rising: b stands so many places behind a."""
    pair_counts: Ids
    """[p]."""
    first: int | None
    """The id that every text begins with: of a beginning-of-text token, which everybody knows. None where there is
    none."""

    @classmethod
    def of(cls, view: View, places: int = 1) -> PublicText:
        """Of the public text in `view`; pairs are of ids `places` apart."""
        texts, size = [text for text in view.public_text if len(text)], view.vocabulary
        counts = np.bincount(np.concatenate([*texts, np.zeros(0, np.int64)]), minlength=size).astype(np.int64)
        codes = [text[:-places] * size + text[places:] for text in texts]
        pairs, pair_counts = np.unique(np.concatenate([*codes, np.zeros(0, np.int64)]), return_counts=True)
        beginnings = {int(text[0]) for text in texts}
        first = beginnings.pop() if len(texts) > 1 and len(beginnings) == 1 else None
        return cls(counts, pairs, pair_counts.astype(np.int64), first)

    @cached_property
    def ranked(self) -> Ids:
        """[V] ids, the commonest first; the smaller of two that are equally common."""
        return np.argsort(-self.counts, kind="stable").astype(np.int64)

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """[V] probability of each id, one occurrence added to each: none is impossible."""
        more = self.counts + 1.0
        return np.asarray(more / more.sum())

    def commonest(self, without: Ids | None = None) -> Ids:
        """[k] the commonest ids, k = GUESSES or what there is, leaving out those in `without`."""
        ranked = self.ranked if without is None else self.ranked[~np.isin(self.ranked, without)]
        return ranked[:GUESSES]

    def log_next(self, before: Ids, after: Ids) -> NDArray[np.float64]:
        """[a, b] log of the probability that each of `after` [b] comes `places` behind each of `before` [a].

        Interpolated with the unigram share: (n(u, v) + WEIGHT·p(v)) / (n(u) + WEIGHT).
        """
        codes = before[:, None] * len(self.counts) + after[None, :]
        counted = np.zeros(codes.shape)
        if len(self.pairs):
            places = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
            counted = np.where(self.pairs[places] == codes, self.pair_counts[places], 0.0)
        expected = counted + WEIGHT * self.shares[after]
        return np.asarray(np.log(expected) - np.log(self.counts[before] + WEIGHT)[:, None])
