"""A cache shows tokens to whoever has the base, whatever keys are on it; and to nobody else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stip_keyservice.audit.attacks import attack
from stip_keyservice.audit.claims import Claims
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.view import Entry, NotApplicable, View

PRESETS = ["paper", "hardened", "throughput"]
SESSIONS = 3


def few(view: View) -> View:
    return replace(view, victims=view.victims[:SESSIONS])


@pytest.fixture(scope="module")
def claims(ground: Any) -> Callable[[str], Claims]:
    return cache(lambda preset: attack("H").run(few(ground.view(preset, "base"))))


def read(ground: Any, tokens: Any) -> float:
    return float(np.mean([guesses[:, 0] == text[:-1] for guesses, text in zip(tokens, ground.victims, strict=False)]))


def moved(ground: Any, folder: Path, drift: float) -> Network:
    """The plain model with every entry moved by `drift` of its tensor's standard deviation; 1 leaves little of it."""
    generator, model = torch.Generator().manual_seed(1), copy.deepcopy(ground.plain.model)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn(each.shape, generator=generator) * each.std() * drift)
    model.save_pretrained(folder)
    return Network(folder)


@pytest.mark.parametrize("preset", PRESETS)
def test_with_the_base_every_token_is_read(ground: Any, claims: Callable[[str], Claims], preset: str) -> None:
    tokens = claims(preset).tokens
    assert tokens is not None
    assert read(ground, tokens) > 0.99


@pytest.mark.parametrize("preset", PRESETS)
def test_inverting_one_layers_values_is_enough(ground: Any, claims: Callable[[str], Claims], preset: str) -> None:
    by_length = claims(preset).points[0]
    assert by_length.curve == "layers of the cache, inverted"
    assert read(ground, by_length.tokens) > 0.99


@pytest.mark.parametrize("preset", ["hardened", "throughput"])
def test_inversion_as_published_is_stopped_by_a_dense_key(
    ground: Any, claims: Callable[[str], Claims], preset: str
) -> None:
    published = claims(preset).points[1]
    assert "blind to keys" in published.curve
    assert read(ground, published.tokens) < 0.06


def test_a_base_that_was_tuned_since_still_reads_most(ground: Any, tmp_path: Path) -> None:
    view, base = few(ground.view("hardened", "base")), moved(ground, tmp_path, 0.03)
    claims = attack("H").run(replace(view, base=base, entry=Entry(base.embedding, None, 0.03)))
    assert claims.tokens is not None
    assert read(ground, claims.points[0].tokens) < 0.9  # lengths alone drift, too
    assert read(ground, claims.tokens) > 0.95


def test_an_unrelated_base_reads_nothing(ground: Any, tmp_path: Path) -> None:
    torch.manual_seed(9)
    made: Any = type(ground.plain.model)
    made(ground.plain.model.config).save_pretrained(tmp_path)
    unrelated, view = Network(tmp_path), few(ground.view("hardened", "base"))
    claims = attack("H").run(replace(view, base=unrelated, entry=Entry(unrelated.embedding, None, 0.0)))
    assert claims.tokens is not None
    assert read(ground, claims.tokens) < 0.06


def test_a_base_of_another_shape_is_none(ground: Any) -> None:
    view = few(ground.view("hardened", "base"))
    with pytest.raises(NotApplicable, match="layers or heads"):
        attack("H").run(replace(view, base=ground.surrogate))


@pytest.mark.parametrize("preset", PRESETS)
def test_without_a_base_there_is_nothing_to_compare_with(ground: Any, preset: str) -> None:
    with pytest.raises(NotApplicable, match="base's weights"):
        attack("H").run(ground.view(preset, "table"))
