"""The order in which a server part is written tells nothing of its keys: experts have changed names, and only that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from stip_keyservice.protect.parts import server_files
from stip_keyservice.protect.plan import plan
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_protocol.keys import Permutation
from tests.protect_core.models import ACCEPTED, Models
from tests.protect_core.test_forms import WITH_EXPERTS, in_memory_form

ROOTS = [bytes([number]) * 32 for number in (1, 2)]
SHARD_BYTES = 4096
"""Small enough for several shards."""


@pytest.mark.parametrize("preset", ["paper", "hardened", "throughput"])
@pytest.mark.parametrize("name", WITH_EXPERTS)
@pytest.mark.parametrize("stacked", [True, False], ids=["stacks", "one tensor an expert"])
def test_shards_under_two_keys_announce_the_same(
    models: Models, tmp_path: Path, name: str, stacked: bool, preset: str
) -> None:
    plain = models.fixed(name)
    state = in_memory_form(plain) if stacked else plain.state
    save_file({tensor: values.clone() for tensor, values in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(plain.config))
    source = Checkpoint.open(tmp_path)
    plans = [plan(source.config, source.headers, preset, root, **ACCEPTED) for root in ROOTS]
    orders = [
        [key.index.tolist() for key in planned.keys.values() if isinstance(key, Permutation)] for planned in plans
    ]
    assert orders[0] != orders[1]
    assert plans[0].server == plans[1].server
    one, other = ([file.header for file in server_files(planned, source, SHARD_BYTES)] for planned in plans)
    assert len(one) > 1
    assert one == other
