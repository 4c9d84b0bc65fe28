"""From the rounds of several arms to cells: which arm is held against which, and what that proves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmarks.models import Subject
from benchmarks.ratios import Ratio, Rounds, joined, median, quantile, ratio
from benchmarks.samples import Samples
from benchmarks.serving.interleaving import Load
from benchmarks.serving.records import Cell, Interval, Measure
from benchmarks.verdict import verdict

PLAIN, AGAIN, BASE = "plain", "plain again", "plain base"
"""Arms of the plain engine: with its head, the same once more, and without its head."""

Runs = Mapping[str, Sequence[Samples]]
"""Arm to its runs, one a round."""
Quantity = Callable[[Samples], list[float]]


@dataclass(frozen=True)
class Against:
    """What an arm is held against, and how. `base` names the plain arm without a head, for an arm whose server has
    none: then the enclave's head is taken off before the target is asked for."""

    arm: str
    plain: str = PLAIN
    again: str = AGAIN
    base: str | None = None
    token_target: float | None = None
    first_target: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of the cell."""


def gaps(samples: Samples) -> list[float]:
    return samples.gaps


def first(samples: Samples) -> list[float]:
    return samples.first


def pace(samples: Samples) -> list[float]:
    return samples.pace


def measure(runs: Runs, against: Against, quantity: Quantity, *, target: float | None, seed: int) -> Measure:
    """One quantity of an arm. Raises `KeyError` for an arm that did not run."""

    def rounds(arm: str) -> Rounds:
        return [quantity(run) for run in runs[arm]]

    own, plain = rounds(against.arm), joined(rounds(against.plain), rounds(against.again))
    whole = ratio(own, plain, seed=seed)
    control = ratio(rounds(against.again), rounds(against.plain), seed=seed)
    head = base = served = None
    if against.base is not None:
        heads = [run.head or 0.0 for run in runs[against.arm]]
        head, base = float(np.mean(heads)), median(rounds(against.base))
        served = ratio(own, rounds(against.base), seed=seed, less=heads)
    judged = served or whole
    return Measure(
        plain=median(plain),
        protected=median(own),
        p95=quantile(own, 95),
        ratio=_interval(whole),
        control=_interval(control),
        head=head,
        base=base,
        served=None if served is None else _interval(served),
        target=target,
        verdict=None if target is None else verdict(judged.value, control.value, target),
    )


def cell(runs: Runs, against: Against, subject: Subject, load: Load, *, seed: int, token: Quantity = gaps) -> Cell:
    """What an arm's runs come to. `token` is how the time per token is taken."""
    own, plain = runs[against.arm], runs[against.plain]
    values = {
        "model": subject.name,
        "dtype": subject.dtype,
        "arm": against.arm,
        "streams": load.streams,
        "prompt": load.prompt,
        "tokens": load.tokens,
        "rounds": len(own),
        "token": measure(runs, against, token, target=against.token_target, seed=seed),
        "first": measure(runs, against, first, target=against.first_target, seed=seed),
        "rate": rate(own),
        "plain_rate": rate(plain),
        "same": same(plain, own),
    }
    return Cell(**{**values, **against.more})


def rate(runs: Sequence[Samples]) -> float:
    """Tokens a second of all streams together, while all decode."""
    pooled = [gap for run in runs for gap in run.pace]
    return len(runs[0].times) / float(np.mean(pooled))


def same(plain: Sequence[Samples], protected: Sequence[Samples]) -> float:
    """Share of tokens before the first difference."""
    agreed = total = 0
    for ours, theirs in zip(plain, protected, strict=True):
        for left, right in zip(ours.ids, theirs.ids, strict=True):
            length = min(len(left), len(right))
            differ = next((at for at in range(length) if left[at] != right[at]), length)
            agreed, total = agreed + differ, total + length
    return agreed / total


def _interval(value: Ratio) -> Interval:
    return Interval(**asdict(value))
