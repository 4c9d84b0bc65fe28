"""Ratios of medians with bootstrap intervals. The unit that is resampled is the round: tokens of one round share
whatever the machine was doing then, and are no independent samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)
"""Percentiles."""

Rounds = Sequence[Sequence[float]]
"""Seconds, one list a round."""


@dataclass(frozen=True)
class Ratio:
    """median / median, and the central 95 % of its bootstrap distribution over rounds."""

    value: float
    low: float
    high: float


def median(rounds: Rounds) -> float:
    """Over the samples of all rounds."""
    return float(np.median(np.concatenate([np.asarray(each, float) for each in rounds])))


def quantile(rounds: Rounds, percent: float) -> float:
    return float(np.percentile(np.concatenate([np.asarray(each, float) for each in rounds]), percent))


def ratio(over: Rounds, under: Rounds, *, seed: int, less: Sequence[float] | None = None) -> Ratio:
    """median(over) / median(under), where both have the same rounds; `less` (one a round) is taken off `over`."""
    taken = np.zeros(len(over)) if less is None else np.asarray(less, float)
    tops = [np.asarray(each, float) - off for each, off in zip(over, taken, strict=True)]
    bottoms = [np.asarray(each, float) for each in under]

    def of(rounds: Sequence[int]) -> float:
        above = np.median(np.concatenate([tops[number] for number in rounds]))
        return float(above / np.median(np.concatenate([bottoms[number] for number in rounds])))

    draws = np.random.default_rng(seed).integers(len(tops), size=(RESAMPLES, len(tops)))
    low, high = np.percentile([of(draw.tolist()) for draw in draws], INTERVAL)
    return Ratio(of(range(len(tops))), float(low), float(high))


def joined(*arms: Rounds) -> Rounds:
    """Arms that measure the same, round by round as one."""
    return [[value for part in parts for value in part] for parts in zip(*arms, strict=True)]
