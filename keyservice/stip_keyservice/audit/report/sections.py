"""The parts of the page, in their order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stip_keyservice.audit.document import REPORT_NAME, Report
from stip_keyservice.audit.report import catalogue, comparison, grid, matrix, plots, words
from stip_keyservice.audit.report.html import Child, Html, tag
from stip_keyservice.audit.report.judging import LOOKS
from stip_keyservice.audit.report.tables import cards

SOURCES = {"recorded": "recorded from a running stack", "computed": "computed from the instance's parts"}


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    name: str
    short: str
    title: str
    content: Callable[[Sequence[Report]], Child]


def _prose(*children: Child, muted: bool = False) -> Html:
    return tag("p", *children, class_="prose muted" if muted else "prose")


def _several(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def findings(reports: Sequence[Report]) -> Child:
    """What was audited, in plain words, and at a glance."""
    readings = [_reading(report, name) for report, name in zip(reports, grid.labels(reports), strict=True)]
    return [
        tag("div", readings, class_="readings"),
        tag("h3", "At a glance"),
        _prose(
            "“Read”: tokens of users' sessions. “Copied”: next tokens on which a stolen copy agrees with the model. "
            "The letter is the attack that got most."
        ),
        matrix.legend(),
        matrix.glance(reports),
    ]


def _reading(report: Report, name: str) -> Html:
    reading = words.read(report)
    items = []
    for sentence in reading.sentences:
        sign = LOOKS[sentence.level].sign if sentence.level is not None else "–"
        items.append(tag("li", tag("span", sign, class_="sign", aria_hidden="true"), sentence.text))
    subject = f"{report.subject.instance}, epoch {report.subject.epoch}"
    return tag(
        "article",
        tag("h3", name, " ", tag("small", subject)),
        tag("p", _facts(report), class_="muted facts"),
        tag("p", reading.headline, class_="headline"),
        tag("ul", items),
        class_="reading",
    )


def _facts(report: Report) -> str:
    subject, traffic = report.subject, report.traffic
    return (
        f"{subject.origin or 'Model'}: {_several(subject.layers, 'layer')} of width {subject.width:,}, vocabulary "
        f"{subject.vocabulary:,}, {'a tied' if subject.tied else 'an untied'} head, {subject.dtype}. Traffic "
        f"{SOURCES[traffic.source]}: {_several(traffic.sessions, 'session')}, {_several(traffic.positions, 'token')}; "
        f"{_several(traffic.accomplice_tokens, 'token')} of a helping user. Seed {report.seed}."
    )


def who_reads_what(reports: Sequence[Report]) -> Child:
    """The matrix."""
    reasons = sorted({cell.not_applicable for report in reports for cell in report.cells if cell.not_applicable})
    return [
        _prose(
            "The bar is the figure, the thin line its 95 % confidence interval, the thick mark the best guess of "
            "somebody who saw nothing. Signs and colours compare the ends of the two intervals. Where an attack means "
            "nothing it is “not applicable”: tap it for the reason, or see the list below the matrix. The guess of a "
            "token is the better of two: the commonest, and what the model itself expects after the true text before."
        ),
        matrix.legend(),
        matrix.table(reports, reasons),
        matrix.notes(reasons),
        tag("h3", "Behind the matrix"),
        tag("details", tag("summary", "Everything that is not applicable, with reasons"), matrix.absences(reports)),
        [
            tag("details", tag("summary", f"Every figure: {name}"), matrix.figures(report))
            for report, name in zip(reports, grid.labels(reports), strict=True)
        ],
    ]


def against_guessing(reports: Sequence[Report]) -> Child:
    """The plots."""
    curves = plots.curves(reports)
    return [
        _prose(
            "A point is what an attack read, with its 95 % confidence interval; the dark mark is the best guess, the "
            "grey band that guess's interval. Lines are named by attack and row of the matrix; K is of answers alone."
        ),
        tag("div", plots.recovery(reports), class_="plots"),
        [tag("h3", "What more effort buys"), tag("div", curves, class_="plots")] if curves else None,
    ]


def beside_papers(reports: Sequence[Report]) -> Child:
    """The papers' claims beside ours."""
    names = grid.labels(reports)
    rows = []
    for claim in comparison.CLAIMS:
        measured = [
            tag("li", tag("b", name), f": {said}")
            for name, report in zip(names, reports, strict=True)
            if (said := comparison.ours(claim, report))
        ]
        note = tag("p", claim.note, class_="muted") if claim.note else None
        here: Child = tag("p", "not measured", class_="muted")
        if measured:
            here = [tag("p", claim.ours.what, class_="muted"), tag("ul", measured)]
        rows.append(([claim.subject, " ", tag("small", claim.source)], [tag("p", claim.figure), note], here))
    return cards("comparison", "Claims and figures from elsewhere, beside ours", ("Claim", "There", "Here"), rows)


