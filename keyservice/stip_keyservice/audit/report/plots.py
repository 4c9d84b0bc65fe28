"""Plots as inline SVG, small enough to be read on a phone as they are: colours and type come from the style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stip_keyservice.audit.document import Cell, Metric, Point, Report
from stip_keyservice.audit.report import catalogue, grid
from stip_keyservice.audit.report.html import Html, tag
from stip_keyservice.audit.report.judging import ANSWERS, LOOKS, judge, of_kind
from stip_keyservice.audit.report.numbers import amount, between, percent
from stip_protocol.leakage import Interval

WIDTH = 340
"""Of a plot, in CSS pixels at full size: a phone's column."""
LEFT, RIGHT = 92, 12
"""Margins left for names and right for the last mark's half."""
ROW = 19
TOP, FOOT = 8, 34
HEIGHT, EDGE = 200, 48
"""Of a curve: its height, and its margin for the numbers."""
DODGE = 4
"""Between the points of two curves at the same price."""
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
SIGNS = ("circle", "square", "diamond", "triangle", "cross")
"""Marks of curves: told apart without colours."""


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "label") -> Html:
    return tag("text", words, x=_n(x), y=_n(y), text_anchor=anchor, class_=kind)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _path(kind: str, d: str) -> Html:
    return tag("path", class_=kind, d=d)


def _svg(name: str, title: str, description: str, height: float, *children: Html | list[Html]) -> Html:
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", description, id=f"{name}-desc"),
        *children,
        class_="plot",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        viewBox=f"0 0 {WIDTH} {_n(height)}",
        width=WIDTH,
        height=_n(height),
    )


def recovery(reports: Sequence[Report]) -> list[Html]:
    """A figure an instance: tokens read by each attack, their intervals, and the guess. The same lines everywhere."""
    shown = [line for line in grid.lines(reports) if any(cell is not None and _tokens(cell) for cell in line.cells)]
    return [
        tag(
            "figure",
            tag("figcaption", label),
            _recovery(f"recovery-{index}", label, [(line, line.cells[index]) for line in shown]),
        )
        for index, label in enumerate(grid.labels(reports))
    ]


def _tokens(cell: Cell) -> Metric | None:
    metric = of_kind(cell, "text") or of_kind(cell, "answers")
    return metric if metric is not None and isinstance(metric.measured, Interval) else None


def _recovery(name: str, label: str, lines: list[tuple[grid.Line, Cell | None]]) -> Html:
    bottom = TOP + ROW * len(lines)
    marks = [part for index, (line, cell) in enumerate(lines) for part in _row(index, line, cell)]
    said = "; ".join(_said(line, cell) for line, cell in lines)
    return _svg(
        name,
        f"Tokens read under {label}, by attack and knowledge, against the best guess",
        said,
        bottom + FOOT,
        [_path("grid", f"M{_n(_across(tick))} {TOP}V{bottom}") for tick in TICKS],
        [_text(_across(tick), bottom + 14, f"{tick * 100:.0f}", "middle", "tick") for tick in TICKS],
        [_text((LEFT + WIDTH - RIGHT) / 2, bottom + 29, "% of tokens", "middle", "tick")],
        marks,
    )


def _row(index: int, line: grid.Line, cell: Cell | None) -> Iterator[Html]:
    middle = TOP + ROW * (index + 0.5)
    yield _text(0, middle + 4, f"{line.attack} {line.knowledge}")
    metric = _tokens(cell) if cell is not None else None
    if metric is None or not isinstance(metric.measured, Interval):
        yield _text(LEFT + 4, middle + 4, "not applicable" if cell is not None else "not run", kind="muted")
        return
    if isinstance(metric.prior, Interval):
        low, high = _across(metric.prior.low), _across(metric.prior.high)
        yield tag("rect", class_="band", x=_n(low), y=_n(middle - 8), width=_n(max(high - low, 1)), height=16)
        yield _path("prior", f"M{_n(_across(metric.prior.value))} {_n(middle - 8)}v16")
    measured, css = metric.measured, LOOKS[judge(metric)].css
    yield _path(f"whisker {css}", f"M{_n(_across(measured.low))} {_n(middle)}H{_n(_across(measured.high))}")
    yield tag("circle", class_=f"dot {css}", cx=_n(_across(measured.value)), cy=_n(middle), r=5)


def _said(line: grid.Line, cell: Cell | None) -> str:
    metric = _tokens(cell) if cell is not None else None
    who = f"{line.attack} {line.knowledge}"
    if metric is None:
        return f"{who} not applicable" if cell is not None else f"{who} not run"
    guess = f", guess {percent(metric.prior.value)}" if isinstance(metric.prior, Interval) else ""
    return f"{who} {percent(metric.measured.value)} ({between(metric.measured)}){guess}"


