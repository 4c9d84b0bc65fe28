"""Figures are printed as they are: rounding never makes all of nearly all, nor nothing of a little."""

from __future__ import annotations

import pytest

from stip_keyservice.audit.document import Bounds
from stip_keyservice.audit.report.numbers import amount, between, figure, percent
from stip_protocol.leakage import Interval


@pytest.mark.parametrize(
    ("share", "printed"),
    [(1, "100 %"), (0.99999, ">99.9 %"), (0.9996, ">99.9 %"), (0.998, "99.8 %"), (0.18, "18.0 %"), (0.0004, "<0.1 %")],
)
def test_only_all_is_a_hundred_percent(share: float, printed: str) -> None:
    assert percent(share).replace("\N{NO-BREAK SPACE}", " ") == printed


def test_only_nothing_is_zero_percent() -> None:
    assert percent(0) == "0\N{NO-BREAK SPACE}%"
    assert percent(1e-9).startswith("<")


def test_an_interval_does_not_break_over_lines() -> None:
    printed = between(Interval(value=0.5, low=0.41, high=1))
    assert printed.split("\N{NO-BREAK SPACE}") == ["41.0", "to", "100", "%"]
    assert " " not in printed


@pytest.mark.parametrize(
    ("value", "printed"),
    [(0.062, "0.062"), (-0.0001, "0.000"), (1.5, "1.50"), (31.44, "31.4"), (64000.0, "64,000"), (13963.4, "13,963")],
)
def test_amounts_have_about_three_digits(value: float, printed: str) -> None:
    assert amount(value) == printed


def test_a_perplexity_is_no_share() -> None:
    assert figure(Bounds(value=31.44, low=28, high=35)) == "31.4"
    assert between(Bounds(value=31.44, low=28, high=35)).startswith("28")
