"""An orthogonal key keeps lengths and inner products, and with a known table that is everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks import attack, matching
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.scoring import Judge
from stip_keyservice.audit.view import Entry
from tests.audit.attacks import relatives

PRESETS = ["paper", "hardened", "throughput"]


def top1(ground: Any, preset: str, row: str, claims: Claims) -> Any:
    return next(each for each in Judge(ground.material(preset, row)).score(claims).metrics if each.name == "token_top1")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("row", ["table", "drifted"])
def test_a_known_table_reads_every_prompt_under_every_preset_and_gives_the_key(
    ground: Any, preset: str, row: str
) -> None:
    claims = attack("C").run(ground.view(preset, row))
    assert top1(ground, preset, row, claims).measured.value >= 0.99
    assert claims.residual is not None
    assert np.mean((claims.residual * ground.truth(preset).residual).sum(axis=0)) > 0.98


def test_the_base_of_a_model_is_a_known_table(ground: Any) -> None:
    claims = attack("C").run(ground.view("hardened", "base"))
    assert top1(ground, "hardened", "base", claims).measured.value >= 0.99


@pytest.mark.parametrize("row", ["table", "drifted"])
def test_a_table_on_the_server_gives_the_vocabulary_without_traffic(ground: Any, row: str) -> None:
    claims = attack("C").run(ground.view("throughput", row))
    np.testing.assert_array_equal(claims.vocabulary, ground.truth("throughput").vocabulary)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_server_without_a_table_guesses_what_is_commonest(ground: Any, preset: str) -> None:
    claims = attack("C").run(ground.view(preset, "server"))
    assert claims.residual is None
    metric = top1(ground, preset, "server", claims)
    assert metric.measured.value <= metric.prior.high


def test_the_curves_show_lengths_alone_and_a_first_token_that_nobody_knows(ground: Any) -> None:
    blind = []
    for preset in ("hardened", "paper"):
        view = ground.view(preset, "drifted")
        scores = Judge(ground.material(preset, "drifted")).score(attack("C").run(view))
        curves = {(point.curve, point.x): point.measured.value for point in scores.points}
        assert curves["rows compared at a time", 1.0] < 0.1  # drift hides lengths
        blind.append(curves["known first tokens", 0.0])
    # All or nothing, by the keys that were drawn: about one instance in twenty keeps a search without an anchor out.
    assert max(blind) >= 0.99


def test_a_wrong_first_token_is_no_obstacle(ground: Any) -> None:
    view = ground.view("hardened", "table")
    wrong = [np.concatenate([[7], text[1:]]) for text in view.public_text]
    claims = attack("C").run(replace(view, public_text=wrong))
    assert top1(ground, "hardened", "table", claims).measured.value >= 0.99


@pytest.mark.long
@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_learned_positions_and_dropped_means_are_no_obstacle(ground: Any, tmp_path: Path, preset: str) -> None:
    known = relatives.protected(ground, relatives.tiny("gpt2", tmp_path / "plain"), tmp_path / "made", preset)
    texts = relatives.texts(8)
    claims = attack("C").run(relatives.view(known, texts))
    assert claims.tokens is not None
    assert relatives.read(claims.tokens, texts) >= 0.99


def test_rows_rounded_to_bfloat16_are_no_obstacle(ground: Any) -> None:
    view = ground.view("hardened", "table")

    def rounded(rows: Any) -> Any:
        bits = rows.astype(np.float32).view(np.uint32)
        return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)

    claims = attack("C").run(replace(view, victims=[replace(seen, rows=rounded(seen.rows)) for seen in view.victims]))
    assert top1(ground, "hardened", "table", claims).measured.value >= 0.99


def test_a_table_of_another_width_explains_nothing(ground: Any) -> None:
    view = ground.view("hardened", "server")
    claims = attack("C").run(replace(view, entry=Entry(view.entry.rows[:, :100], None, float("inf"))))
    assert claims.figures["rows explained"] == 0


def test_procrustes_finds_the_key_of_matched_rows() -> None:
    generator = np.random.default_rng(2)
    key = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    rows = generator.normal(size=(9, 6))
    np.testing.assert_allclose(matching.procrustes(rows, rows @ key.T), key, atol=1e-12)


def test_few_matched_rows_tell_the_key_on_their_span_only() -> None:
    generator = np.random.default_rng(2)
    key = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    rows = generator.normal(size=(9, 6))
    found = matching.align(rows[:2], rows[:2] @ key.T)
    assert found.plain.shape == (6, 2)
    np.testing.assert_allclose(found.plain_features(rows), found.keyed_features(rows @ key.T), atol=1e-6)
    np.testing.assert_allclose(found.key @ rows[0], key @ rows[0], atol=1e-12)
