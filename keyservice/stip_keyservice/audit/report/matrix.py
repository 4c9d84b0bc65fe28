"""The matrix as tables: at a glance, line by line, what is not applicable, and every figure."""

from __future__ import annotations

from collections.abc import Sequence

from stip_keyservice.audit.document import Cell, Metric, Report
from stip_keyservice.audit.knowledge import KNOWLEDGE
from stip_keyservice.audit.report import catalogue, grid, words
from stip_keyservice.audit.report.html import Child, Html, tag
from stip_keyservice.audit.report.judging import KINDS, LOOKS, Kind, Level, Look, counts, judge, main, of_kind, worst
from stip_keyservice.audit.report.numbers import amount, between, figure
from stip_keyservice.audit.report.tables import attack, cards
from stip_protocol.leakage import Interval

GLANCED: tuple[tuple[Kind, str], ...] = (("text", "read"), ("answers", "of answers"), ("copy", "copied"))
"""What the first table shows of each kind."""


def legend() -> Html:
    """The levels, worst first."""
    looks = [LOOKS[level] for level in reversed(Level)]
    return tag("ul", [tag("li", _glyph(look), " ", look.words, class_=look.css) for look in looks], class_="legend")


def glance(reports: Sequence[Report]) -> Html:
    """For every row of knowledge and instance: how much the attack that did best got."""
    names = grid.labels(reports)
    body = [
        tag(
            "tr",
            _knowledge(knowledge),
            [_glanced(report, knowledge, name) for report, name in zip(reports, names, strict=True)],
        )
        for knowledge in grid.knowledge_rows(reports)
    ]
    return _table("glance", "The most that any attack got, by what the attacker knows", _columns(reports), body)


def _glanced(report: Report, knowledge: str, name: str) -> Html:
    cells = [cell for cell in report.cells if cell.knowledge == knowledge]
    said: list[Child] = []
    level = None
    for kind, word in GLANCED:
        found = worst(cells, kind)
        if found:
            cell, metric = found
            level = judge(metric) if level is None else max(level, judge(metric))
            said.append(
                tag(
                    "p",
                    _sign(judge(metric)),
                    tag("b", figure(metric.measured)),
                    f" {word} ",
                    tag("small", f"by {cell.attack}"),
                )
            )
    if level is None:
        return tag("td", tag("p", "not applicable" if cells else "not run", class_="muted"), data_label=name)
    return tag("td", said, data_label=name, class_=LOOKS[level].css)


def table(reports: Sequence[Report], reasons: Sequence[str]) -> Html:
    """Every line where some instance has a figure. `reasons`: of what is not applicable, in the order of `notes`."""
    names = grid.labels(reports)
    bodies = []
    for knowledge in grid.knowledge_rows(reports):
        found = [line for line in grid.lines(reports) if line.knowledge == knowledge and line.measured]
        if not found:
            continue
        head = tag("tr", tag("th", _who(knowledge), scope="rowgroup", colspan=len(reports) + 1), class_="group")
        bodies.append(tag("tbody", head, [_line(line, names, reasons) for line in found]))
    return _table("matrix", "Attacks by what the attacker knows; a column an instance", _columns(reports), bodies)


def _line(line: grid.Line, names: Sequence[str], reasons: Sequence[str]) -> Html:
    head = tag(
        "th",
        tag("a", attack(line.attack, catalogue.name(line.attack)), href=f"#attack-{line.attack}"),
        scope="row",
    )
    return tag("tr", head, [_cell(cell, name, reasons) for cell, name in zip(line.cells, names, strict=True)])


def _cell(cell: Cell | None, name: str, reasons: Sequence[str]) -> Html:
    metric = main(cell) if cell is not None else None
    if cell is None:
        return tag("td", tag("p", "not run", class_="muted"), data_label=name)
    if metric is None:
        reason = cell.not_applicable or ""
        button = tag(
            "button",
            "not applicable",
            type="button",
            popovertarget=f"why-{reasons.index(reason)}",
            title=reason,
        )
        return tag("td", button, data_label=name)
    return tag(
        "td",
        tag("p", _sign(judge(metric)), tag("b", figure(metric.measured)), " ", tag("small", counts(cell, metric))),
        _bar(metric),
        tag("p", tag("span", between(metric.measured)), _guess(metric), class_="ends"),
        _besides(cell, metric),
        data_label=name,
        class_=LOOKS[judge(metric)].css,
    )


