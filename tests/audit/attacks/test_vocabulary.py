"""Whoever can run the first layers reads prompts token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks import attack
from stip_keyservice.audit.scoring import Judge
from tests.audit.attacks import relatives


@pytest.mark.parametrize("preset", ["paper", "hardened", "throughput"])
def test_the_public_model_reads_every_prompt_under_every_preset(ground: Any, preset: str) -> None:
    view = ground.view(preset, "base")
    claims = attack("A").run(replace(view, victims=view.victims[:3]))
    assert claims.tokens is not None
    assert relatives.read(claims.tokens, ground.victims[:3]) >= 0.99
    assert claims.figures["sessions read to the end"] == 1


@pytest.mark.parametrize("preset", ["paper", "hardened", "throughput"])
def test_a_model_of_ones_own_is_accepted_nowhere_and_its_guesses_stay_at_the_prior(ground: Any, preset: str) -> None:
    claims = attack("A").run(ground.view(preset, "server"))
    assert claims.figures["positions accepted"] == 0
    metric = Judge(ground.material(preset, "server")).score(claims).metrics[0]
    assert metric.prior is not None
    assert metric.measured.value <= metric.prior.high


def test_a_first_token_that_nobody_knows_is_found_by_sorted_values(ground: Any) -> None:
    view = ground.view("paper", "base")
    texts = [*view.public_text, view.public_text[0][5:]]
    claims = attack("A").run(replace(view, victims=view.victims[:1], public_text=texts))
    assert claims.tokens is not None
    assert relatives.read(claims.tokens, ground.victims[:1]) == 1


@pytest.mark.long
def test_sessions_of_different_lengths_are_read_in_step(ground: Any) -> None:
    view = ground.view("hardened", "base")
    short = replace(view.victims[1], rows=view.victims[1].rows[:9], asked=np.zeros(1, np.int64))
    claims = attack("A").run(replace(view, victims=[view.victims[0], short, view.victims[2]]))
    assert claims.tokens is not None
    assert [len(each) for each in claims.tokens] == [48, 9, 48]
    texts = [ground.victims[0], ground.victims[1][:10], ground.victims[2]]
    assert relatives.read(claims.tokens, texts) >= 0.99


@pytest.mark.long
@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_learned_positions_and_layer_norms_are_no_obstacle(ground: Any, tmp_path: Path, preset: str) -> None:
    plain = relatives.tiny("gpt2", tmp_path / "plain")
    known = relatives.protected(ground, plain, tmp_path / "made", preset)
    texts = [np.concatenate([[3], text]) for text in relatives.texts(3)]
    claims = attack("A").run(replace(relatives.view(known, texts, base=plain), public_text=texts))
    assert claims.tokens is not None
    assert relatives.read(claims.tokens, texts) >= 0.99
