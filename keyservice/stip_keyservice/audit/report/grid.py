"""The matrix as data: rows of knowledge and attack, a column an instance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stip_keyservice.audit.document import Cell, Report
from stip_keyservice.audit.report.words import rows


@dataclass(frozen=True)
class Line:
    """One attack with one kind of knowledge, over all instances."""

    attack: str
    knowledge: str
    cells: tuple[Cell | None, ...]
    """An instance each; None where a report has no such cell."""

    @property
    def measured(self) -> bool:
        """Whether any instance has a figure."""
        return any(cell is not None and cell.metrics for cell in self.cells)


@dataclass(frozen=True)
class Absence:
    """Why an attack is not applicable, and where."""

    attack: str
    reason: str
    places: tuple[tuple[str, tuple[str, ...]], ...]
    """Instances' labels (or "all instances"), and the rows that this is about."""


def labels(reports: Sequence[Report]) -> list[str]:
    """A name for each instance: its preset, with its origin where several have that preset, numbered where even these
    are the same."""
    presets = Counter(report.subject.preset for report in reports)
    names = [
        report.subject.preset
        if presets[report.subject.preset] == 1 or not report.subject.origin
        else f"{report.subject.preset}, {report.subject.origin}"
        for report in reports
    ]
    twice, seen = Counter(names), Counter[str]()
    for index, name in enumerate(names):
        seen[name] += 1
        if twice[name] > 1:
            names[index] = f"{name} ({seen[name]})"
    return names


def knowledge_rows(reports: Sequence[Report]) -> list[str]:
    """Every row that some report has, in their order."""
    return list(dict.fromkeys(name for report in reports for name in rows(report)))


def lines(reports: Sequence[Report]) -> list[Line]:
    """Every line, by knowledge and then by letter."""
    found = [{(cell.knowledge, cell.attack): cell for cell in report.cells} for report in reports]
    letters = sorted({cell.attack for report in reports for cell in report.cells})
    made = (
        Line(letter, knowledge, tuple(cells.get((knowledge, letter)) for cells in found))
        for knowledge in knowledge_rows(reports)
        for letter in letters
    )
    return [line for line in made if any(line.cells)]


def absences(reports: Sequence[Report]) -> list[Absence]:
    """Everything that is not applicable, by attack and reason."""
    everywhere = labels(reports)
    where: dict[tuple[str, str], dict[str, list[str]]] = {}
    for line in lines(reports):
        for label, cell in zip(everywhere, line.cells, strict=True):
            if cell is not None and cell.not_applicable:
                where.setdefault((line.attack, cell.not_applicable), {}).setdefault(label, []).append(line.knowledge)
    return [
        Absence(attack, reason, _merged(by_label, everywhere)) for (attack, reason), by_label in sorted(where.items())
    ]


def _merged(by_label: dict[str, list[str]], everywhere: list[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    by_rows: dict[tuple[str, ...], list[str]] = {}
    for label, names in by_label.items():
        by_rows.setdefault(tuple(names), []).append(label)
    return tuple(
        ("all instances" if names == everywhere and len(names) > 1 else "; ".join(names), which)
        for which, names in by_rows.items()
    )