def _guess(metric: Metric) -> Child:
    if metric.prior is None:
        return None
    return [", ", tag("span", f"guess {figure(metric.prior)}", title=words.guessing(metric))]


def _besides(cell: Cell, shown: Metric) -> Child:
    """What the attack got of another kind: the first metric of each."""
    others = [metric for kind in KINDS if (metric := of_kind(cell, kind)) not in (None, shown)]
    return [
        tag("p", _sign(judge(metric)), f"{figure(metric.measured)} {counts(cell, metric)}", class_="besides")
        for metric in others
        if metric is not None
    ]


def _bar(metric: Metric) -> Child:
    """The figure as a bar, its interval as a line, the guess as a mark; only for shares."""
    measured, prior = metric.measured, metric.prior
    if not isinstance(measured, Interval):
        return None
    mark = prior if isinstance(prior, Interval) else None
    return tag(
        "svg",
        tag("rect", class_="track", width=100, height=10),
        tag("rect", class_="fill", width=_x(measured.value), height=10),
        tag("path", class_="whisker", d=f"M{_x(measured.low)} 5H{_x(measured.high)}"),
        mark and tag("path", class_="prior", d=f"M{_x(mark.value)} 0V10"),
        class_="bar",
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _x(share: float) -> str:
    return f"{share * 100:.4g}"


def notes(reasons: Sequence[str]) -> Html:
    """What opens when somebody taps on "not applicable"."""
    return Html(
        "".join(
            tag("div", tag("p", tag("b", "Not applicable. "), reason), id=f"why-{index}", popover="auto")
            for index, reason in enumerate(reasons)
        )
    )


def absences(reports: Sequence[Report]) -> Html:
    """Everything that is not applicable, with its reason."""
    rows = [
        (
            attack(each.attack, catalogue.name(each.attack)),
            each.reason,
            [tag("p", f"{where}: {', '.join(which)}") for where, which in each.places],
        )
        for each in grid.absences(reports)
    ]
    return cards("absences", "What is not applicable, and why", ("Attack", "Why", "Where"), rows)


def figures(report: Report) -> Html:
    """Every metric of one instance, those that the matrix does not show too."""
    columns = ("Attack", "Attacker", "Figure", "Measured (95 %)", "Best guess (95 %)", "Counted")
    rows: list[tuple[Child, ...]] = []
    for cell in report.cells:
        who = (attack(cell.attack, catalogue.name(cell.attack)), cell.knowledge)
        for metric in cell.metrics:
            named = f"{metric.name} {metric.of}".replace("_", " ")
            measured = f"{figure(metric.measured)} ({between(metric.measured)})"
            rows.append((*who, named, measured, _prior(metric), f"{metric.counted:,}"))
        for point in cell.points:
            measured = f"{figure(point.measured)} ({between(point.measured)})"
            rows.append((*who, f"tokens at {amount(point.x)} {point.curve}", measured, "", ""))
        rows += [(*who, name.replace("_", " "), amount(value), "", "") for name, value in sorted(cell.figures.items())]
    return cards("figures", "Every figure", columns, rows)


def _prior(metric: Metric) -> str:
    if metric.prior is None:
        return "none"
    return f"{figure(metric.prior)} ({between(metric.prior)}) {metric.prior_name}".rstrip()


def _sign(level: Level) -> Child:
    """A sign for those who see it, words for those who hear them."""
    look = LOOKS[level]
    said = tag("span", f"{look.words}: ", class_="heard")
    return [_glyph(look), " ", said]


def _glyph(look: Look) -> Html:
    return tag("span", look.sign, class_="sign", aria_hidden="true", title=look.words)


def _who(knowledge: str) -> Child:
    words = KNOWLEDGE[knowledge].words if knowledge in KNOWLEDGE else ""
    return [tag("b", knowledge), " ", tag("span", words)]


def _knowledge(knowledge: str) -> Html:
    return tag("th", _who(knowledge), scope="row")


def _columns(reports: Sequence[Report]) -> list[Html]:
    first = tag("th", "The attacker", scope="col")
    return [first] + [
        tag("th", tag("b", report.subject.preset), " ", tag("span", report.subject.origin), scope="col")
        for report in reports
    ]


def _table(name: str, caption: str, head: Child, body: Sequence[Html]) -> Html:
    bodies: Child = body if body and body[0].startswith("<tbody") else tag("tbody", body)
    return tag("table", tag("caption", caption), tag("thead", tag("tr", head)), bodies, class_=f"cards {name}", id=name)
