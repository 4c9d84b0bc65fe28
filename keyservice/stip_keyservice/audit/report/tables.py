"""Tables that become cards where a screen is narrow: each cell carries the name of its column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stip_keyservice.audit.report.html import Child, Html, tag


def cards(name: str, caption: str, columns: Sequence[str], rows: Iterable[Sequence[Child]]) -> Html:
    """A table of so many columns; the first cell of a row names it."""
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", [tag("th", column, scope="col") for column in columns])),
        tag("tbody", [_row(columns, row) for row in rows]),
        class_=f"cards {name}",
    )


def _row(columns: Sequence[str], row: Sequence[Child]) -> Html:
    cells = [tag("td", block(cell), data_label=column) for column, cell in zip(columns[1:], row[1:], strict=True)]
    return tag("tr", tag("th", row[0], scope="row"), cells)


def block(child: Child) -> Child:
    """Text as a paragraph; what is markup already stays."""
    return tag("p", child) if isinstance(child, str) and not isinstance(child, Html) else child


def attack(letter: str, name: str) -> Child:
    """An attack as it names a row."""
    return [f"{letter} ", tag("span", name)]
