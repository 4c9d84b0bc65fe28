"""A linear fit finds the key where the attacker's table is the model's, and nothing where it is not; trained models
run, and learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stip_keyservice.audit import matrix
from stip_keyservice.audit.attacks import attack, extraction
from stip_keyservice.audit.attacks.stolen import tabulate
from stip_keyservice.audit.attacks.training import batches, descend
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.traffic import observe
from stip_keyservice.audit.view import Accomplice, NotApplicable, View
from tests.audit.attacks import relatives

NAMES = ["from scratch", "train-transformed", "train-linear"]


def little(view: View, sessions: int = 32) -> View:
    """Few texts, and so few steps of training."""
    assert view.accomplice is not None
    few = replace(view.accomplice, labelled=view.accomplice.labelled[:sessions])
    return replace(view, public_text=view.public_text[:2], victims=view.victims[:3], accomplice=few)


@pytest.fixture(scope="module")
def own(ground: Any) -> Claims:
    """With a table of the attacker's own."""
    return attack("J").run(little(ground.view("hardened", "accomplice")))


@pytest.fixture(scope="module")
def granted(ground: Any) -> Claims:
    """With the model's own table, and next to no training."""
    view = replace(little(ground.view("hardened", "accomplice")), entry=ground.truth("hardened").entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "STEPS", 1)
        return attack("J").run(view)


def errors(claims: Claims) -> dict[int, float]:
    """Of the linear fit, by labelled rows."""
    return {
        int(name.split(", ")[1].split()[0]): value for name, value in claims.figures.items() if "linear fit" in name
    }


def perplexity(ground: Any, stolen: Any) -> float:
    losses = [
        torch.nn.functional.cross_entropy(torch.from_numpy(stolen.logits(text[:-1])), torch.from_numpy(text[1:]))
        for text in ground.victims
    ]
    return float(torch.stack(losses).mean().exp())


def test_with_the_true_table_the_fit_is_exact_beyond_as_many_rows_as_the_width(granted: Claims) -> None:
    found = errors(granted)
    width = 192
    assert all(error < 1e-3 for rows, error in found.items() if rows > width)
    assert all(error > 0.1 for rows, error in found.items() if rows < width)
    assert any(rows > width for rows in found)


def test_the_exact_fit_is_the_residual_key(ground: Any, granted: Claims) -> None:
    assert granted.residual is not None
    np.testing.assert_allclose(granted.residual, ground.truth("hardened").residual, atol=1e-3)


def test_the_exact_fit_reads_every_token_labelled_or_not(ground: Any, granted: Claims) -> None:
    last = granted.points[-1]
    for guesses, text in zip(last.tokens, ground.victims, strict=False):
        assert (guesses[:, 0] == text[:-1]).mean() > 0.99


def test_with_a_table_of_ones_own_no_number_of_rows_helps(own: Claims) -> None:
    assert min(errors(own).values()) > 0.9  # 1 is the error of the mean row
    assert own.residual is None


def test_three_models_are_trained_and_run(ground: Any, own: Claims) -> None:
    assert [name for name, _ in own.stolen] == NAMES
    for _, stolen in own.stolen:
        logits = stolen.logits(ground.victims[0][:-1])
        assert logits.shape == (48, 2048)
        assert np.isfinite(logits).all()


@pytest.mark.parametrize("number", [0, 1], ids=NAMES[:2])
def test_what_is_trained_knows_more_than_nothing(ground: Any, own: Claims, number: int) -> None:
    assert perplexity(ground, own.stolen[number][1]) < 1500  # of 2048 ids, all equally likely


def test_no_trained_model_comes_near_the_plain_one(ground: Any, own: Claims) -> None:
    class Plain:
        logits = staticmethod(lambda ids: ground.plain.logits(ground.plain.rows(ids)))

    assert all(perplexity(ground, stolen) > 5 * perplexity(ground, Plain) for _, stolen in own.stolen)


@pytest.mark.long
def test_training_leaves_the_server_part_as_it_was(ground: Any) -> None:
    view = little(ground.view("paper", "accomplice"), sessions=4)
    before = {name: value.clone() for name, value in view.server.model.state_dict().items()}
    attack("J").run(view)
    for name, value in view.server.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.long
def test_the_same_view_trains_the_same_models(ground: Any) -> None:
    view = little(ground.view("throughput", "accomplice"), sessions=4)
    text = ground.victims[0][:-1]
    once, again = (dict(attack("J").run(view).stolen) for _ in range(2))
    for name in NAMES:
        np.testing.assert_array_equal(once[name].logits(text), again[name].logits(text))


@pytest.mark.long
def test_a_stolen_model_with_dropout_answers_the_same_each_time(ground: Any, tmp_path: Path) -> None:
    known = relatives.protected(ground, relatives.tiny("gpt2", tmp_path / "plain"), tmp_path / "made", "hardened")
    assert known.server.model.config.resid_pdrop > 0
    said = relatives.texts(8)
    own = relatives.tiny("llama", tmp_path / "own", tied=True)
    labelled = [observe(known, text, relatives.PROMPT) for text in said[4:]]
    helping = Accomplice(labelled, matrix.decoder(known))
    view = relatives.view(known, said[:4], accomplice=helping, surrogate=own)
    for name, stolen in attack("J").run(view).stolen:
        np.testing.assert_array_equal(stolen.logits(said[0]), stolen.logits(said[0]), err_msg=name)


@pytest.mark.long
def test_sessions_longer_than_any_that_is_labelled_are_read_where_positions_are_learned(
    ground: Any, tmp_path: Path
) -> None:
    known = relatives.protected(ground, relatives.tiny("gpt2", tmp_path / "plain"), tmp_path / "made", "paper")
    said = relatives.texts(40)
    labelled = [observe(known, text[:10], relatives.PROMPT) for text in said[2:]]
    table = tabulate(relatives.view(known, said[:2]), labelled)
    assert table.positions is not None
    shifts = table.shifts(19)
    np.testing.assert_array_equal(shifts[:9], table.positions)
    assert (shifts[9:] == table.positions[-1]).all()
    own = relatives.tiny("llama", tmp_path / "own", tied=True)
    helping = Accomplice(labelled, matrix.decoder(known))
    view = relatives.view(known, said[:2], accomplice=helping, surrogate=own)
    points = attack("J").run(view).points
    assert points
    assert all(len(point.tokens[0]) == 19 for point in points)


@pytest.mark.parametrize("preset", ["paper", "hardened", "throughput"])
def test_without_a_user_there_is_nothing_to_fit(ground: Any, preset: str) -> None:
    with pytest.raises(NotApplicable, match="no user of this instance"):
        attack("J").run(ground.view(preset))


def test_batches_use_every_piece_before_one_comes_again() -> None:
    texts = [np.arange(10) + 100 * number for number in range(6)]
    made = batches(texts, np.random.default_rng(0), most=100, passes=2, size=3, length=10)
    assert len(made) == 4
    assert {int(row[0]) for step in range(2) for row in made[step]} == {0, 100, 200, 300, 400, 500}


def test_batches_stop_at_the_most() -> None:
    texts = [np.arange(10)] * 30
    assert len(batches(texts, np.random.default_rng(0), most=3, passes=4, size=2, length=5)) == 3


def test_descent_finds_a_minimum() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    goal = torch.tensor([0.5, -1.0, 2.0])
    descend([parameter], lambda step: ((parameter - goal) ** 2).sum(), steps=400, rate=0.05)
    torch.testing.assert_close(parameter.detach(), goal, atol=0.05, rtol=0.05)
