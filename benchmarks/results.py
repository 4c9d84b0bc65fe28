"""From samples to results: what is compared with what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.hop import Hop
from benchmarks.machine import Machine
from benchmarks.ratios import Ratio, Rounds, joined, median, quantile, ratio
from benchmarks.samples import Samples
from stip_stack.latency import Row

PLAIN, AGAIN, BASE = "plain", "plain again", "plain base"
"""Arms of the direct engine: with its head, the same once more, and without its head."""
TOKEN_TARGETS = {1: 1.05, 16: 1.06}
"""Time per token over plain, by streams (docs: the numbers STIP is built for)."""
FIRST_TARGET = 1.05
"""Time to first token over plain, one stream."""
WITHOUT_HEAD = {"paper": False, "hardened": True}
"""Presets whose head is in the enclave: held against the base model, with the head's time shown apart."""


@dataclass
class Cell:
    """All rounds of one model at one number of streams: arm to its runs."""

    streams: int
    runs: dict[str, list[Samples]] = field(default_factory=lambda: defaultdict(list))

    def gaps(self, arm: str) -> Rounds:
        return [run.gaps for run in self.runs[arm]]

    def first(self, arm: str) -> Rounds:
        return [run.first for run in self.runs[arm]]


@dataclass(frozen=True)
class Measure:
    """One quantity (time per token, or time to first token). Seconds, medians over all rounds."""

    plain: float
    """Of the direct engine with its head, both plain arms together."""
    protected: float
    protected_p95: float
    over_plain: Ratio
    """protected / plain. Where the preset keeps the head in the enclave, both sides contain a head."""
    control: Ratio
    """The second plain arm over the first: what this machine calls equal."""
    base: float | None
    """Of the direct engine without its head, where the preset's server has none."""
    head: float | None
    """Of the enclave's head, mean."""
    served: Ratio
    """Without any head: (protected - head) / base. The same as `over_plain` where the server has the head."""
    target: float | None
    """For `served`."""


@dataclass(frozen=True)
class Comparison:
    """One preset of one model at one number of streams."""

    preset: str
    streams: int
    rounds: int
    token: Measure
    first: Measure
    same: float
    """Share of the protected answers' tokens that come before the first difference from the plain answer."""


@dataclass(frozen=True)
class ModelResult:
    name: str
    title: str
    dtype: str
    comparisons: list[Comparison]
    stages: list[Row]
    hop: Hop


@dataclass(frozen=True)
class Results:
    """Everything that is written down."""

    command: str
    machine: Machine
    seed: int
    prompt_tokens: int
    new_tokens: int
    threads: int
    models: list[ModelResult]
    seconds: float


def compare(cell: Cell, preset: str, *, seed: int) -> Comparison:
    """Hold one preset's arm against the plain ones."""
    runs = cell.runs[preset]
    heads = [run.head for run in runs] if WITHOUT_HEAD[preset] else None

    def measured(times: Callable[[str], Rounds], target: float | None) -> Measure:
        plain, own = joined(times(PLAIN), times(AGAIN)), times(preset)
        over_plain = ratio(own, plain, seed=seed)
        base = head = None
        served = over_plain
        if heads is not None:
            less = [each or 0.0 for each in heads]
            base, head = median(times(BASE)), sum(less) / len(less)
            served = ratio(own, times(BASE), seed=seed, less=less)
        control = ratio(times(AGAIN), times(PLAIN), seed=seed)
        return Measure(median(plain), median(own), quantile(own, 95), over_plain, control, base, head, served, target)

    return Comparison(
        preset,
        cell.streams,
        len(runs),
        measured(cell.gaps, TOKEN_TARGETS.get(cell.streams)),
        measured(cell.first, FIRST_TARGET if cell.streams == 1 else None),
        _same(cell.runs[PLAIN], runs),
    )


def _same(plain: Sequence[Samples], protected: Sequence[Samples]) -> float:
    agreed = total = 0
    for ours, theirs in zip(plain, protected, strict=True):
        for left, right in zip(ours.ids, theirs.ids, strict=True):
            length = min(len(left), len(right))
            differ = next((at for at in range(length) if left[at] != right[at]), length)
            agreed, total = agreed + differ, total + length
    return agreed / total
