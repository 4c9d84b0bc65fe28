"""The same findings as Markdown (GitHub's tables), for documentation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from stip_keyservice.audit.document import Cell, Report
from stip_keyservice.audit.report import catalogue, comparison, grid, words
from stip_keyservice.audit.report.judging import LOOKS, Level, counts, judge, main
from stip_keyservice.audit.report.numbers import between, figure, percent
from stip_protocol.leakage import Interval

ESCAPED = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#~"} | {"\n": " ", "\r": " "})
"""Characters that Markdown reads, and line ends, which would leave a table's cell."""


def text(words: str) -> str:
    """Text as Markdown: nothing in it is markup."""
    return words.translate(ESCAPED)


def page(reports: Sequence[Report]) -> str:
    """The page."""
    names = grid.labels(reports)
    parts = [
        ["# What leaks", ""],
        [
            "The published attacks, run against protected instances. A figure is how much an attack got, with its 95 % "
            "confidence interval; beside it stands the best guess of somebody who saw nothing.",
            "",
        ],
        ["Signs: " + ", ".join(f"{LOOKS[level].sign} {LOOKS[level].words}" for level in reversed(Level)) + ".", ""],
        *(_reading(report, name) for report, name in zip(reports, names, strict=True)),
        ["## Matrix", "", *_matrix(reports, names), ""],
        ["## Not applicable", "", *_absences(reports), ""],
        ["## What papers say", "", *_claims(reports, names), ""],
        ["## Limits", "", *(f"{index}. {text(limit)}" for index, limit in enumerate(catalogue.LIMITS, 1)), ""],
        ["## Digests", "", *_digests(reports, names), ""],
    ]
    return "\n".join(line for part in parts for line in part)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A table of cells that are Markdown already."""
    return [_line(head), _line(["---"] * len(head)), *(_line(row) for row in body)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _reading(report: Report, name: str) -> list[str]:
    reading = words.read(report)
    subject, traffic = report.subject, report.traffic
    about = (
        f"{subject.origin or 'Model'}, {subject.dtype}, {subject.layers} layers of width {subject.width}, vocabulary "
        f"{subject.vocabulary}; {traffic.sessions} sessions of users, {traffic.positions} tokens, {traffic.source}; "
        f"{traffic.accomplice_tokens} tokens of a helping user; seed {report.seed}."
    )
    signs = (LOOKS[sentence.level].sign if sentence.level is not None else "–" for sentence in reading.sentences)
    items = [f"- {sign} {text(each.text)}" for sign, each in zip(signs, reading.sentences, strict=True)]
    return [f"## {text(name)}", "", text(about), "", f"**{text(reading.headline)}**", "", *items, ""]


def _matrix(reports: Sequence[Report], names: Sequence[str]) -> list[str]:
    return table(
        ["Attacker", "Attack", *(text(name) for name in names)],
        (
            [text(line.knowledge), f"{line.attack} {text(catalogue.name(line.attack))}", *map(_cell, line.cells)]
            for line in grid.lines(reports)
            if line.measured
        ),
    )


def _cell(cell: Cell | None) -> str:
    metric = main(cell) if cell is not None else None
    if cell is None or metric is None:
        return "not run" if cell is None else "not applicable"
    guess = f"; guess {percent(metric.prior.value)}" if isinstance(metric.prior, Interval) else ""
    said = f"{figure(metric.measured)} {counts(cell, metric)} ({between(metric.measured)}{guess})"
    return f"{LOOKS[judge(metric)].sign} {text(said)}"


def _absences(reports: Sequence[Report]) -> list[str]:
    return table(
        ["Attack", "Why", "Where"],
        (
            [
                f"{each.attack} {text(catalogue.name(each.attack))}",
                text(each.reason),
                text("; ".join(f"{where}: {', '.join(which)}" for where, which in each.places)),
            ]
            for each in grid.absences(reports)
        ),
    )


def _claims(reports: Sequence[Report], names: Sequence[str]) -> list[str]:
    return table(
        ["Claim", "Source", "There", "Here"],
        (
            [
                text(claim.subject),
                text(claim.source),
                text(" ".join(filter(None, (claim.figure + ".", claim.note)))),
                "<br>".join(
                    f"**{text(name)}**: {text(said)}"
                    for name, report in zip(names, reports, strict=True)
                    if (said := comparison.ours(claim, report))
                )
                or "not measured",
            ]
            for claim in comparison.CLAIMS
        ),
    )


def _digests(reports: Sequence[Report], names: Sequence[str]) -> list[str]:
    return table(
        ["Instance", "SHA-256 of leakage.json", "Seed"],
        (
            [text(name), f"`{hashlib.sha256(report.to_json()).hexdigest()}`", str(report.seed)]
            for name, report in zip(names, reports, strict=True)
        ),
    )
