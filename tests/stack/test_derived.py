"""A model derived from a public one: tuned, whole, the same again, and honest about how far it went."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_protocol.errors import ConfigurationError
from stip_stack.derived import DRIFT, Recipe, derive

BASE = Path(__file__).parents[2] / "stack" / "demo_model"
SHORT = Recipe(steps=3, rows=2, window=24)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.md"
    path.write_text("Every part checks what comes in before it allocates. " * 40)
    return path


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Tuning leaves the process's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def test_every_weight_may_move_and_the_distance_is_what_was_said(tmp_path: Path, text: Path) -> None:
    drift = derive(BASE, [text], tmp_path / "tuned", SHORT)
    before, after = (load_file(folder / "model.safetensors") for folder in (BASE, tmp_path / "tuned"))
    assert before.keys() == after.keys()
    moved = {name: float((after[name] - before[name]).norm() / before[name].norm()) for name in before}
    assert all(share > 0 for share in moved.values())
    assert drift.largest == pytest.approx(max(moved[name] for name in before if before[name].ndim == 2), rel=1e-4)
    whole = math.hypot(*(float((after[name] - before[name]).norm()) for name in before))
    assert drift.whole == pytest.approx(whole / math.hypot(*(float(each.norm()) for each in before.values())), rel=1e-4)
    assert 0 < drift.whole < 0.1
    assert drift.loss_after < drift.loss_before
    assert json.loads((tmp_path / "tuned" / DRIFT).read_text()) == asdict(drift)


def test_the_folder_is_a_checkpoint_with_its_tokenizer(tmp_path: Path, text: Path) -> None:
    derive(BASE, [text], tmp_path / "tuned", SHORT)
    opened = Checkpoint.open(tmp_path / "tuned")
    assert opened.config["vocab_size"] == Checkpoint.open(BASE).config["vocab_size"]
    assert (tmp_path / "tuned" / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(tmp_path: Path, text: Path) -> None:
    weights = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        derive(BASE, [text], tmp_path / name, Recipe(steps=3, rows=2, window=24, seed=seed))
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_less_than_a_window_of_text_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    text = tmp_path / "text.md"
    text.write_text("Too little.")
    with pytest.raises(ConfigurationError, match="allowed: at least 24"):
        derive(BASE, [text], tmp_path / "tuned", SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["text.md"]
