"""The summary of an audit is read as it was written, and nothing else passes for one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stip_protocol.leakage import CELLS_LIMIT, Interval, Leakage, LeakageCell

SHARE = {"value": 0.5, "low": 0.25, "high": 0.75}
MEASURED: dict[str, Any] = {"attack": "B", "knowledge": "table", "metrics": {"token_top1": SHARE}}
SUMMARY: dict[str, Any] = {"report_sha256": "0f" * 32, "seed": 7, "cells": [MEASURED]}


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_an_interval_is_a_share_between_its_ends(values: list[float]) -> None:
    low, value, high = values
    if low <= value <= high:
        assert Interval(value=value, low=low, high=high).value == value
    else:
        with pytest.raises(ValidationError, match="not in this order"):
            Interval(value=value, low=low, high=high)


def test_a_summary_comes_back_from_its_json() -> None:
    summary = Leakage.model_validate(SUMMARY)
    assert Leakage.model_validate_json(summary.model_dump_json()) == summary
    assert summary.cells[0].metrics["token_top1"].high == 0.75


def test_a_field_of_a_later_version_is_passed_over() -> None:
    assert Leakage.model_validate({**SUMMARY, "later": 1}) == Leakage.model_validate(SUMMARY)


REFUSED: dict[str, dict[str, Any]] = {
    "a share above one": {"cells": [{**MEASURED, "metrics": {"token_top1": {**SHARE, "high": 1.01}}}]},
    "a share below zero": {"cells": [{**MEASURED, "metrics": {"token_top1": {**SHARE, "low": -0.01}}}]},
    "a share that is no number": {"cells": [{**MEASURED, "metrics": {"token_top1": {**SHARE, "value": float("nan")}}}]},
    "a metric that no policy knows": {"cells": [{**MEASURED, "metrics": {"tokens": SHARE}}]},
    "a cell without figure or reason": {"cells": [{"attack": "B", "knowledge": "table"}]},
    "a cell with both": {"cells": [{**MEASURED, "not_applicable": "why"}]},
    "an empty reason": {"cells": [{"attack": "B", "knowledge": "table", "not_applicable": ""}]},
    "a reason without end": {"cells": [{"attack": "B", "knowledge": "table", "not_applicable": "x" * 401}]},
    "an attack without a letter": {"cells": [{**MEASURED, "attack": "BB"}]},
    "knowledge that is no name": {"cells": [{**MEASURED, "knowledge": "the table"}]},
    "more cells than any matrix": {"cells": [MEASURED] * (CELLS_LIMIT + 1)},
    "no digest": {"report_sha256": "0f" * 31},
    "a seed below zero": {"seed": -1},
    "a seed beyond 63 bits": {"seed": 2**63},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_audit_says_is_no_summary(case: str) -> None:
    with pytest.raises(ValidationError):
        Leakage.model_validate(SUMMARY | REFUSED[case])


def test_figures_of_a_summary_cannot_be_changed() -> None:
    cell = LeakageCell.model_validate(MEASURED)
    with pytest.raises(ValidationError, match="frozen"):
        cell.knowledge = "server"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        cell.metrics["token_top1"].high = 0.5  # type: ignore[misc]
