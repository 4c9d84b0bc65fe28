"""The pages that a look-up touches nearly name the row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks import attack
from stip_keyservice.audit.pagetrace import pages_of, trace
from stip_keyservice.audit.scoring import Judge
from stip_keyservice.audit.view import NotApplicable


@pytest.mark.parametrize(
    ("index", "pages"),
    [(0, (0,)), (4, (0,)), (5, (0, 1)), (6, (1,)), (15, (2,)), (16, (3,))],
)
def test_rows_lie_one_behind_the_other_from_the_start_of_a_page(index: int, pages: tuple[int, ...]) -> None:
    assert pages_of(index, 768, 4096) == pages  # 5.33 rows a page; 16 rows are three pages


@pytest.mark.parametrize("sizes", [(0, 4096), (768, 0)])
def test_rows_and_pages_have_at_least_a_byte(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 byte"):
        trace(np.array([1]), *sizes)


def test_a_row_as_long_as_a_page_is_read_off(ground: Any) -> None:
    view = ground.view("hardened", "host")
    claims = attack("O").run(replace(view, pages=[trace(text[:-1], 8192) for text in ground.victims]))
    assert claims.tokens is not None
    for guesses, text in zip(claims.tokens, ground.victims, strict=True):
        np.testing.assert_array_equal(guesses[:, 0], text[:-1])
    assert claims.figures["ids on the same pages"] == 1


@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_the_pages_of_short_rows_leave_few_ids_and_public_text_chooses(ground: Any, preset: str) -> None:
    claims = attack("O").run(ground.view(preset, "host"))
    found = {each.name: each for each in Judge(ground.material(preset, "host")).score(claims).metrics}
    assert found["token_top10"].measured.value == 1  # five or six rows a page
    prior = found["token_top1"].prior
    assert prior is not None
    assert found["token_top1"].measured.low > prior.high


@pytest.mark.long
def test_pages_that_hold_all_rows_tell_what_public_text_tells(ground: Any) -> None:
    view = ground.view("hardened", "host")
    claims = attack("O").run(replace(view, pages=[trace(text[:-1], 1, 4096) for text in ground.victims]))
    metric = Judge(ground.material("hardened", "host")).score(claims).metrics[0]
    assert metric.prior is not None
    assert metric.measured.value <= metric.prior.high


def test_where_no_table_lies_in_the_enclave_no_page_can_be_watched(ground: Any) -> None:
    with pytest.raises(NotApplicable, match="no table lies in the enclave"):
        attack("O").run(ground.view("throughput", "server"))
