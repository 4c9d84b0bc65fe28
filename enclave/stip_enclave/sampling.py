"""From logits to the next id: pure, and the same function for the enclave and for a plain reference.

Greedy takes the largest logit, ties to the smallest true id. Otherwise, in float64: divide by the temperature, keep
the `top_k` largest (ties by smallest true id), softmax, keep the smallest descending prefix whose mass reaches
`top_p` (nucleus sampling, Holtzman et al., arXiv 1904.09751), renormalise, and invert the cumulative distribution
at u = Philox(key = seed, counter = step) (Salmon et al., SC11): a step's draw depends on (seed, step) alone.

Candidates are always in one order: descending by logit, then ascending by true id. So the same prefix sums come
out whatever order a row arrives in, and from the 64 largest logits alone wherever they decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stip_protocol.errors import RequestInvalid

Logits = NDArray[Any]
"""float32 or float64, finite."""
Ids = NDArray[Any]

FIRST_REACH = 256
"""Candidates sorted at first where all could be drawn; eight times more wherever the draw lies beyond."""
LSE_SLACK = 2e-6
"""Relative error allowed for a mass that a float32 log-sum-exp gives, per unit of (8 + |log-sum-exp|)."""


class NeedsFullRow(Enum):
    """The 64 largest logits do not decide: the whole row does."""

    NEEDED = "full row"


FULL_ROW = NeedsFullRow.NEEDED


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. Raises `RequestInvalid` for what is not finite or out of range."""

    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 0.0
    """0 or 1: off."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field, good, allowed in (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "finite, at least 0"),
            ("top_p", 0.0 <= self.top_p <= 1.0, "0 to 1"),
            ("top_k", 0 <= self.top_k < 2**32, "0 to 2^32 - 1"),
            ("seed", 0 <= self.seed < 2**64, "0 to 2^64 - 1"),
        ):
            if not good:
                raise RequestInvalid.because(f"sampling {field}", "another value", allowed)


class Sampler:
    """Draws ids under one `Sampling`. What is drawn depends on the arguments alone, `step` among them."""

    def __init__(self, spec: Sampling) -> None:
        self.spec = spec
        self.greedy = spec.temperature == 0.0
        self.nucleus = 0.0 < spec.top_p < 1.0
        self._philox = np.random.Philox(key=spec.seed)
        self._generator = np.random.Generator(self._philox)
        self._counter = 0
        """Of `_philox`. Kept to move it by the difference: making a generator costs five times as much."""

    def reads_top(self, width: int) -> bool:
        """Whether the `width` largest logits of a row can decide: if not, every token needs its whole row."""
        if self.spec.top_k and not self.greedy:
            return self.spec.top_k < width  # the last of them may tie with others outside
        return self.greedy or (self.nucleus and self.spec.temperature == 1.0)

    def pick(self, row: Logits, step: int, ids: Ids | None = None) -> int:
        """The id drawn at `step` from a whole row [V]; `ids` [V] gives the true id of each column, else its index."""
        if self.greedy:
            best = int(row.argmax())
            return best if ids is None else int(ids[row == row[best]].min())
        size = row.size
        kept = min(self.spec.top_k or size, size)
        weights: NDArray[np.float64] | None = None
        total = 0.0
        reach = kept if kept < size else FIRST_REACH
        while True:
            columns = _descending(row, ids, reach)
            if kept < size:
                mass = np.cumsum(self._weights(row[columns[:kept]], row[columns[0]]))
                found = self._place(mass, float(mass[-1]), float(mass[-1]), step, whole=True)
            else:
                if weights is None:
                    weights = self._weights(row, row[columns[0]])
                    total = float(weights.sum())
                found = self._place(np.cumsum(weights[columns]), total, total, step, whole=columns.size == size)
            if found is not None:
                return int(columns[found] if ids is None else ids[columns[found]])
            reach *= 8

    def pick_top(self, ids: Ids, values: Logits, log_sum_exp: float, vocabulary: int, step: int) -> int | NeedsFullRow:
        """The id drawn at `step` from the largest logits of a row alone, or `FULL_ROW` where they do not decide.

        `ids`: true ids [n]; `values`: their logits [n], the n largest of `vocabulary`, in any order of ties;
        `log_sum_exp`: of the whole row, at temperature 1.
        """
        if values.size == vocabulary:
            return self.pick(values, step, ids)
        order = np.lexsort((ids, -values))
        values, ids = values[order], ids[order]
        last = values[-1]
        kept = 1 if self.greedy else self.spec.top_k
        if kept:
            # A tie with the last of them may go on outside, with smaller ids.
            if kept > values.size or values[kept - 1] == last:
                return FULL_ROW
            if self.greedy:
                return int(ids[0])
            mass = np.cumsum(self._weights(values[:kept], values[0]))
            found = self._place(mass, float(mass[-1]), float(mass[-1]), step, whole=True)
        elif self.nucleus and self.spec.temperature == 1.0:
            with np.errstate(over="ignore"):
                total = float(np.exp(np.float64(log_sum_exp) - np.float64(values[0])))
            slack = LSE_SLACK * (8.0 + abs(log_sum_exp))
            mass = np.cumsum(self._weights(values, values[0]))
            inside = int(np.count_nonzero(values > last))
            found = self._place(mass[:inside], total * (1.0 - slack), total * (1.0 + slack), step, whole=False)
        else:
            return FULL_ROW
        return FULL_ROW if found is None else int(ids[found])

    def uniform(self, step: int) -> float:
        """u in [0, 1), from (seed, step) alone: the first draw of Philox(key = seed, counter = step)."""
        self._philox.advance(step - self._counter)
        self._counter = step + 1
        return float(self._generator.random())

    def _weights(self, values: Logits, largest: Any) -> NDArray[np.float64]:
        """exp((x - max) / temperature) in float64."""
        scaled = values.astype(np.float64)
        with np.errstate(over="ignore", under="ignore"):
            scaled -= np.float64(largest)
            scaled /= self.spec.temperature
            return np.exp(scaled, out=scaled)

    def _place(self, mass: NDArray[np.float64], least: float, most: float, step: int, *, whole: bool) -> int | None:
        """Where the draw falls in a descending prefix with these cumulative weights.

        The weight of all candidates lies between `least` and `most`. None where the prefix, not being the whole,
        does not tell.
        """
        if mass.size == 0:
            return None
        end = mass.size - 1
        if self.nucleus:
            ends = {int(np.searchsorted(mass, self.spec.top_p * total, side="left")) for total in (least, most)}
            if len(ends) > 1 or (end < min(ends) and not whole):
                return None
            end = min(end, ends.pop())
            drawn = float(mass[end])
        else:
            drawn = least
        found = int(np.searchsorted(mass[: end + 1], self.uniform(step) * drawn, side="right"))
        if found <= end:
            return found
        return end if whole or self.nucleus else None


def candidates(row: Logits, reach: int) -> NDArray[np.intp]:
    """Columns, ascending, of at least the `reach` largest of a row with every tie of the last."""
    return np.arange(row.size) if reach >= row.size else np.flatnonzero(row >= _floor(row, reach))


def _descending(row: Logits, ids: Ids | None, reach: int) -> NDArray[np.intp]:
    """The candidates by descending logit, then by true id."""
    columns = candidates(row, reach)
    if ids is None:
        return columns[np.argsort(-row[columns], kind="stable")]
    return columns[np.lexsort((ids[columns], -row[columns]))]


def _floor(row: Logits, reach: int) -> Any:
    """A value that at least `reach` of the row reach: the `reach`-th largest of the maxima of as many columns of the
    row laid out in lines.

    One pass over the row, line by line, and a partition of a few times `reach`, instead of a partition of the row.
    """
    lines = max(1, row.size // (4 * reach))
    width = row.size // lines
    maxima = row[: lines * width].reshape(lines, width).max(axis=0)
    return np.partition(maxima, width - reach)[width - reach]
