"""E: two instances of one model are one to whoever has both server parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks import linking
from stip_keyservice.audit.claims import NO_GUESS
from stip_keyservice.audit.traffic import observe
from stip_keyservice.audit.view import NotApplicable, Sibling
from tests.audit.attacks import relatives
from tests.audit.attacks.relatives import cosine

PRESETS = ["paper", "hardened", "throughput"]


def right(tokens: Any, said: Any) -> Any:
    return np.concatenate([guess[:, 0] == text[:-1] for guess, text in zip(tokens, said, strict=True)])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_key_of_one_over_the_other_and_every_token_of_the_dictionary_are_found(ground: Any, preset: str) -> None:
    claims = linking.run(ground.view(preset, "sibling"))
    between = ground.truth(preset).residual @ ground.truth(preset, 1).residual.T
    assert claims.relative
    assert claims.residual is not None
    assert claims.tokens is not None
    assert cosine(claims.residual, between) > 0.9999
    labelled = np.unique(np.concatenate([text[:-1] for text in ground.helped]))
    inside = np.isin(np.concatenate([text[:-1] for text in ground.victims]), labelled)
    assert right(claims.tokens, ground.victims)[inside].all()
    assert inside.mean() > 0.5


def test_labels_there_name_the_permuted_ids_here(ground: Any) -> None:
    claims, known = linking.run(ground.view("throughput", "sibling")), ground.truth("throughput")
    assert claims.vocabulary is not None
    assert known.vocabulary is not None
    named = claims.vocabulary != NO_GUESS
    labelled = np.unique(np.concatenate([text[:-1] for text in ground.helped]))
    np.testing.assert_array_equal(claims.vocabulary[named], known.vocabulary[named])
    assert sorted(claims.vocabulary[named]) == labelled.tolist()


@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_learned_positions_are_told_from_tokens(ground: Any, tmp_path: Path, preset: str) -> None:
    plain = relatives.tiny("gpt2", tmp_path / "plain")
    known, twin = (relatives.protected(ground, plain, tmp_path / name, preset) for name in ("one", "two"))
    labelled = [observe(twin, text, relatives.PROMPT) for text in relatives.texts(60)]
    said = relatives.texts(64)[60:]
    claims = linking.run(relatives.view(known, said, sibling=Sibling(twin.server, labelled)))
    assert claims.residual is not None
    assert claims.tokens is not None
    assert cosine(claims.residual, known.residual @ twin.residual.T) > 0.9999
    assert right(claims.tokens, said).mean() > 0.99


def test_positions_that_nobody_labelled_are_taken_for_the_last_one_that_was(ground: Any, tmp_path: Path) -> None:
    plain = relatives.tiny("gpt2", tmp_path / "plain")
    known, twin = (relatives.protected(ground, plain, tmp_path / name, "hardened") for name in ("one", "two"))
    labelled = [observe(twin, text[: relatives.LENGTH // 2], relatives.PROMPT) for text in relatives.texts(160)]
    said = relatives.texts(164)[160:]
    claims = linking.run(relatives.view(known, said, sibling=Sibling(twin.server, labelled)))
    assert claims.tokens is not None
    behind = relatives.LENGTH // 2 + 1
    far = [guess[behind:] for guess in claims.tokens]
    assert right(far, [text[behind:] for text in said]).mean() > 0.5


def test_an_instance_of_an_unrelated_model_links_to_nothing(ground: Any, tmp_path: Path) -> None:
    stranger = relatives.unrelated(ground.plain, tmp_path / "plain")
    twin = relatives.protected(ground, stranger, tmp_path / "made", "hardened")
    labelled = [observe(twin, text, 24) for text in ground.helped[:8]]
    view = replace(ground.view("hardened"), sibling=Sibling(twin.server, labelled))
    claims = linking.run(view)
    assert claims.residual is not None
    assert claims.tokens is not None
    assert abs(cosine(claims.residual, ground.truth("hardened").residual @ twin.residual.T)) < 0.1
    assert right(claims.tokens, ground.victims).mean() < 2 * relatives.commonest(ground.victims)


def test_without_another_instance_there_is_nothing_to_link(ground: Any) -> None:
    with pytest.raises(NotApplicable, match="no other instance"):
        linking.run(ground.view("hardened"))
