"""Equal rows are a substitution cipher, and its text has the statistics of its language."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks import attack
from stip_keyservice.audit.claims import NO_GUESS
from stip_keyservice.audit.scoring import Judge
from stip_keyservice.audit.view import Ids, NotApplicable, Seen
from tests.audit.attacks import relatives

PRESETS = ["paper", "hardened", "throughput"]


def language(vocabulary: int) -> tuple[list[Ids], list[Ids]]:
    """Texts of a made-up language of 100 words, in which each word is followed by one of three: public, victims'."""
    generator, count = np.random.default_rng(8), 100
    words = np.sort(generator.choice(vocabulary, 100, replace=False))
    followers = generator.integers(100, size=(100, 3))
    current = np.zeros(count, np.int64)
    columns = [current]
    for _ in range(99):
        current = followers[current, generator.choice(3, size=count, p=[0.6, 0.3, 0.1])]
        columns.append(current)
    texts = list(words[np.stack(columns, axis=1)])
    return texts[:80], texts[80:]


@pytest.mark.parametrize("preset", PRESETS)
def test_ranks_and_neighbours_read_more_than_the_commonest_token(ground: Any, preset: str) -> None:
    claims = attack("I").run(ground.view(preset, "server"))
    scores = Judge(ground.material(preset, "server")).score(claims)
    commonest = np.bincount(np.concatenate(ground.public)).argmax()
    share = np.mean(np.concatenate([text[1:-1] for text in ground.victims]) == commonest)
    assert scores.metrics[0].measured.low > share


def test_neighbours_read_a_text_that_ranks_do_not(ground: Any) -> None:
    view = ground.view("throughput", "server")
    public, said = language(view.vocabulary)
    permuted = np.random.default_rng(4).permutation(view.vocabulary)
    victims = [Seen(None, permuted[text], np.arange(len(text))) for text in said]
    claims = attack("I").run(replace(view, victims=victims, public_text=public))
    read = [
        np.mean(np.concatenate([guess[:, 0] == text for guess, text in zip(point.tokens, said, strict=True)]))
        for point in claims.points
    ]
    assert read[0] < 0.3
    assert read[-1] > 0.95
    assert claims.vocabulary is not None
    found = claims.vocabulary != NO_GUESS
    assert np.mean(claims.vocabulary[found] == np.argsort(permuted)[found]) > 0.9


def test_text_without_statistics_is_not_read(ground: Any) -> None:
    view = ground.view("throughput", "server")
    generator = np.random.default_rng(1)
    said = list(generator.integers(view.vocabulary, size=(8, 40)))
    public = list(generator.integers(view.vocabulary, size=(40, 40)))
    victims = [Seen(None, text, np.arange(40)) for text in said]
    claims = attack("I").run(replace(view, victims=victims, public_text=public))
    assert claims.tokens is not None
    read = np.mean(np.concatenate([guess[:, 0] == text for guess, text in zip(claims.tokens, said, strict=True)]))
    assert read < 0.02


def test_the_same_view_gives_the_same_claims(ground: Any) -> None:
    first, second = (attack("I").run(ground.view("hardened", "server")).tokens for _ in range(2))
    assert first is not None
    assert second is not None
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_learned_positions_make_another_cipher_of_each_position(ground: Any, tmp_path: Path) -> None:
    known = relatives.protected(ground, relatives.tiny("gpt2", tmp_path / "plain"), tmp_path / "made", "hardened")
    with pytest.raises(NotApplicable, match="another cipher of each"):
        attack("I").run(relatives.view(known, relatives.texts(8)))
