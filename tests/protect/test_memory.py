"""Peak resident memory stays below twice the largest shard and 1 GB, tables of 256k rows included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoints
from stip_keyservice.protect.matching import TensorHeader
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_keyservice.protect.storage.memory import bound, default_workers
from stip_keyservice.protect.storage.pipeline import WORKERS_LIMIT

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
