"""A configuration that says more than the tables know is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from stip_keyservice.home import Home
from stip_keyservice.protect.equivalence.verification import verify
from stip_keyservice.protect.instance import protect
from stip_protocol.errors import CheckpointInvalid

from .conftest import Case

GPT2, LLAMA = Case("gpt2", tied=True), Case("llama", tied=False)
DEVELOPER, SEALING = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
Checkpoints = Callable[[Case], Path]


def saying(model: Path, folder: Path, **more: Any) -> Path:
    """A copy of a checkpoint, with more in its configuration."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | more))
    return folder


@pytest.mark.parametrize(
    ("case", "more", "says"),
    [
        (LLAMA, {"is_causal": False}, r"config\.is_causal: got None on the server, allowed: False"),
        (LLAMA, {"sliding_window": 7}, r"config\.sliding_window: got None on the server, allowed: 7"),
        (GPT2, {"num_hidden_layers": 1}, r"config\.n_layer: got 2 on the server, allowed: 1"),
        (LLAMA, {"attention_dropout": "none"}, r"config\.attention_dropout: got .*, allowed: what LlamaConfig takes"),
    ],
)
def test_a_keyword_that_changes_the_model_is_refused_and_nothing_is_written(
    checkpoint_of: Checkpoints, tmp_path: Path, case: Case, more: dict[str, Any], says: str
) -> None:
    model = saying(checkpoint_of(case), tmp_path / "model", **more)
    stages: list[str] = []
    with pytest.raises(CheckpointInvalid, match=says):
        protect(
            model,
            tmp_path / "out",
            preset="hardened",
            developer=DEVELOPER,
            seal_to=SEALING.public_key(),
            progress=lambda stage, done, total: stages.append(stage),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert set(stages) <= {"keys"}


def test_an_instance_is_not_verified_against_a_source_that_means_another_model(
    checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    home = Home.open(tmp_path / "home")
    instance = tmp_path / "out"
    sealing = home.sealing.public_key()
    model = saying(checkpoint_of(LLAMA), tmp_path / "model", rope_ratio=1.0, unsloth_version="2024.9", use_cache=False)
    protect(model, instance, preset="hardened", developer=home.developer, seal_to=sealing, samples=1)
    other = saying(model, tmp_path / "other", is_causal=False)
    with pytest.raises(CheckpointInvalid, match=r"config\.is_causal"):
        verify(instance, other, home, samples=1)
