"""A network with its norms folded is the same network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stip_keyservice.audit.attacks.folded import fold, names_of, unfold
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.view import NotApplicable
from tests.audit.attacks import relatives


def logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(model(input_ids=torch.from_numpy(np.stack(relatives.texts(2)))).logits.numpy())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folded_model_computes_what_its_source_computes(tmp_path: Path, family: str) -> None:
    plain = relatives.tiny(family, tmp_path)
    np.testing.assert_allclose(logits(unfold(fold(plain), plain)), logits(plain.model), atol=1e-4)


def test_a_folded_model_has_the_layers_that_it_is_given(tmp_path: Path) -> None:
    plain = relatives.tiny("llama", tmp_path)
    folded = fold(plain)
    swapped = replace(folded, layers=folded.layers[::-1])
    assert np.abs(logits(unfold(swapped, plain)) - logits(plain.model)).max() > 0.1


def test_folding_leaves_the_source_as_it_was(tmp_path: Path) -> None:
    plain = relatives.tiny("gpt2", tmp_path)
    before = logits(plain.model)
    unfold(fold(plain), plain)
    np.testing.assert_array_equal(logits(plain.model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_head_is_the_table_behind_the_final_norm(tmp_path: Path, family: str) -> None:
    plain = relatives.tiny(family, tmp_path, tied=True)
    folded = fold(plain)
    assert folded.head is not None
    np.testing.assert_allclose(folded.head.weight, plain.embedding * folded.gain, rtol=1e-6)


def test_a_server_part_without_a_head_has_none(ground: Any) -> None:
    assert fold(ground.truth("hardened").server).head is None


def test_a_family_whose_names_are_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(NotApplicable, match="not for gemma2"):
        names_of(Network(tmp_path))
