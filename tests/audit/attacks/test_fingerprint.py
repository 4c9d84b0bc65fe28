"""A permutation of features does not change which values a row has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks import attack, matching
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.scoring import Judge
from stip_keyservice.audit.view import Entry, View
from tests.audit.attacks import relatives


def top1(ground: Any, preset: str, row: str, claims: Claims) -> Any:
    return next(each for each in Judge(ground.material(preset, row)).score(claims).metrics if each.name == "token_top1")


@pytest.mark.parametrize("row", ["table", "drifted", "base"])
def test_under_a_permutation_a_known_table_reads_every_prompt_and_gives_the_permutation(ground: Any, row: str) -> None:
    claims = attack("B").run(ground.view("paper", row))
    assert top1(ground, "paper", row, claims).measured.value >= 0.99
    np.testing.assert_array_equal(claims.residual, ground.truth("paper").residual)


def test_one_row_is_enough(ground: Any) -> None:
    view = ground.view("paper", "table")
    seen = view.victims[0]
    assert seen.rows is not None
    claims = attack("B").run(replace(view, victims=[replace(seen, rows=seen.rows[5:6], asked=np.zeros(1, np.int64))]))
    assert claims.tokens is not None
    assert claims.tokens[0][0, 0] == ground.victims[0][5]


@pytest.mark.parametrize("preset", ["hardened", "throughput"])
@pytest.mark.parametrize("row", ["table", "drifted"])
def test_a_dense_key_leaves_no_fingerprint(ground: Any, preset: str, row: str) -> None:
    claims = attack("B").run(ground.view(preset, row))
    assert claims.residual is None
    assert claims.figures["rows matched"] == 0
    metric = top1(ground, preset, row, claims)
    assert metric.measured.value <= metric.prior.high


@pytest.mark.parametrize("preset", ["paper", "hardened", "throughput"])
def test_a_server_without_a_table_guesses_what_is_commonest(ground: Any, preset: str) -> None:
    claims = attack("B").run(ground.view(preset, "server"))
    assert claims.residual is None
    metric = top1(ground, preset, "server", claims)
    assert metric.measured.value <= metric.prior.high


def signed(view: View, generator: np.random.Generator) -> tuple[View, Any]:
    """The same rows with some of the features negated, as keys with signs do."""
    signs = generator.choice([-1.0, 1.0], view.entry.rows.shape[1]).astype(np.float32)
    return replace(view, victims=[replace(seen, rows=seen.rows * signs) for seen in view.victims]), signs


def test_signs_hide_nothing(ground: Any) -> None:
    view, signs = signed(ground.view("paper", "table"), np.random.default_rng(3))
    claims = attack("B").run(view)
    assert top1(ground, "paper", "table", claims).measured.value >= 0.99
    np.testing.assert_array_equal(claims.residual, signs[:, None] * ground.truth("paper").residual)


def test_learned_positions_hide_nothing_from_who_knows_them(ground: Any, tmp_path: Path) -> None:
    known = relatives.protected(ground, relatives.tiny("gpt2", tmp_path / "plain"), tmp_path / "made", "paper")
    texts = relatives.texts(4)
    claims = attack("B").run(relatives.view(known, texts))
    assert claims.tokens is not None
    assert relatives.read(claims.tokens, texts) == 1
    np.testing.assert_array_equal(claims.residual, known.residual)


def test_a_table_of_another_width_matches_nothing(ground: Any) -> None:
    view = ground.view("paper", "server")
    claims = attack("B").run(replace(view, entry=Entry(view.entry.rows[:, :100], None, float("inf"))))
    assert claims.figures["rows matched"] == 0


def test_the_nearest_rows_come_first_and_as_many_as_there_are() -> None:
    table = np.array([[0.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
    found, distances = matching.nearest(np.array([[0.9, 0.0]]), table, 5)
    assert found.tolist() == [[2, 0, 1]]
    np.testing.assert_allclose(distances, [[0.1, 0.9, 2.1]])
    assert matching.nearest(np.zeros((0, 2)), table, 2)[0].shape == (0, 2)


def test_a_column_goes_to_one_place_only() -> None:
    rows = np.array([[1.0, 5.0], [2.0, 6.0]])
    key = matching.signed_permutation(rows, np.column_stack([-rows[:, 1], -rows[:, 1] + 0.1]))
    np.testing.assert_array_equal(key, [[0, -1], [0, 0]])
