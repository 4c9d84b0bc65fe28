"""A linear map reads tokens from residual states, blocks later too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks import attack
from stip_keyservice.audit.attacks.training import discriminant
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.view import NotApplicable

PRESETS = ["paper", "hardened", "throughput"]


@pytest.fixture(scope="module")
def claims(ground: Any) -> Callable[[str], Claims]:
    return cache(lambda preset: attack("M").run(ground.view(preset, "accomplice")))


def labelled(ground: Any) -> list[Any]:
    """For each victim's text, which of its fed ids the helping user said too."""
    said = np.unique(np.concatenate([text[:-1] for text in ground.helped]))
    return [np.isin(text[:-1], said) for text in ground.victims]


def read(ground: Any, tokens: Any) -> float:
    """Share of first guesses that are right, where the token was labelled."""
    return float(
        np.mean(
            np.concatenate(
                [
                    guesses[where, 0] == text[:-1][where]
                    for guesses, text, where in zip(tokens, ground.victims, labelled(ground), strict=True)
                ]
            )
        )
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_tokens_that_were_labelled_are_read_at_every_depth(
    ground: Any, claims: Callable[[str], Claims], preset: str
) -> None:
    shares = {point.x: read(ground, point.tokens) for point in claims(preset).points}
    assert shares[0] == 1.0
    assert shares[1] > 0.98
    assert 0.8 < shares[4] <= shares[1]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_claim_is_what_one_block_in_the_enclave_leaves(claims: Callable[[str], Claims], preset: str) -> None:
    one = next(point for point in claims(preset).points if point.x == 1)
    assert claims(preset).tokens is one.tokens


def test_tokens_that_were_not_labelled_are_not_read(ground: Any, claims: Callable[[str], Claims]) -> None:
    tokens = claims("hardened").tokens
    assert tokens is not None
    for guesses, text, where in zip(tokens, ground.victims, labelled(ground), strict=True):
        assert not (guesses[~where] == text[:-1][~where][:, None]).any()


def test_labels_of_another_instance_read_nothing(ground: Any) -> None:
    view = ground.view("hardened", "accomplice")
    elsewhere = replace(view.accomplice, labelled=ground.labelled("hardened", ground.helped, 1))
    swapped = [each.seen for each in ground.labelled("hardened", ground.helped, 1)]
    claims = attack("M").run(
        replace(
            view,
            accomplice=replace(
                elsewhere,
                labelled=[
                    replace(own, seen=replace(own.seen, rows=other.rows))
                    for own, other in zip(view.accomplice.labelled, swapped, strict=True)
                ],
            ),
        )
    )
    rows = next(point for point in claims.points if point.x == 0)
    commonest = np.bincount(np.concatenate(ground.public)).max() / sum(len(text) for text in ground.public)
    assert read(ground, rows.tokens) < commonest + 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_without_labels_there_is_nothing_to_train_on(ground: Any, preset: str) -> None:
    with pytest.raises(NotApplicable, match="no user of this instance"):
        attack("M").run(ground.view(preset))


def test_a_user_who_said_nothing_labels_nothing(ground: Any) -> None:
    view = ground.view("hardened", "accomplice")
    with pytest.raises(NotApplicable, match="had no session"):
        attack("M").run(replace(view, accomplice=replace(view.accomplice, labelled=[])))


def test_a_discriminant_separates_what_is_separable() -> None:
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(5, 8))
    labels = np.repeat(np.array([3, 7, 8, 20, 21]), 40)
    features = (np.repeat(centres, 40, axis=0) + generator.normal(0, 0.05, (200, 8))).astype(np.float32)
    assert (discriminant(features, labels).best(features, 1)[:, 0] == labels).mean() > 0.99


def test_one_label_is_all_that_a_classifier_of_one_example_knows() -> None:
    found = discriminant(np.ones((1, 3), np.float32), np.array([7]))
    np.testing.assert_array_equal(found.best(np.zeros((2, 3), np.float32), 10), [[7], [7]])
