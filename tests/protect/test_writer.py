"""What the streaming writer writes, the reference readers read, whatever the threads do."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stip_keyservice.protect.folding import TORCH_DTYPE
from stip_keyservice.protect.plan import Output
from stip_keyservice.protect.storage import writer
from stip_keyservice.protect.storage.checkpoint import INDEX, WEIGHTS, Checkpoint
from stip_keyservice.protect.storage.journal import Journal
from stip_keyservice.protect.storage.pipeline import AHEAD, ordered
from stip_keyservice.protect.storage.writer import TensorFile, checkpoint_files, index_of, output_bytes, write_files
from stip_protocol.errors import CheckpointInvalid
from stip_protocol.manifest import file_digest

OUTPUTS = [
    Output("half", "F16", (3,)),
    Output("wide", "F64", (5, 2)),
    Output("brain", "BF16", (7, 3, 2)),
    Output("single", "F32", (11, 4)),
]
ROOT = bytes(range(32))


def value(output: Output, rows: slice) -> torch.Tensor:
    count = torch.Size(output.shape).numel()
    return torch.arange(count).reshape(output.shape).to(TORCH_DTYPE[output.dtype])[rows]


def given(tensor: torch.Tensor, output: Output, rows: slice) -> torch.Tensor:
    return tensor


def nothing(step: int) -> None:
    pass


def journal_of(folder: Path) -> Journal:
    return Journal(folder / "journal", folder, ROOT)


def written(
    folder: Path,
    shard_bytes: int = 1 << 30,
    *,
    compute: writer.Compute = value,
    workers: int = 2,
    advance: Callable[[int], None] = nothing,
) -> list[TensorFile]:
    (folder / "server").mkdir(exist_ok=True)
    files = checkpoint_files("server", OUTPUTS, shard_bytes)
    write_files(folder, files, compute, workers=workers, journal=journal_of(folder), advance=advance)
    if index := index_of(files):
        (folder / "server" / INDEX).write_bytes(index)
    return files


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_tensors_written_in_row_blocks_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(writer, "BLOCK_BYTES", 40)
    blocks: list[int] = []
    written(tmp_path, workers=workers, advance=blocks.append)
    assert [path.name for path in (tmp_path / "server").iterdir()] == [WEIGHTS]
    read = load_file(tmp_path / "server" / WEIGHTS)
    assert read.keys() == {output.name for output in OUTPUTS}
    for output in OUTPUTS:
        assert torch.equal(read[output.name], value(output, slice(None)))
        assert read[output.name].dtype == TORCH_DTYPE[output.dtype]
    assert len(blocks) > len(OUTPUTS)
    assert sum(blocks) == sum(map(output_bytes, OUTPUTS))
    with safe_open(tmp_path / "server" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_stay_under_their_limit_and_the_index_names_them(tmp_path: Path) -> None:
    written(tmp_path, 100)
    server = tmp_path / "server"
    index = json.loads((server / INDEX).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in server.glob("*.safetensors")}
    assert set(index["weight_map"]) == {output.name for output in OUTPUTS}
    assert index["weight_map"]["half"] == index["weight_map"]["wide"] != index["weight_map"]["single"]
    (server / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(server)
    for output in OUTPUTS:
        expected = value(output, slice(None))
        rows = expected.shape[0] if expected.ndim < 3 else expected[..., 0].numel()
        assert torch.equal(checkpoint.rows(output.name, 0, rows).reshape(expected.shape), expected)


def test_the_digests_taken_while_writing_are_those_of_the_files(tmp_path: Path) -> None:
    files = written(tmp_path, 100)
    listed = journal_of(tmp_path).listed
    assert listed.keys() == {file.name for file in files}
    for name, digest in listed.items():
        data = (tmp_path / name).read_bytes()
        assert (digest.size, digest.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_files_that_the_journal_lists_are_not_computed_again(tmp_path: Path) -> None:
    files = written(tmp_path, 100)
    before = {file.name: file_digest(tmp_path / file.name) for file in files}

    def refuse(output: Output, rows: slice) -> torch.Tensor:
        raise AssertionError(output.name)

    written(tmp_path, 100, compute=refuse)
    assert {file.name: file_digest(tmp_path / file.name) for file in files} == before


@pytest.mark.parametrize("workers", [1, 3])
def test_a_write_that_breaks_lists_and_names_only_whole_files(tmp_path: Path, workers: int) -> None:
    def breaks(output: Output, rows: slice) -> torch.Tensor:
        if output.name == "single":
            raise OSError("disk full")
        return value(output, rows)

    with pytest.raises(OSError, match="disk full"):
        written(tmp_path, 100, compute=breaks, workers=workers)
    assert not (tmp_path / "server" / INDEX).exists()
    whole = {f"server/{path.name}" for path in (tmp_path / "server").glob("*.safetensors")}
    assert whole == journal_of(tmp_path).listed.keys()
    assert whole


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(4, dtype=torch.float16)])
def test_a_block_of_another_form_is_refused(tmp_path: Path, wrong: torch.Tensor) -> None:
    (tmp_path / "server").mkdir()
    files = checkpoint_files("server", OUTPUTS[:1])
    with pytest.raises(CheckpointInvalid, match=r"tensor half: got .*, allowed: float16 \[3\]"):
        write_files(tmp_path, files, partial(given, wrong), workers=1, journal=journal_of(tmp_path))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_come_in_order_and_only_so_many_are_begun(workers: int) -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def compute(task: int) -> int:
        with lock:
            begun.append(task)
        return -task

    taken = 0
    for result in ordered(compute, range(50), workers):
        assert result == -taken
        taken += 1
        with lock:
            assert len(begun) <= taken + workers + AHEAD
    assert taken == 50
    assert sorted(begun) == list(range(50))


def test_workers_have_one_torch_thread_each_and_the_caller_gets_its_own_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert set(ordered(lambda task: torch.get_num_threads(), range(6), 2)) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_task_that_fails_is_raised_in_its_place_and_ends_the_threads() -> None:
    def compute(task: int) -> int:
        if task == 4:
            raise CheckpointInvalid("task 4")
        return task

    results = ordered(compute, range(1000), 3)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(CheckpointInvalid, match="task 4"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("protect")]
