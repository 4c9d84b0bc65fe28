"""The attacker's own model: the same for the same text and seed, and it has learned something of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit import surrogate
from stip_keyservice.audit.network import CompleteModel, Network
from stip_keyservice.audit.view import Ids

VOCABULARY, LENGTH = 61, 33


def said(texts: int, seed: int) -> list[Ids]:
    """Texts in which nine of ten ids follow from the one before."""
    draw = np.random.default_rng(seed)
    order = np.random.default_rng(0).permutation(VOCABULARY)
    ids = draw.integers(VOCABULARY, size=(texts, LENGTH))
    for position in range(1, LENGTH):
        follows = draw.random(texts) < 0.9
        ids[follows, position] = order[ids[follows, position - 1]]
    return list(ids)


def trained(folder: Path, seed: int = 0, **changes: Any) -> Network:
    sizes: dict[str, Any] = {"width": 48, "vocabulary": VOCABULARY, "positions": 64, "passes": 4}
    return surrogate.train(said(128, seed=1), folder, **(sizes | changes), seed=seed)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return trained(tmp_path_factory.mktemp("own"), passes=16)


def test_it_knows_what_comes_next_in_text_that_it_never_saw(own: Network) -> None:
    right = [CompleteModel(own.model).logits(text[:-1]).argmax(axis=1) == text[1:] for text in said(8, seed=2)]
    assert np.concatenate(right).mean() > 0.7


def test_the_same_text_and_seed_give_the_same_model_and_another_seed_another(tmp_path: Path) -> None:
    first, again, other = (trained(tmp_path / str(number), seed=seed) for number, seed in enumerate((0, 0, 1)))
    np.testing.assert_array_equal(first.embedding, again.embedding)
    assert np.abs(first.embedding - other.embedding).max() > 0


@pytest.mark.parametrize("width", [18, 50, 192])
def test_it_is_as_wide_as_the_instance(tmp_path: Path, width: int) -> None:
    made = trained(tmp_path, width=width, passes=1)
    assert made.embedding.shape == (VOCABULARY, width)
    assert np.isfinite(CompleteModel(made.model).logits(said(1, seed=3)[0])).all()


def test_its_training_is_bounded_however_wide_it_is() -> None:
    for width in (64, 192, 1024):
        model = surrogate._fresh(width, 4096, 128, 0)
        weights = sum(each.numel() for each in model.parameters())
        assert 6 * weights * surrogate._most_steps(model, 1000) * 1000 <= surrogate.WORK
