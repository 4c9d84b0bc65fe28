"""Reading tensors: the asked rows, once, into memory that is let go, and never from a file that changed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from stip_keyservice.protect.storage.checkpoint import WEIGHTS, Checkpoint
from stip_keyservice.protect.storage.spans import SpanCache
from stip_protocol.errors import CheckpointInvalid

STACK = torch.arange(2 * 3 * 4, dtype=torch.bfloat16).reshape(2, 3, 4)
MATRIX = torch.arange(35, dtype=torch.float32).reshape(7, 5)
VECTOR = torch.arange(6, dtype=torch.float64)


def stored(folder: Path) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    save_file({"stack": STACK, "matrix": MATRIX, "vector": VECTOR}, folder / WEIGHTS)
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return stored(tmp_path_factory.mktemp("plain"))


@given(data=st.data())
def test_rows_and_spans_are_those_of_the_flattened_tensor(checkpoint: Checkpoint, data: st.DataObject) -> None:
    name, flat = data.draw(
        st.sampled_from([("stack", STACK.reshape(6, 4)), ("matrix", MATRIX), ("vector", VECTOR)]), label="tensor"
    )
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    for read in (checkpoint.rows, checkpoint.span):
        rows = read(name, start, stop)
        assert rows.dtype == flat.dtype
        assert torch.equal(rows, flat[start:stop])


@pytest.mark.parametrize(("name", "flat"), [("stack", STACK.reshape(6, 4)), ("matrix", MATRIX), ("vector", VECTOR)])
def test_the_disk_is_asked_for_the_bytes_of_the_rows_that_are_expected(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str, flat: torch.Tensor
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, begin, size, advice: asked.append((begin, size)))
    checkpoint.expect(name, 1, 4)
    ((begin, size),) = asked
    stored_bytes = (checkpoint.directory / WEIGHTS).read_bytes()[begin : begin + size]
    assert stored_bytes == flat[1:4].contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 8)])
def test_rows_that_a_tensor_has_not_are_an_error(checkpoint: Checkpoint, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="of 7"):
        checkpoint.rows("matrix", start, stop)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def replaced(path: Path) -> None:
    copy = path.with_name("other")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def rewritten(path: Path) -> None:
    status = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [cut, replaced, rewritten])
def test_a_file_that_changes_underneath_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    checkpoint = stored(tmp_path)
    change(tmp_path / WEIGHTS)
    with pytest.raises(CheckpointInvalid, match=rf"{WEIGHTS}, tensor matrix: got a file that changed"):
        checkpoint.span("matrix", 0, 7)


def test_a_file_that_goes_away_is_refused(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointInvalid, match=f"{WEIGHTS}, tensor vector: No such file"):
        checkpoint.rows("vector", 0, 1)


def test_threads_that_ask_for_a_span_at_once_share_one_reading() -> None:
    cache, threads, everybody_asks = SpanCache(), 4, threading.Barrier(4)
    asked: list[int] = []
    reading = threading.Event()
    got: list[torch.Tensor] = []

    def read() -> torch.Tensor:
        asked.append(1)
        assert reading.wait(30)
        return torch.ones(3)

    def ask() -> None:
        everybody_asks.wait(30)
        got.append(cache.get(("a", 0, 3), 12, read))

    running = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in running:
        thread.start()
    reading.set()
    for thread in running:
        thread.join(30)
    assert len(got) == threads
    assert asked == [1]
    assert all(each is got[0] for each in got)


def test_what_a_reading_raises_reaches_the_caller_and_is_not_kept() -> None:
    cache = SpanCache()

    def refuse() -> torch.Tensor:
        raise CheckpointInvalid("cut")

    with pytest.raises(CheckpointInvalid, match="cut"):
        cache.get(("a", 0, 3), 12, refuse)
    assert torch.equal(cache.get(("a", 0, 3), 12, lambda: torch.ones(3)), torch.ones(3))


def test_spans_are_kept_by_bytes_and_the_oldest_go_first() -> None:
    cache, read = SpanCache(limit=24), list[str]()

    def get(name: str, nbytes: int = 12) -> None:
        cache.get((name, 0, 3), nbytes, lambda: read.append(name) or torch.ones(3))  # type: ignore[func-returns-value]

    for name in ("a", "b", "a", "b"):
        get(name)
    assert read == ["a", "b"]
    get("a")
    get("c")  # b goes
    get("a")
    assert read == ["a", "b", "c"]
    get("larger than all", 100)
    get("larger than all", 100)
    get("a")
    assert read == ["a", "b", "c", "larger than all", "a"]


def test_spans_are_let_go_when_no_tensor_needs_them_any_more(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path)
    first = checkpoint.span("matrix", 0, 7)
    assert checkpoint.span("matrix", 0, 7) is first
    checkpoint.let_go()
    assert checkpoint.span("matrix", 0, 7) is not first


def test_what_was_read_is_not_kept_in_memory(tmp_path: Path) -> None:
    """Row by row through 96 MB, in a process of its own: its peak memory grows by a block, not by the file."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"large": torch.ones(96, 1 << 18)}, tmp_path / WEIGHTS)
    script = (
        "import sys, pathlib\n"
        "from stip_keyservice.protect.storage.checkpoint import Checkpoint\n"
        "def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status') if 'VmHWM' in line)\n"
        "checkpoint = Checkpoint.open(pathlib.Path(sys.argv[1]))\n"
        "checkpoint.rows('large', 0, 1)\n"
        "before = peak()\n"
        "total = sum(float(checkpoint.rows('large', row, row + 1).sum()) for row in range(96))\n"
        "assert total == 96 * (1 << 18)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 << 10  # kB
