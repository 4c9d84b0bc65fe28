"""Every family and preset is certified, and the certificate of none passes with a key left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stip_keyservice.protect.equivalence.certificate import BOUNDS

from .decoders import DECODERS
from .laying import lay_out

Store = Callable[[str, torch.dtype], Path]
LAYER_1 = re.compile(r"\.(layers|h)\.1\.")
CASES = [(name, preset) for name, decoder in DECODERS.items() for preset in decoder.presets]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The checkpoint folder of a decoder in a dtype, made on first use."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def store(name: str, dtype: torch.dtype) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = DECODERS[name].store(tmp_path_factory.mktemp(name), dtype)
        return made[name, dtype]

    return store


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_a_protected_decoder_is_certified(stored: Store, name: str, preset: str, tmp_path: Path) -> None:
    found = lay_out(stored(name, torch.float32), tmp_path, preset).certify()
    assert found.passed
    assert found.top1 == 1.0
    assert found.relative_rms < 5e-6
    assert [layer.name for layer in found.layers] == ["entry", "layer 0", "layer 1", "final norm"]
    for layer in found.layers:
        assert layer.differences.relative_rms < 5e-6, layer.name
        assert layer.differences.spread > 0.05, layer.name


@pytest.mark.parametrize(("name", "preset"), CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_it_is_certified_in_other_dtypes(stored: Store, name: str, preset: str, dtype: str, tmp_path: Path) -> None:
    found = lay_out(stored(name, getattr(torch, dtype)), tmp_path, preset).certify()
    assert found.passed
    assert found.bound <= BOUNDS[dtype]
    assert (found.native is not None) == (dtype == "bfloat16")


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_it_is_not_certified_with_a_key_left_out(stored: Store, name: str, preset: str, tmp_path: Path) -> None:
    """One incidence of the second layer's block, as an example: a plan's mutants are tested where plans are."""
    whole = lay_out(stored(name, torch.float32), tmp_path / "whole", preset)
    incidence = next(
        incidence
        for incidence in whole.planned.incidences
        if incidence.space == "residual" and incidence.side == "writes" and LAYER_1.search(incidence.tensor)
    )
    broken = lay_out(stored(name, torch.float32), tmp_path / "broken", preset, mutate=incidence).certify()
    assert not broken.passed
    assert broken.departs == "layer 1"
