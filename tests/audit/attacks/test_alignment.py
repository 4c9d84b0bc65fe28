"""D: who has the public base has the residual key, and with it every prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks import alignment
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.view import Entry, NotApplicable
from tests.audit.attacks import relatives
from tests.audit.attacks.relatives import cosine, read

PRESETS = ["paper", "hardened", "throughput"]


@pytest.fixture(scope="module")
def aligned(ground: Any) -> Callable[[str], Claims]:
    """What the attack claims of an instance whose source is public."""
    return cache(lambda preset: alignment.run(ground.view(preset, "base")))


@pytest.fixture(scope="module")
def fine_tune(ground: Any, tmp_path_factory: pytest.TempPathFactory) -> Network:
    return relatives.trained_further(ground.plain, tmp_path_factory.mktemp("fine-tune"), ground.public)


def based(ground: Any, preset: str, base: Network) -> Any:
    """Its operator believes that the instance derives from `base`, and has nothing else."""
    return replace(ground.view(preset), base=base, entry=Entry(base.embedding, None, 0.1))


@pytest.mark.parametrize("preset", PRESETS)
def test_with_the_base_itself_the_key_and_every_token_are_found(ground: Any, aligned: Any, preset: str) -> None:
    claims, known = aligned(preset), ground.truth(preset)
    assert claims.residual is not None
    assert claims.tokens is not None
    assert cosine(claims.residual, known.residual) > 0.9999
    assert read(claims.tokens, ground.victims) == 1.0


def test_the_permutation_of_paper_is_found_entry_by_entry(ground: Any, aligned: Any) -> None:
    claims = aligned("paper")
    np.testing.assert_array_equal(claims.residual, ground.truth("paper").residual)


@pytest.mark.parametrize("preset", ["paper", "throughput"])
def test_the_order_of_the_servers_vocabulary_is_found_from_its_head(ground: Any, aligned: Any, preset: str) -> None:
    claims = aligned(preset)
    np.testing.assert_array_equal(claims.vocabulary, ground.truth(preset).vocabulary)


def test_no_vocabulary_is_claimed_where_no_server_sees_one(aligned: Any) -> None:
    assert aligned("hardened").vocabulary is None


@pytest.mark.long
@pytest.mark.parametrize("preset", ["paper", "hardened"])
@pytest.mark.parametrize("drift", [0.01, 0.1])
def test_a_base_that_every_weight_drifted_from_will_do(ground: Any, tmp_path: Path, preset: str, drift: float) -> None:
    claims = alignment.run(based(ground, preset, relatives.drifted(ground.plain, tmp_path, drift)))
    assert claims.residual is not None
    assert claims.tokens is not None
    assert cosine(claims.residual, ground.truth(preset).residual) > 0.999
    assert read(claims.tokens, ground.victims) > 0.99


@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_a_fine_tune_of_one_is_read_with_the_other(ground: Any, fine_tune: Network, preset: str) -> None:
    claims = alignment.run(based(ground, preset, fine_tune))
    assert claims.residual is not None
    assert claims.tokens is not None
    assert cosine(claims.residual, ground.truth(preset).residual) > 0.999
    assert read(claims.tokens, ground.victims) > 0.99


@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_a_model_of_the_same_shape_with_other_weights_gives_nothing(ground: Any, tmp_path: Path, preset: str) -> None:
    stranger = relatives.unrelated(ground.plain, tmp_path)
    claims = alignment.run(replace(ground.view(preset, "table"), base=stranger))
    assert claims.residual is not None
    assert claims.tokens is not None
    assert abs(cosine(claims.residual, ground.truth(preset).residual)) < 0.1
    assert claims.figures["cosine of matched rows"] < alignment.SAME
    assert read(claims.tokens, ground.victims) < 2 * relatives.commonest(ground.victims)


@pytest.mark.long
@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_layer_norms_and_learned_positions_change_nothing(ground: Any, tmp_path: Path, preset: str) -> None:
    plain = relatives.tiny("gpt2", tmp_path / "plain")
    known = relatives.protected(ground, plain, tmp_path / "made", preset)
    said = relatives.texts(4)
    claims = alignment.run(relatives.view(known, said, base=plain))
    assert claims.residual is not None
    assert claims.tokens is not None
    assert cosine(claims.residual, known.residual) > 0.9999
    assert read(claims.tokens, said) == 1.0


@pytest.mark.long
def test_the_same_view_gives_the_same_claims(ground: Any, aligned: Any) -> None:
    again = alignment.run(ground.view("hardened", "base"))
    np.testing.assert_array_equal(again.residual, aligned("hardened").residual)


def test_guesses_are_ten_different_tokens_a_position(ground: Any, aligned: Any) -> None:
    claims = aligned("paper")
    assert claims.tokens is not None
    for guesses, text in zip(claims.tokens, ground.victims, strict=True):
        assert guesses.shape == (len(text) - 1, alignment.GUESSES)
        assert all(len(set(row)) == alignment.GUESSES for row in guesses)


def test_the_server_alone_has_nothing_to_align_to(ground: Any) -> None:
    with pytest.raises(NotApplicable, match="no public model"):
        alignment.run(ground.view("hardened"))


def test_a_base_of_another_shape_is_no_base(ground: Any) -> None:
    with pytest.raises(NotApplicable, match="differ in shape"):
        alignment.run(replace(ground.view("hardened"), base=ground.surrogate))
