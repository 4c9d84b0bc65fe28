"""The next epoch of an instance: the same name, a higher number, and nothing else in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stip_protocol.errors import ConfigurationError
from stip_protocol.secrets_file import open_secrets

from .test_resume import MODEL, SEALING, Checkpoints, call, interrupted, secrets_of

INSTANCE = "0123456789abcdef" * 2


def test_a_later_epoch_has_the_instances_name_its_own_number_and_fresh_keys(
    checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    model = checkpoint_of(MODEL)
    made = [call(model, tmp_path / f"{epoch}", instance=INSTANCE, epoch=epoch) for epoch in (1, 2)]
    assert [(each.manifest.instance, each.manifest.epoch) for each in made] == [(INSTANCE, 1), (INSTANCE, 2)]
    roots = {open_secrets((each.directory / "secrets.sealed").read_bytes(), SEALING).root for each in made}
    assert len(roots) == 2
    first, second = (each.manifest.server["model.safetensors"].sha256 for each in made)
    assert first != second


@pytest.mark.parametrize("options", [{"instance": "abc", "epoch": 1}, {"instance": INSTANCE.upper(), "epoch": 1}])
def test_a_name_that_no_instance_has_is_refused(
    checkpoint_of: Checkpoints, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match="32 hex digits"):
        call(checkpoint_of(MODEL), tmp_path / "out", **options)
    assert not [*tmp_path.iterdir()]


def test_the_first_epoch_draws_its_own_name(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="1 or more"):
        call(checkpoint_of(MODEL), tmp_path / "out", instance=INSTANCE)
    assert not [*tmp_path.iterdir()]


def test_an_interrupted_epoch_goes_on_for_its_own_instance_alone(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    model, out = checkpoint_of(MODEL), tmp_path / "out"
    partial = interrupted(model, out, instance=INSTANCE, epoch=1)
    begun = secrets_of(partial)
    assert (begun.instance, begun.epoch) == (INSTANCE, 1)
    for other in ({"instance": "f" * 32, "epoch": 1}, {"epoch": 1}):
        with pytest.raises(ConfigurationError, match="instance"):
            call(model, out, **other)
    done = call(model, out, instance=INSTANCE, epoch=1)
    assert done.manifest.instance == INSTANCE
    assert open_secrets((out / "secrets.sealed").read_bytes(), SEALING).root == begun.root
