"""What the figures say, in sentences. A table of rules makes them: no sentence claims more than its figure.

What was read is judged row by row by the attack that did best there, so "no more than a guess" means that every
attack that was run stayed there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from stip_keyservice.audit.document import Cell, Metric, Report
from stip_keyservice.audit.knowledge import KNOWLEDGE
from stip_keyservice.audit.report.judging import KINDS, Kind, Level, counts, judge, worst
from stip_keyservice.audit.report.numbers import between, figure

WHO = {
    "server": "The operator alone",
    "drifted": "An operator that has a relative of the embedding table",
    "table": "An operator that knows the embedding table",
    "base": "An operator that has the public model from which this one derives",
    "accomplice": "An operator whom one user of the same instance helps",
    "sibling": "An operator whom one user of another instance of the model helps",
    "enclave": "Whoever breaks one enclave",
    "host": "An operator that watches the enclave's page faults",
}
"""A row of the matrix as the subject of a sentence; third person singular follows."""

READS = {
    Level.ALL: "reads nearly everything",
    Level.MUCH: "reads far more than one would guess",
    Level.SOME: "reads more than one would guess",
    Level.UNCLEAR: "may read more than one would guess, the intervals overlap",
    Level.UNCOMPARED: "reads this much, and there is no guess to compare it with",
    Level.GUESS: "stays at what one would guess anyway, or below",
}
COPIES = {
    Level.ALL: "gets a copy of the model that says nearly always the same",
    Level.MUCH: "gets a copy of the model far closer than one made without the instance",
    Level.SOME: "gets a copy of the model closer than one made without the instance",
    Level.UNCLEAR: "may get a closer copy of the model than one made without the instance, the intervals overlap",
    Level.UNCOMPARED: "gets a copy of the model, and there is no other to compare it with",
    Level.GUESS: "gets a copy of the model no closer than one made without the instance",
}
KEYS = {
    Level.ALL: "finds nearly all of a key",
    Level.MUCH: "finds far more of a key than one would guess",
    Level.SOME: "finds more of a key than one would guess",
    Level.UNCLEAR: "may find more of a key than one would guess, the intervals overlap",
    Level.UNCOMPARED: "finds this much of a key",
    Level.GUESS: "finds no more of a key than one would guess",
}
GUESSES = {
    "commonest token": "always guessing the commonest token",
    "own prediction": "the model's own prediction of the next token",
    "surrogate": "a small model of the attacker's own",
    "random guess": "guessing at random",
}
"""What the best guess was, by its name in reports."""
ANSWERS = {level: f"{words}, of answers" for level, words in READS.items()}
PREDICATES: dict[Kind, dict[Level, str]] = {"text": READS, "answers": ANSWERS, "copy": COPIES, "key": KEYS}


def _all_whole(cell: Cell) -> bool:
    return any(metric.name == "sequence_exact" and metric.measured.value == 1 for metric in cell.metrics)


def _all_tokens(metric: Metric) -> bool:
    return metric.name == "token_top1" and metric.measured.value == 1


EXACT: tuple[tuple[Kind, Callable[[Cell, Metric], bool], str], ...] = (
    ("text", lambda cell, _: _all_whole(cell), "reads every session that was tested, word for word"),
    ("text", lambda _, metric: _all_tokens(metric), "reads every token that was tested"),
    ("answers", lambda cell, _: _all_whole(cell), "reads every answer that was tested, word for word"),
    ("answers", lambda _, metric: _all_tokens(metric), "reads every token of answers that was tested"),
)
"""What may be said in place of "nearly everything": the first whose figure is exactly all."""


@dataclass(frozen=True)
class Sentence:
    """One finding."""

    level: Level | None
    """None: not applicable."""
    text: str


@dataclass(frozen=True)
class Reading:
    """One instance in plain words."""

    headline: str
    sentences: tuple[Sentence, ...]


def who(knowledge: str) -> str:
    """The subject of a sentence about a row; a row that is not in the table by its name."""
    return WHO.get(knowledge, f"An attacker of the row “{knowledge}”")


def rows(report: Report) -> list[str]:
    """The rows of a report: first those of `KNOWLEDGE` in their order, then any others by name."""
    found = {cell.knowledge for cell in report.cells}
    return [name for name in KNOWLEDGE if name in found] + sorted(found - set(KNOWLEDGE))


def read(report: Report) -> Reading:
    """One instance."""
    sentences: list[Sentence] = []
    often = Counter(cell.not_applicable or "" for cell in report.cells)
    for knowledge in rows(report):
        cells = [cell for cell in report.cells if cell.knowledge == knowledge]
        sentences += _row(knowledge, cells, often)
    return Reading(_headline(report), tuple(sentences))


def _row(knowledge: str, cells: list[Cell], often: Counter[str]) -> list[Sentence]:
    """`often`: how many cells of the report have a reason; the rarest says most about a row."""
    found = [(kind, *each) for kind in KINDS if (each := worst(cells, kind))]
    if not found:
        reasons = sorted({cell.not_applicable or "" for cell in cells}, key=lambda reason: (often[reason], reason))
        return [Sentence(None, f"{who(knowledge)}: nothing was measured ({reasons[0]}).")]
    # A key opens texts and models: it is named where nothing was opened by it.
    shown = [each for each in found if each[0] != "key"] or found
    return [_sentence(knowledge, *each) for each in shown]


def _sentence(knowledge: str, kind: Kind, cell: Cell, metric: Metric) -> Sentence:
    level = judge(metric)
    says = PREDICATES[kind][level]
    if level is Level.ALL:
        says = next((words for about, holds, words in EXACT if about == kind and holds(cell, metric)), says)
    measured = f"{figure(metric.measured)} {counts(cell, metric)} ({between(metric.measured)}), by attack {cell.attack}"
    guess = ""
    if metric.prior is not None and level is not Level.ALL:
        guess = f"; {guessing(metric)} gets {figure(metric.prior)} ({between(metric.prior)})"
    return Sentence(level, f"{who(knowledge)} {says}: {measured}{guess}.")


def guessing(metric: Metric) -> str:
    """Who guessed, as the subject of a sentence."""
    return GUESSES.get(metric.prior_name, f"the best guess ({metric.prior_name})" if metric.prior_name else "a guess")


def levels(report: Report, *kinds: Kind) -> dict[str, Level]:
    """For every row where some attack looked for one of these kinds: how much it got at worst."""
    found = {}
    for knowledge in rows(report):
        cells = [cell for cell in report.cells if cell.knowledge == knowledge]
        most = [judge(each[1]) for kind in kinds if (each := worst(cells, kind))]
        if most:
            found[knowledge] = max(most)
    return found


ALONE = {
    Level.ALL: "The operator alone reads nearly everything.",
    Level.MUCH: "The operator alone reads far more than one would guess.",
    Level.SOME: "The operator alone reads more than one would guess.",
    Level.UNCLEAR: "Whether the operator alone reads more than one would guess could not be told from this traffic.",
    Level.UNCOMPARED: "What the operator alone reads has no guess to compare it with.",
    Level.GUESS: "Against the operator alone, every attack that was run stayed at what one would guess anyway.",
    None: "What the operator alone reads was not measured.",
}
OTHERS = (
    (frozenset({Level.ALL}), "{} read nearly everything"),
    (frozenset({Level.SOME, Level.MUCH}), "{} read more than one would guess"),
    (frozenset({Level.UNCLEAR, Level.UNCOMPARED}), "of {} it could not be told"),
    (frozenset({Level.GUESS}), "{} stayed at the guess"),
)
"""Attackers who know or have more than the operator alone, counted by what they read."""


def _headline(report: Report) -> str:
    found, sessions = levels(report, "text", "answers"), levels(report, "text")
    alone = ALONE[found.pop("server", None)]
    said = []
    for which, words in OTHERS:
        who_did = [knowledge for knowledge, level in found.items() if level in which]
        if who_did:
            answers = sum(sessions.get(knowledge) not in which for knowledge in who_did)
            said.append(words.format(len(who_did)) + (f" ({answers} of answers alone)" if answers else ""))
    if not said:
        return alone
    return f"{alone} Others know or have more: {', '.join(said)}."
