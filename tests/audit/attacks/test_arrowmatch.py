"""F: rows keep no direction under a residual key, and all of them once it is taken off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stip_keyservice.audit.attacks import arrowmatch
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.network import CompleteModel, Network
from stip_keyservice.audit.view import Entry, NotApplicable
from tests.audit.attacks import relatives

PRESETS = ["paper", "hardened", "throughput"]
AS_THEY_ARE, BEHIND, TAKEN = "rows matched as they are", "rows matched behind the key", "taken from the base"


@pytest.fixture(scope="module")
def matched(ground: Any) -> Callable[[str], Claims]:
    """What the attack claims of an instance whose source is public."""
    return cache(lambda preset: arrowmatch.run(ground.view(preset, "base")))


def figures(claims: Any, what: str) -> list[float]:
    return [value for name, value in claims.figures.items() if name.endswith(what)]


def agreement(stolen: Any, plain: Network, said: Any) -> float:
    true = CompleteModel(plain.model)
    return float(np.mean([(stolen.logits(ids).argmax(1) == true.logits(ids).argmax(1)).mean() for ids in said]))


@pytest.mark.parametrize("preset", PRESETS)
def test_as_published_no_row_matches_and_behind_the_key_all_do(matched: Any, preset: str) -> None:
    claims = matched(preset)
    assert figures(claims, AS_THEY_ARE) == [0.0] * 7
    assert min(figures(claims, BEHIND)) > 0.99
    assert min(figures(claims, TAKEN)) > 0.99


@pytest.mark.parametrize("preset", PRESETS)
def test_what_matched_makes_the_plain_model(ground: Any, matched: Any, preset: str) -> None:
    for _, stolen in matched(preset).stolen:
        for ids in ground.victims[:2]:
            np.testing.assert_allclose(stolen.logits(ids), CompleteModel(ground.plain.model).logits(ids), atol=2e-3)


@pytest.mark.long
@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_a_drifted_base_gives_most_of_the_model(ground: Any, tmp_path: Path, preset: str) -> None:
    base = relatives.drifted(ground.plain, tmp_path, 0.05)
    claims = arrowmatch.run(replace(ground.view(preset), base=base, entry=Entry(base.embedding, None, 0.05)))
    assert min(figures(claims, BEHIND)) > 0.95
    prior = agreement(CompleteModel(base.model), ground.plain, ground.victims)
    own, merged = (agreement(stolen, ground.plain, ground.victims) for _, stolen in claims.stolen)
    assert own > 0.8
    assert own >= prior
    assert merged > 0.7


def test_an_unrelated_base_matches_nothing_and_yields_no_model(ground: Any, tmp_path: Path) -> None:
    stranger = relatives.unrelated(ground.plain, tmp_path)
    claims = arrowmatch.run(replace(ground.view("hardened"), base=stranger, entry=Entry(stranger.embedding, None, 0.0)))
    assert max(figures(claims, BEHIND) + figures(claims, TAKEN)) < 0.05
    assert all(agreement(stolen, ground.plain, ground.victims) < 0.1 for _, stolen in claims.stolen)


@pytest.mark.long
@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_layer_norms_biases_and_learned_positions_come_along(ground: Any, tmp_path: Path, preset: str) -> None:
    plain = relatives.tiny("gpt2", tmp_path / "plain")
    known = relatives.protected(ground, plain, tmp_path / "made", preset)
    ids = relatives.texts(1)[0]
    for _, stolen in arrowmatch.run(relatives.view(known, [ids], base=plain)).stolen:
        np.testing.assert_allclose(stolen.logits(ids), CompleteModel(plain.model).logits(ids), atol=2e-3)


def test_what_does_not_match_stays_the_servers_own(ground: Any, tmp_path: Path) -> None:
    """A base with half of its neurons replaced: those are kept, and the model stays whole."""
    model = relatives.drifted(ground.plain, tmp_path / "copy", 0.0).model
    with torch.no_grad():
        for layer in model.model.layers:
            half = layer.mlp.gate_proj.weight[::2]
            half.copy_(torch.randn(half.shape, generator=torch.Generator().manual_seed(relatives.SEED)))
    model.save_pretrained(tmp_path / "base")
    claims = arrowmatch.run(replace(ground.view("hardened", "base"), base=Network(tmp_path / "base")))
    assert claims.figures[f"neurons: {TAKEN}"] == pytest.approx(0.5, abs=0.02)
    ids = ground.victims[0]
    for _, stolen in claims.stolen:
        np.testing.assert_allclose(stolen.logits(ids), CompleteModel(ground.plain.model).logits(ids), atol=5e-3)


def test_without_a_public_model_there_are_no_rows_to_match(ground: Any) -> None:
    with pytest.raises(NotApplicable, match="no public model"):
        arrowmatch.run(ground.view("hardened"))
