"""How far a figure is above what one would guess anyway: the levels that colours, words and summaries share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

from stip_keyservice.audit.document import Cell, Metric
from stip_protocol.leakage import Interval

Kind = Literal["text", "copy", "answers", "key"]
"""What an attacker gets: what was said; a model to run; what was answered, alone; a key."""
KINDS: tuple[Kind, ...] = get_args(Kind)
ANSWERS = frozenset({"G", "K"})
"""Attacks whose tokens are answers alone: they open what the server sends, and prompts are none of that."""


class Level(IntEnum):
    """The higher, the worse."""

    GUESS = 0
    """The figure is within the guess's confidence interval, or below it."""
    UNCOMPARED = 1
    """There is no guess to compare it with."""
    UNCLEAR = 2
    """Above, but the intervals overlap: the traffic was too little to tell."""
    SOME = 3
    MUCH = 4
    """Of the way from the guess to everything, at least half."""
    ALL = 5
    """... at least nine tenths."""


@dataclass(frozen=True)
class Look:
    """How a level is shown: a class for colours, and for those who do not see them a sign and words."""

    css: str
    sign: str
    words: str


LOOKS = {
    Level.GUESS: Look("guess", "○", "at the guess, or below"),
    Level.UNCOMPARED: Look("uncompared", "–", "no guess to compare"),
    Level.UNCLEAR: Look("unclear", "?", "not clearly more"),
    Level.SOME: Look("some", "◔", "more than a guess"),
    Level.MUCH: Look("much", "◑", "far more than a guess"),
    Level.ALL: Look("all", "●", "nearly everything"),
}


@dataclass(frozen=True)
class Measure:
    """What a metric counts."""

    kind: Kind
    of: str
    """Shares: "of tokens"; others: "perplexity"."""


MEASURES = {
    "token_top1": Measure("text", "of tokens"),
    "token_top10": Measure("text", "of tokens among ten guesses"),
    "sequence_exact": Measure("text", "of sessions whole"),
    "rouge_l": Measure("text", "ROUGE-L"),
    "stolen_agreement": Measure("copy", "of next tokens"),
    "vocabulary_recovered": Measure("key", "of the vocabulary key"),
    "residual_permutation": Measure("key", "of the residual key"),
    "residual_cosine": Measure("key", "|cosine| with the residual key"),
}
"""By metric, the one that stands for a cell first."""
GRADES = ((0.9, Level.ALL), (0.5, Level.MUCH), (0.0, Level.SOME))


def judge(metric: Metric) -> Level:
    """By the lower end of the measured interval against the upper end of the guess's: what the figures are sure of.

    A figure above the guess whose interval reaches down to it is `UNCLEAR`, never `GUESS`.
    """
    measured, prior = metric.measured, metric.prior
    if not isinstance(measured, Interval) or not isinstance(prior, Interval):
        return Level.UNCOMPARED
    if measured.value <= prior.high:
        return Level.GUESS
    if measured.low <= prior.high:
        return Level.UNCLEAR
    advantage = (measured.low - prior.high) / (1 - prior.high)
    return next(level for least, level in GRADES if advantage >= least)


def of_kind(cell: Cell, kind: Kind) -> Metric | None:
    """The metric that stands for what a cell says about a kind; of several models the first."""
    names = [name for name in MEASURES if _kind(cell, name) == kind]
    found = [metric for metric in cell.metrics if metric.name in names]
    return min(found, key=lambda metric: names.index(metric.name), default=None)


def _kind(cell: Cell, name: str) -> Kind:
    kind = MEASURES[name].kind
    return "answers" if kind == "text" and cell.attack in ANSWERS else kind


def main(cell: Cell) -> Metric | None:
    """The metric that stands for a cell: None where it is not applicable."""
    known = next((metric for kind in KINDS if (metric := of_kind(cell, kind))), None)
    return known or (cell.metrics[0] if cell.metrics else None)


def counts(cell: Cell, metric: Metric) -> str:
    """What the figure is of: "of tokens"; for a metric that is not in the table its name in words."""
    if metric.name not in MEASURES:
        return metric.name.replace("_", " ")
    said = MEASURES[metric.name].of
    return f"{said}, answers alone" if _kind(cell, metric.name) == "answers" else said


def worst(cells: Iterable[Cell], kind: Kind) -> tuple[Cell, Metric] | None:
    """The cell that gives an attacker most of a kind: by level, then by figure. None where none was measured."""
    found = [(cell, metric) for cell in cells if (metric := of_kind(cell, kind))]
    return max(found, key=lambda each: (judge(each[1]), each[1].measured.value), default=None)
