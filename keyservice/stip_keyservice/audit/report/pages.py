"""The report's pages: `index.html`, which needs nothing beside it and runs no script, and `leakage.md`.

The same reports give the same bytes. All text goes through `html.tag`, which escapes it; a content security policy in
the page forbids everything but its own style sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stip_keyservice.audit.document import Report
from stip_keyservice.audit.report import markdown, sections
from stip_keyservice.audit.report.html import document, style, tag
from stip_keyservice.audit.report.style import style_sheet
from stip_protocol.errors import ConfigurationError

PAGE, MARKDOWN = "index.html", "leakage.md"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Of the page: no script would run, not even one in it."""
TITLE = "What leaks"


def write(reports: Sequence[Report], folder: Path) -> None:
    """Write both pages over reports, a column each in the order given, into `folder` (made where it is missing).

    Raises `ConfigurationError` where there is no report.
    """
    if not reports:
        raise ConfigurationError("leakage report: no leakage.json was given; allowed: one or more")
    canonical = [Report.from_json(report.to_json()) for report in reports]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(page(canonical), encoding="utf-8")
    (folder / MARKDOWN).write_text(markdown.page(canonical), encoding="utf-8")


def page(reports: Sequence[Report]) -> str:
    """The HTML page over reports as their JSON has them: the same from memory and from files."""
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{TITLE}: an audit of {', '.join(report.subject.preset for report in reports)}"),
        style(style_sheet(len(reports))),
    ]
    header = tag(
        "header",
        tag("h1", TITLE),
        tag(
            "p",
            "The published attacks, run against protected instances, with what different attackers know. A figure is "
            "how much an attack got; beside it stands what somebody would guess who saw nothing.",
            class_="prose",
        ),
        tag(
            "nav",
            tag("ul", [tag("li", tag("a", each.short, href=f"#{each.name}")) for each in sections.SECTIONS]),
            aria_label="Parts of this page",
        ),
    )
    parts = [
        tag(
            "section",
            tag("h2", each.title, id=f"{each.name}-title"),
            each.content(reports),
            id=each.name,
            aria_labelledby=f"{each.name}-title",
        )
        for each in sections.SECTIONS
    ]
    return document("en", head, [header, tag("main", parts)])
