"""Rows that a user labels are the same rows in everybody's sessions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks import attack
from stip_keyservice.audit.claims import NO_GUESS
from stip_keyservice.audit.traffic import observe
from stip_keyservice.audit.view import Accomplice, NotApplicable
from tests.audit.attacks import relatives

PRESETS = ["paper", "hardened", "throughput"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_token_that_was_labelled_is_read(ground: Any, preset: str) -> None:
    view = ground.view(preset, "accomplice")
    claims = attack("L").run(view)
    assert claims.tokens is not None
    labelled = np.unique(np.concatenate([each.ids for each in view.accomplice.labelled]))
    guesses = np.concatenate([each[:, 0] for each in claims.tokens])
    true = np.concatenate([text[:-1] for text in ground.victims])
    known = np.isin(true, labelled)
    assert known.mean() > 0.6
    np.testing.assert_array_equal(guesses[known], true[known])
    assert not np.isin(guesses[~known], labelled).any()


def test_the_curve_rises_with_the_price_up_to_all_there_is(ground: Any) -> None:
    view = ground.view("hardened", "accomplice")
    claims = attack("L").run(view)
    assert [point.x for point in claims.points] == [10, 100, 1000, sum(len(e.ids) for e in view.accomplice.labelled)]
    texts = [text[:-1] for text in ground.victims]
    read = [
        np.mean(np.concatenate([guess[:, 0] == text for guess, text in zip(point.tokens, texts, strict=True)]))
        for point in claims.points
    ]
    assert read == sorted(read)
    assert read[0] < read[-1]


def test_the_operator_of_throughput_learns_the_vocabulary_as_far_as_it_was_used(ground: Any) -> None:
    vocabulary = attack("L").run(ground.view("throughput", "accomplice")).vocabulary
    assert vocabulary is not None
    found = vocabulary != NO_GUESS
    assert 0.1 < found.mean() < 0.9
    np.testing.assert_array_equal(vocabulary[found], ground.truth("throughput").vocabulary[found])


def test_under_learned_positions_a_label_holds_for_its_position_only(ground: Any, tmp_path: Path) -> None:
    known = relatives.protected(ground, relatives.tiny("gpt2", tmp_path / "plain"), tmp_path / "made", "hardened")
    text = relatives.texts(1)[0]
    helper = Accomplice([observe(known, text, relatives.PROMPT)], lambda seen: seen.asked)
    moved = np.concatenate([text[1:], text[:1]])
    claims = attack("L").run(relatives.view(known, [text, moved], accomplice=helper))
    assert claims.tokens is not None
    assert relatives.read(claims.tokens[:1], [text]) == 1
    assert relatives.read(claims.tokens[1:], [moved]) < 0.2


def test_without_a_user_who_helps_no_row_has_a_label(ground: Any) -> None:
    with pytest.raises(NotApplicable, match="no user of the instance helps"):
        attack("L").run(ground.view("hardened", "server"))


def test_a_user_without_sessions_labels_nothing(ground: Any) -> None:
    view = ground.view("hardened", "accomplice")
    with pytest.raises(NotApplicable, match="had no session"):
        attack("L").run(replace(view, accomplice=replace(view.accomplice, labelled=[])))
