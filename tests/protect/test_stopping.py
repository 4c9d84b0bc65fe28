"""Signals end the command in order, and bars are drawn where there is a terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Case

MODEL = Case("llama", tied=False, sharded=True)
PROCESS = [sys.executable, "-c", "from stip_keyservice.protect.commands.protect import protect; protect()"]

Checkpoints = Callable[[Case], Path]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_says_what_it_keeps_and_goes_on_from_there(
    checkpoint_of: Checkpoints, tmp_path: Path, number: signal.Signals
) -> None:
    partial = tmp_path / "out.partial"
    arguments = [checkpoint_of(MODEL), "--out", tmp_path / "out", "--home", tmp_path / "home", "--samples", "64"]
    process = subprocess.Popen([*PROCESS, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (partial / "journal").exists():
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; {partial} is kept: run the same command again to go on, or remove it" in said
    assert "Traceback" not in said
    again = subprocess.run([*PROCESS, *map(str, arguments)], capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert not list(tmp_path.glob("*.partial"))


def test_a_terminal_shows_every_stage(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = [checkpoint_of(MODEL), "--out", tmp_path / "out", "--home", tmp_path / "home"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [*PROCESS, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = bytearray()
        while block := _read(ours):
            shown += block
        os.close(ours)
    assert process.returncode == 0
    for title in (b"Keys", b"Server part", b"Enclave part", b"Certificate"):
        assert title in shown
    assert b"MB/s" in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""
