"""A report is the same bytes for the same findings, and its signed summary says what it says."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stip_keyservice.audit.document import Bounds, Cell, Correlation, Metric, Point, Report, Subject, Traffic
from stip_protocol.leakage import Interval, Leakage

SUBJECT = Subject(
    instance="00" * 16,
    epoch=0,
    preset="hardened",
    dtype="float32",
    width=8,
    vocabulary=16,
    layers=1,
    tied=False,
    origin="a model of this test",
    server_sha256="00" * 32,
)
TRAFFIC = Traffic(source="computed", sha256="00" * 32, sessions=2, positions=20, accomplice_tokens=0)


def interval(value: float, reach: float = 0.0) -> Interval:
    return Interval(value=value, low=max(0.0, value - reach), high=min(1.0, value + reach))


def metric(name: str, measured: Interval | Bounds, of: str = "") -> Metric:
    return Metric(name=name, of=of, measured=measured, prior=None, counted=1)


def report(*cells: Cell, **changed: Any) -> Report:
    content: dict[str, Any] = {
        "subject": SUBJECT,
        "traffic": TRAFFIC,
        "seed": 7,
        "versions": {"stip": "0.1.0"},
        "cells": cells,
        "correlations": (),
    }
    return Report(**(content | changed))


def cell(*metrics: Metric, attack: str = "B", **changed: Any) -> Cell:
    return Cell(attack=attack, knowledge="table", metrics=metrics, **changed)


def test_a_report_comes_back_from_its_json() -> None:
    whole = report(
        cell(
            metric("token_top1", interval(0.5, 0.25)),
            metric("stolen_perplexity", Bounds(value=31.5, low=30.0, high=33.0), of="scratch"),
            points=(Point(curve="labelled tokens", x=100.0, measured=interval(0.25)),),
            figures={"rows": 3.0},
        ),
        Cell(attack="D", knowledge="server", not_applicable="needs a base"),
        correlations=(Correlation(what="rows", one_minus_pearson=0.9, distance_correlation=0.03),),
    )
    assert Report.from_json(whole.to_json()) == whole
    assert Report.from_json(whole.to_json()).to_json() == whole.to_json()


@given(st.floats(-1e-7, 1e-7))
def test_the_last_bits_of_a_figure_make_no_other_digest(noise: float) -> None:
    first = report(cell(metric("token_top1", interval(0.5)), figures={"a": 3.0, "b": 0.0}))
    second = report(cell(metric("token_top1", interval(0.5 + noise)), figures={"b": noise, "a": 3.0 - noise}))
    assert first.to_json() == second.to_json()


def test_another_finding_makes_another_digest() -> None:
    assert report(cell(metric("token_top1", interval(0.5)))).to_json() != (
        report(cell(metric("token_top1", interval(0.5002)))).to_json()
    )


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted))
def test_the_summary_has_the_figures_of_the_json_digit_for_digit(values: list[float]) -> None:
    low, value, high = values
    whole = report(cell(metric("token_top1", Interval(value=value, low=low, high=high))))
    (written,) = json.loads(whole.to_json())["cells"][0]["metrics"]
    (summarised,) = json.loads(whole.summary().model_dump_json())["cells"]
    assert summarised["metrics"] == {"token_top1": written["measured"]}


def test_the_summary_names_the_digest_of_the_json_and_says_what_was_not_applicable() -> None:
    whole = report(Cell(attack="D", knowledge="server", not_applicable="needs a base"))
    summary = whole.summary()
    assert summary.report_sha256 == hashlib.sha256(whole.to_json()).hexdigest()
    assert summary.seed == 7
    assert [(each.attack, each.knowledge, each.not_applicable) for each in summary.cells] == [
        ("D", "server", "needs a base")
    ]
    assert Leakage.model_validate_json(summary.model_dump_json()) == summary


def test_of_several_models_the_summary_has_the_most_that_any_reaches() -> None:
    whole = report(
        cell(
            metric("stolen_agreement", interval(0.5, 0.01), of="narrow"),
            metric("stolen_agreement", interval(0.45, 0.2), of="wide"),
            metric("stolen_perplexity", Bounds(value=31.0, low=30.0, high=33.0), of="narrow"),
        )
    )
    (summarised,) = whole.summary().cells
    assert summarised.metrics == {"stolen_agreement": Interval(value=0.5, low=0.49, high=0.65)}


def test_a_cell_without_a_share_is_in_the_report_and_not_in_its_summary() -> None:
    perplexity = metric("stolen_perplexity", Bounds(value=31.0, low=30.0, high=33.0))
    whole = report(cell(perplexity), cell(metric("token_top1", interval(0.5)), attack="C"))
    assert len(whole.cells) == 2
    assert [each.attack for each in whole.summary().cells] == ["C"]


def test_there_is_no_negative_zero() -> None:
    whole = report(cell(metric("token_top1", interval(0.0)), figures={"difference": -1e-9}))
    assert b"-0.0" not in whole.to_json()


REFUSED: dict[str, Any] = {
    "a cell without a figure or a reason": lambda: Cell(attack="B", knowledge="table"),
    "a cell with both": lambda: cell(metric("token_top1", interval(1.0)), not_applicable="why"),
    "an empty reason": lambda: Cell(attack="B", knowledge="table", not_applicable=""),
    "an attack without a letter": lambda: cell(metric("token_top1", interval(1.0)), attack="norms"),
    "a share as bounds": lambda: metric("token_top1", Bounds(value=0.5, low=0.4, high=0.6)),
    "bounds in another order": lambda: Bounds(value=2.0, low=3.0, high=4.0),
    "bounds without end": lambda: Bounds(value=2.0, low=1.0, high=float("inf")),
    "a figure that is no number": lambda: cell(metric("token_top1", interval(1.0)), figures={"a": float("nan")}),
    "a figure of nothing": lambda: Metric(name="token_top1", measured=interval(1.0), prior=None, counted=0),
    "an unknown field": lambda: Report.from_json(report().to_json().replace(b'"seed"', b'"sown"')),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_audit_finds_is_no_report(case: str) -> None:
    with pytest.raises(ValidationError):
        REFUSED[case]()
