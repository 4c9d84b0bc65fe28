"""What a process holds, as the kernel tells it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stip_stack.footprint import Footprint


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[str]]:
    """Runs `code`, which says something when it is ready and then waits for its stdin to end."""
    argv = [sys.executable, "-I", "-c", code + "\nprint('ready', flush=True)\nimport sys; sys.stdin.read()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child


def test_memory_that_a_process_touches_shows() -> None:
    with process("") as small, process("held = b'x' * (64 << 20)") as large:
        less, more = Footprint.of(small.pid), Footprint.of(large.pid)
    assert more.pss - less.pss > 60 << 20
    assert more.rss - less.rss > 60 << 20
    assert less.pss <= less.rss


def test_open_files_and_threads_are_counted(tmp_path: Path) -> None:
    waiting = (
        "import threading\nfor _ in range(3): threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    with (
        process("") as plain,
        process(f"kept = [open({str(tmp_path / 'f')!r}, 'w') for _ in range(5)]\n{waiting}") as busy,
    ):
        before, after = Footprint.of(plain.pid), Footprint.of(busy.pid)
    assert after.fds - before.fds == 5
    assert (before.threads, after.threads) == (1, 4)


def test_a_tree_is_the_sum_of_its_processes() -> None:
    # The child reads the stdin of its parent, and so ends with it.
    with process("import subprocess\nchild = subprocess.Popen(['cat'])") as parent:
        alone, tree = Footprint.of(parent.pid), Footprint.of_tree(parent.pid)
        assert tree.threads == alone.threads + 1
        assert tree.fds > alone.fds


def test_a_process_that_is_gone_is_an_error() -> None:
    with process("") as child:
        pass
    for look in (Footprint.of, Footprint.of_tree):
        with pytest.raises(ProcessLookupError, match=str(child.pid)):
            look(child.pid)
