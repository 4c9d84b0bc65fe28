"""95 % confidence intervals of figures that are sums over sessions.

Tokens of one session are alike, so sessions are what is drawn again (cluster bootstrap: Davison and Hinkley, Bootstrap
Methods and their Application, 1997, §3.8). The percentiles are those of the expanded percentile interval, which widens
them for few sessions (Hesterberg, What Teachers Should Know About the Bootstrap, 2015, §3.3). Where sessions show no
spread, at 0 and 1 above all, a bootstrap knows nothing: an interval is never narrower on either side than Wilson's
(1927) for independent trials, which at 0 of n comes to 3.8/n, a little above the rule of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import exp, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from stip_keyservice.audit.document import Bounds
from stip_protocol.leakage import Interval

Vector = NDArray[np.float64]

RESAMPLES = 4000
_NORMAL = NormalDist()
Z = _NORMAL.inv_cdf(0.975)


def wilson(hits: float, trials: int) -> Interval:
    """The share hits/trials of independent trials. Raises `ValueError` for no trial, or hits outside 0 to trials."""
    if trials < 1 or not 0 <= hits <= trials:
        raise ValueError(f"{hits} hits in {trials} trials")
    share, z2 = hits / trials, Z * Z
    centre = (hits + z2 / 2) / (trials + z2)
    reach = Z / (trials + z2) * sqrt(trials * share * (1 - share) + z2 / 4)
    return _interval(share, centre - reach, centre + reach)


def exact(share: float) -> Interval:
    """A share that is computed, not measured: nothing was sampled."""
    return Interval(value=share, low=share, high=share)


def share(hits: Vector, counts: Vector, *, trials: int, seed: int) -> Interval:
    """Σ hits / Σ counts over sessions [S], 0 ≤ hits ≤ counts, where `trials` outcomes were seen in all.

    Sessions that count nothing say nothing. Raises `ValueError` where none counts.
    """
    hits, counts = _counted(hits, counts)
    value = min(1.0, float(hits.sum() / counts.sum()))
    alone = wilson(value * trials, trials)
    low, high = _drawn_again(hits, counts, seed) or (value, value)
    return _interval(value, min(low, alone.low), max(high, alone.high))


def exponential_mean(totals: Vector, counts: Vector, *, seed: int) -> Bounds:
    """exp(Σ totals / Σ counts) over clusters [S]: a perplexity, of summed negative logarithms."""
    totals, counts = _counted(totals, counts)
    value = float(totals.sum() / counts.sum())
    low, high = _drawn_again(totals, counts, seed) or (value, value)
    return Bounds(value=exp(value), low=exp(min(low, value)), high=exp(max(high, value)))


def by_session(sessions: Sequence[Vector]) -> tuple[Vector, Vector]:
    """Totals and counts of each session's figures; of one session alone, each figure is drawn by itself."""
    if len(sessions) == 1:
        return sessions[0], np.ones(len(sessions[0]))
    totals = np.array([each.sum() for each in sessions], np.float64)
    return totals, np.array([len(each) for each in sessions], np.float64)


def _counted(totals: Vector, counts: Vector) -> tuple[Vector, Vector]:
    kept = counts > 0
    if not kept.any():
        raise ValueError("nothing was counted")
    return totals[kept], counts[kept]


def _drawn_again(totals: Vector, counts: Vector, seed: int) -> tuple[float, float] | None:
    """Percentiles of the ratio over resampled sessions; None of a single one."""
    sessions = len(counts)
    if sessions < 2:
        return None
    weights = _weights(sessions, seed)
    ratios = (weights @ totals) / (weights @ counts)
    tail = _NORMAL.cdf(-sqrt(sessions / (sessions - 1)) * _student(sessions - 1))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _weights(sessions: int, seed: int) -> Vector:
    """[RESAMPLES, S]: how often each session is drawn. The same draws for every figure, so that figures compare."""
    generator = np.random.default_rng([seed, *b"bootstrap"])
    return generator.multinomial(sessions, np.full(sessions, 1 / sessions), size=RESAMPLES).astype(np.float64)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, from the normal one (Abramowitz and Stegun, 26.7.5)."""
    return (
        Z
        + (Z**3 + Z) / (4 * freedom)
        + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
        + (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * freedom**3)
    )


def _interval(value: float, low: float, high: float) -> Interval:
    """Rounding of sums must not carry an end past the value, nor past 0 and 1."""
    return Interval(value=value, low=max(0.0, min(low, value)), high=min(1.0, max(high, value)))
