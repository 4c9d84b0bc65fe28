"""What the reports for people are written with: tables in Markdown, and numbers of few digits."""

from __future__ import annotations

from collections.abc import Iterable

BUSY = 0.5
"""A one-minute load average above this before a run: others were using the machine."""


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table, of cells that hold no `|`."""
    names = list(header)
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if abs(seconds) < 0.1 else f"{seconds * 1e3:.0f}"


def load(average: float) -> str:
    """A load average, with a warning where it is one."""
    return f"{average}" if average <= BUSY else f"{average}: **not a quiet machine; read ratios and controls only**"