def attacks(reports: Sequence[Report]) -> Child:
    """What each attack needs and costs, and the controls."""
    letters = sorted({cell.attack for report in reports for cell in report.cells})
    controls = [
        (tag("span", control.name, id=f"control-{number}"), ", ".join(control.closes) or "none", control.leaves)
        for number, control in enumerate(catalogue.CONTROLS, 1)
    ]
    return [
        tag("div", [_attack(letter) for letter in letters], class_="attacks"),
        tag("h3", "Controls"),
        cards("controls", "What each control closes, and leaves", ("Control", "Closes", "Leaves"), controls),
    ]


def _attack(letter: str) -> Html:
    found = catalogue.known(letter)
    facts: list[tuple[str, Child]] = []
    if found is not None:
        facts += [("Source", found.source), ("Assumes", found.assumes), ("Costs", found.cost)]
    closing = [
        tag("li", tag("a", control.name, href=f"#control-{number}"), _part(control.closes[letter]))
        for number, control in enumerate(catalogue.CONTROLS, 1)
        if letter in control.closes
    ]
    facts.append(("Closed by", tag("ul", closing) if closing else "nothing that is known"))
    return tag(
        "article",
        tag("h3", f"{letter} · {catalogue.name(letter)}"),
        tag("dl", [[tag("dt", term), tag("dd", text)] for term, text in facts]),
        class_="attack",
        id=f"attack-{letter}",
    )


def _part(closed: str) -> str:
    return f" (in part: {closed})" if closed else ""


def limits(_: Sequence[Report]) -> Child:
    """What holds whatever was measured."""
    return tag("ol", [tag("li", limit) for limit in catalogue.LIMITS], class_="prose")


def repeating(reports: Sequence[Report]) -> Child:
    """Commands, versions and digests."""
    rows = [
        (
            name,
            tag("code", hashlib.sha256(report.to_json()).hexdigest()),
            tag("code", report.subject.server_sha256),
            tag("code", report.traffic.sha256),
        )
        for name, report in zip(grid.labels(reports), reports, strict=True)
    ]
    versions = sorted({f"{name} {version}" for report in reports for name, version in report.versions.items()})
    seeds = sorted({report.seed for report in reports})
    commands = [f"stip-keyservice audit INSTANCE --model MODEL --seed {seed}" for seed in seeds]
    commands.append(f"stip-keyservice leakage-report {REPORT_NAME}... --out FOLDER")
    return [
        _prose(
            "The same instance, traffic, base, scale and seed give the same leakage.json, byte for byte, under the "
            "same versions of the libraries. A signed manifest names the digest of its instance's; several of them "
            "make this page."
        ),
        tag("pre", tag("code", "\n".join(commands))),
        _prose("The bundled model under every preset, recorded from a running stack:"),
        tag("pre", tag("code", "make audit")),
        _prose(f"Libraries: {', '.join(versions)}.", muted=True),
        cards("digests", "SHA-256 digests", ("Instance", REPORT_NAME, "Server part", "Traffic"), rows),
    ]


SECTIONS = (
    Section("findings", "Findings", "What was audited, and what came out", findings),
    Section("who", "Matrix", "Who reads how much, by which attack", who_reads_what),
    Section("guessing", "Plots", "Against what one would guess anyway", against_guessing),
    Section("papers", "Papers", "What papers say, and what was measured here", beside_papers),
    Section("attacks", "Attacks", "The attacks, and what closes them", attacks),
    Section("limits", "Limits", "What no figure here promises", limits),
    Section("repeating", "Repeat", "How to repeat it", repeating),
)
