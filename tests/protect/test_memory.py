"""Peak resident memory stays below twice the largest shard and 1 GB, tables of 256k rows included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkpoints
from stip_keyservice.protect.matching import TensorHeader
from stip_keyservice.protect.parts import write_parts
from stip_keyservice.protect.plan import plan
from stip_keyservice.protect.progress import Stages, silent
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_keyservice.protect.storage.memory import bound, default_workers
from stip_keyservice.protect.storage.pipeline import WORKERS_LIMIT
from stip_keyservice.protect.storage.spans import SPAN_BYTES
from stip_keyservice.protect.storage.workspace import claimed
from stip_keyservice.protect.storage.writer import BLOCK_BYTES
from stip_protocol.manifest import Preset
from stip_protocol.secrets_file import InstanceSecrets

from .conftest import Case

ROOT = Path(__file__).resolve().parents[2]
LARGE_TABLES = checkpoints.TINY | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 256_000,
}


def protected(model: Path, out: Path, preset: str, workers: int) -> dict[str, Any]:
    """What a protection in a process of its own took."""
    argv = [sys.executable, "-m", "benchmarks.protect_run", str(model), str(out), preset, "--workers", str(workers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.long
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_memory_stays_below_twice_the_largest_shard_and_a_gigabyte(tmp_path: Path, preset: str) -> None:
    """With as many workers as `protect` takes on a machine that has cores enough."""
    written = checkpoints.write(tmp_path / "model", LARGE_TABLES, shard_bytes=100_000_000, seed=0)
    assert written.largest > 500_000_000  # a table, in a shard of its own
    source = Checkpoint.open(tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda process: range(64))
        workers = default_workers(source.headers, source.largest_shard, LARGE_TABLES["hidden_size"])
    assert workers > 2
    run = protected(tmp_path / "model", tmp_path / "out", preset, workers)
    assert run["written"] > 1_000_000_000
    assert run["peak"] <= bound(written.largest)


def test_workers_are_as_many_as_the_cores_where_memory_allows_and_one_at_least() -> None:
    small = {"a": TensorHeader("a", "BF16", (10, 10))}
    wide = {"a": TensorHeader("a", "BF16", (1 << 16, 1 << 16))}
    cores = len(os.sched_getaffinity(0))
    assert default_workers(small, 10 << 30, 4096) == min(cores, WORKERS_LIMIT)
    assert default_workers(wide, 2 << 30, 1 << 16) == 1


def test_workers_leave_room_for_the_spans_kept_and_for_one_still_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))

    def workers(*sizes: int) -> int:
        headers = {
            str(place): TensorHeader(str(place), "BF16", (size >> 11, 1 << 10)) for place, size in enumerate(sizes)
        }
        return default_workers(headers, 1 << 30, 1024)

    worker = 20 * BLOCK_BYTES + 12 * 1024 * 1024
    many = workers(1 << 20)
    assert workers(512 << 20) == pytest.approx(many - (512 << 20) / worker, abs=1)
    assert workers(512 << 20, 512 << 20) == pytest.approx(many - (1 << 30) / worker, abs=1)
    assert workers(*[32 << 20] * 64) == pytest.approx(many - (SPAN_BYTES + (32 << 20)) / worker, abs=1)


@pytest.mark.parametrize("preset", ["paper", "hardened"])
def test_nothing_read_is_kept_when_the_parts_are_written(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path, preset: Preset
) -> None:
    """The certificate comes after, and needs the room."""
    source = Checkpoint.open(checkpoint_of(Case("llama", tied=False)))
    secrets = InstanceSecrets(instance="ab" * 16, epoch=0, preset=preset, manifest_digest=bytes(32), root=bytes(32))
    planned = plan(source.config, source.headers, preset, secrets.root)
    read: list[weakref.ref[torch.Tensor]] = []
    rows = source.rows

    def watched(name: str, start: int, stop: int) -> torch.Tensor:
        tensor = rows(name, start, stop)
        read.append(weakref.ref(tensor))
        return tensor

    with pytest.MonkeyPatch.context() as patch, claimed(tmp_path / "out") as workspace:
        patch.setattr(source, "rows", watched)
        write_parts(workspace, source, planned, secrets, Stages(silent), workers=1)
    assert read
    assert not [alive for alive in read if alive() is not None]
