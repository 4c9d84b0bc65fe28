"""N: an enclave that holds a tied model's two tables holds its residual key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stip_keyservice.audit import metrics
from stip_keyservice.audit.attacks import tied_table
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.truth import Truth
from stip_keyservice.audit.view import NotApplicable
from tests.audit.attacks import relatives

FINAL = {"llama": "model.norm.weight", "gpt2": "transformer.ln_f.weight"}


def tied(family: str, folder: Path, dtype: torch.dtype = torch.float32, gains: Any = None) -> Network:
    """A tied model whose final norm has weights that differ, unless told otherwise."""
    plain = relatives.tiny(family, folder, tied=True, dtype=dtype)
    final = plain.model.state_dict()[FINAL[family]]
    spread = torch.linspace(0.5, 2, len(final))[torch.randperm(len(final), generator=torch.Generator().manual_seed(1))]
    final.copy_(spread if gains is None else gains)
    plain.model.to(dtype).save_pretrained(folder)
    return Network(folder)


def broken(known: Truth) -> Mapping[str, Any]:
    """What lies in its enclave's memory."""
    held = {"embedding": known.keyed.rows}
    return held if known.head is None else held | {"head": known.head}


def axes(claims: Any, known: Truth) -> Any:
    assert claims.unordered
    assert claims.residual is not None
    return metrics.cosines(metrics.axes_in_order(claims.residual, known.residual), known.residual)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.95), (torch.bfloat16, 0.9)])  # keys differ by run
def test_every_axis_of_a_dense_key_is_found(
    ground: Any, tmp_path: Path, family: str, dtype: torch.dtype, least: float
) -> None:
    known = relatives.protected(ground, tied(family, tmp_path / "plain", dtype), tmp_path / "made", "hardened")
    claims = tied_table.run(relatives.view(known, relatives.texts(1), enclave=broken(known)))
    assert axes(claims, known).mean() > least
    assert claims.figures["axes told apart"] > 0.95


def test_axes_of_equal_gains_are_not_told_apart_and_the_attack_says_so(ground: Any, tmp_path: Path) -> None:
    gains = torch.tensor([1.0] * 24 + [1.5 + step / 16 for step in range(24)])
    known = relatives.protected(ground, tied("llama", tmp_path / "plain", gains=gains), tmp_path / "made", "hardened")
    claims = tied_table.run(relatives.view(known, relatives.texts(1), enclave=broken(known)))
    assert claims.figures["axes told apart"] == pytest.approx(0.5, abs=0.05)
    assert (axes(claims, known) > 0.99).sum() == 24


def test_a_norm_that_scales_nothing_leaves_no_axes(ground: Any, tmp_path: Path) -> None:
    plain = tied("llama", tmp_path / "plain", gains=torch.ones(48))
    known = relatives.protected(ground, plain, tmp_path / "made", "hardened")
    with pytest.raises(NotApplicable, match="value for value"):
        tied_table.run(relatives.view(known, relatives.texts(1), enclave=broken(known)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_of_its_own_gives_nothing(ground: Any, tmp_path: Path, family: str) -> None:
    known = relatives.protected(ground, relatives.tiny(family, tmp_path / "plain"), tmp_path / "made", "hardened")
    with pytest.raises(NotApplicable, match="not tied"):
        tied_table.run(relatives.view(known, relatives.texts(1), enclave=broken(known)))


def test_the_bundled_models_head_is_not_tied(ground: Any) -> None:
    with pytest.raises(NotApplicable, match="not tied"):
        tied_table.run(replace(ground.view("hardened"), enclave=broken(ground.truth("hardened"))))


def test_permutations_fold_no_norm_to_tell_axes_by(ground: Any, tmp_path: Path) -> None:
    known = relatives.protected(ground, tied("llama", tmp_path / "plain"), tmp_path / "made", "paper")
    with pytest.raises(NotApplicable, match="no head"):
        tied_table.run(relatives.view(known, relatives.texts(1), enclave=broken(known)))


def test_two_tables_on_a_server_are_judged_as_in_an_enclave(ground: Any) -> None:
    with pytest.raises(NotApplicable, match="not tied"):
        tied_table.run(ground.view("throughput"))


def test_a_server_without_tables_has_nothing_to_fit(ground: Any) -> None:
    with pytest.raises(NotApplicable, match="nobody but the enclave"):
        tied_table.run(ground.view("hardened"))