def _across(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


@dataclass(frozen=True)
class Curve:
    """Points of one instance."""

    label: str
    points: tuple[Point, ...]


def curves(reports: Sequence[Report]) -> list[Html]:
    """A figure an attack, row and price: what is read for what is paid, a curve an instance. One price is no curve."""
    found: dict[tuple[str, str, str], list[Curve]] = {}
    for label, report in zip(grid.labels(reports), reports, strict=True):
        for cell in report.cells:
            for price in dict.fromkeys(point.curve for point in cell.points):
                points = sorted((point for point in cell.points if point.curve == price), key=lambda point: point.x)
                found.setdefault((cell.attack, cell.knowledge, price), []).append(Curve(label, tuple(points)))
    return [
        tag(
            "figure",
            tag("figcaption", f"{letter} {catalogue.name(letter)}, {knowledge}: {_of(letter)} by {price}"),
            _curves(f"curve-{index}", (letter, knowledge, price), each),
            _key(each),
        )
        for index, ((letter, knowledge, price), each) in enumerate(sorted(found.items(), key=lambda item: item[0]))
        if len({point.x for curve in each for point in curve.points}) > 1
    ]


def _of(letter: str) -> str:
    return "tokens of answers" if letter in ANSWERS else "tokens"


def _curves(name: str, what: tuple[str, str, str], found: list[Curve]) -> Html:
    letter, knowledge, price = what
    xs = sorted({point.x for curve in found for point in curve.points})
    scale, bottom = _Scale.over(xs), TOP + HEIGHT
    drawn = [part for index, curve in enumerate(found) for part in _curve(index, len(found), curve, scale)]
    said = "; ".join(
        f"{curve.label}: "
        + ", ".join(f"{percent(point.measured.value)} at {amount(point.x)}" for point in curve.points)
        for curve in found
    )
    return _svg(
        name,
        f"What attack {letter}, {knowledge}, reads of {_of(letter)}, by {price}",
        said,
        bottom + FOOT,
        [_path("grid", f"M{EDGE} {_n(_up(tick))}H{WIDTH - RIGHT}") for tick in TICKS],
        [_text(EDGE - 6, _up(tick) + 4, f"{tick * 100:.0f} %", "end", "tick") for tick in TICKS],
        [_text(scale(x), bottom + 14, amount(x), "middle", "tick") for x in scale.ticks(xs)],
        [_text((EDGE + WIDTH - RIGHT) / 2, bottom + 29, price, "middle", "tick")],
        drawn,
    )


@dataclass(frozen=True)
class _Scale:
    """Across a curve's plot: logarithmic where the prices span more than a decade."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, xs: Sequence[float]) -> _Scale:
        logarithmic = xs[0] > 0 and xs[-1] / xs[0] > 10
        return cls(xs[0], xs[-1], logarithmic)

    def __call__(self, x: float) -> float:
        low, high, here = self.low, self.high, x
        if self.logarithmic:
            low, high, here = math.log(low), math.log(high), math.log(x)
        share = (here - low) / (high - low) if high > low else 0.5
        return EDGE + 14 + share * (WIDTH - RIGHT - 28 - EDGE)

    def ticks(self, xs: Sequence[float]) -> Iterator[float]:
        """Prices whose numbers do not touch."""
        last = -math.inf
        for x in xs:
            if self(x) - last >= 44:
                last = self(x)
                yield x


def _up(share: float) -> float:
    return TOP + (1 - share) * HEIGHT


def _curve(index: int, count: int, curve: Curve, scale: _Scale) -> Iterator[Html]:
    """Beside each other by a few pixels, so that equal curves are all seen."""
    kind, beside = f"line-{index % len(SIGNS)}", DODGE * (index - (count - 1) / 2)
    ends = [(scale(point.x) + beside, _up(point.measured.value)) for point in curve.points]
    for (x, _), point in zip(ends, curve.points, strict=True):
        yield _path(f"whisker {kind}", f"M{_n(x)} {_n(_up(point.measured.low))}V{_n(_up(point.measured.high))}")
    yield _path(f"line {kind}", "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in ends))
    for x, y in ends:
        yield _mark(index, x, y)


SHAPES = {
    "circle": "M{x} {y}m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "square": "M{x} {y}m-4-4h8v8h-8z",
    "diamond": "M{x} {y}m0-5.5l5.5 5.5l-5.5 5.5l-5.5-5.5z",
    "triangle": "M{x} {y}m0-5l5 9h-10z",
    "cross": "M{x} {y}m-1.5-5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
}


def _mark(index: int, x: float, y: float) -> Html:
    shape = SIGNS[index % len(SIGNS)]
    return _path(f"mark line-{index % len(SIGNS)}", SHAPES[shape].format(x=_n(x), y=_n(y)))


def _key(found: list[Curve]) -> Html:
    return tag(
        "ul",
        [
            tag("li", tag("svg", _mark(index, 7, 7), width=14, height=14, aria_hidden="true"), " ", curve.label)
            for index, curve in enumerate(found)
        ],
        class_="key",
    )
