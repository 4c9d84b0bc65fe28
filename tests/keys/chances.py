"""How likely a sample is under what it should be drawn from: p-values in closed form, without SciPy.

Every test of a distribution here draws from fixed roots, so it passes always or never. `FALSE_ALARM` is the chance
with which a right generator would have failed it, had the roots been drawn when the test was written: a test that
looks at several numbers divides it among them (Bonferroni). `BEYOND_DOUBT` is what a wrong generator must show in the
same test, which proves that the test can see.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stip_protocol.keys import KeyStream

FALSE_ALARM = 1e-4
BEYOND_DOUBT = 1e-9
ROOTS = tuple(hashlib.sha256(f"root {number}".encode()).digest() for number in range(4))

Sample = NDArray[np.float64]


def streams(label: str) -> list[KeyStream]:
    """One stream of `label` under each of the fixed roots."""
    return [KeyStream(root, label) for root in ROOTS]


def passes(chances: Sequence[float]) -> bool:
    """Whether no chance is below its share of `FALSE_ALARM`."""
    return min(chances) > FALSE_ALARM / len(chances)


def fails_beyond_doubt(chances: Sequence[float]) -> bool:
    """Whether the same test would have been failed by a margin that no accident explains."""
    return min(chances) < BEYOND_DOUBT / len(chances)


def chi_square(counts: Sequence[int] | Sample, expected: float | Sample, margins: int = 1) -> float:
    """Chance of counts at least as far from `expected` (Pearson 1900), where `margins` sums of them are fixed.

    Abramowitz and Stegun 1964, 26.4.4 (odd degrees) and 26.4.5 (even). Good where 5 or more are expected a cell.
    """
    seen = np.asarray(counts, dtype=np.float64)
    half = float(((seen - expected) ** 2 / expected).sum()) / 2
    degrees = seen.size - margins
    first = 0.5 if degrees % 2 else 0.0
    powers = np.arange(first, degrees / 2 - 0.25)
    if half == 0:
        return 1.0
    tail = sum(math.exp(power * math.log(half) - half - math.lgamma(power + 1)) for power in powers)
    return tail + math.erfc(math.sqrt(half)) if degrees % 2 else tail


def uniform(values: Sample) -> float:
    """Chance of numbers in [0, 1] at least as far from uniform (Kolmogorov 1933)."""
    ordered = np.sort(values)
    steps = np.arange(ordered.size + 1) / ordered.size
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return _kolmogorov(float(distance), ordered.size)


def same_distribution(a: Sample, b: Sample) -> float:
    """Chance of two samples at least as far apart, if both come from one distribution (Smirnov 1939)."""
    places = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(part), places, side="right") / part.size for part in (a, b)]
    return _kolmogorov(float(np.abs(below[0] - below[1]).max()), a.size * b.size / (a.size + b.size))


def mean(values: Sample, expected: float, variance: float) -> float:
    """Chance of a sample mean at least as far from `expected`, by the central limit theorem."""
    return math.erfc(abs(float(values.mean()) - expected) / math.sqrt(2 * variance / values.size))


def _kolmogorov(distance: float, size: float) -> float:
    """The limit distribution, with Stephens' correction for small samples (J. R. Stat. Soc. B 32, 1970)."""
    scaled = distance * (math.sqrt(size) + 0.12 + 0.11 / math.sqrt(size))
    if scaled < 0.3:  # the series converges slowly, and the chance is 1 to five digits
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 100)))
