"""Signals end the command in order, and bars are drawn where there is a terminal."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
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
    arguments = [checkpoint_of(MODEL), "--out", tmp_path / "out", "--home", tmp_path / "home"]
    done = stopped("open", partial / "certificate.json.partial", number, arguments)
    assert done.returncode == 128 + number
    assert (
        f"stopped by {number.name}; {partial} is kept: run the same command again to go on, or remove it" in done.stderr
    )
    assert "Traceback" not in done.stderr
    again = subprocess.run([*PROCESS, *map(str, arguments)], capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert not list(tmp_path.glob("*.partial"))


def test_a_command_that_is_stopped_when_all_is_done_says_so(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [checkpoint_of(MODEL), "--out", out, "--home", tmp_path / "home"]
    done = stopped("os.remove", out / "journal", signal.SIGTERM, arguments)
    assert done.returncode == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM; {out} is whole and published: run the same command again to tidy up" in done.stderr
    again = subprocess.run([*PROCESS, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["certificate"]["passed"] is True
    assert not {"journal", "resume"} & {path.name for path in out.iterdir()}


def stopped(
    event: str, path: Path, number: signal.Signals, arguments: list[str | Path]
) -> subprocess.CompletedProcess[str]:
    """The command, sent a signal by itself when it is about to do something to a path (an audit event)."""
    script = (
        "import os, sys\n"
        "def stop(event, arguments):\n"
        f"    if event == {event!r} and str(arguments[0]) == {str(path)!r}:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "sys.addaudithook(stop)\n"
        f"{PROCESS[-1]}\n"
    )
    argv = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=100)


def test_the_command_writes_no_core_dump_and_draws_keys_on_one_thread(tmp_path: Path) -> None:
    """What a process ends with after it has loaded everything and refused its input."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if hard == 0:
        pytest.skip("a system that never dumps cores cannot tell")
    script = (
        "import atexit, os, resource\n"
        f"resource.setrlimit(resource.RLIMIT_CORE, ({hard}, {hard}))\n"
        "def tell():\n"
        "    import numpy\n"
        "    numpy.linalg.qr(numpy.ones((600, 600)))\n"
        "    print(resource.getrlimit(resource.RLIMIT_CORE)[0], len(os.listdir('/proc/self/task')))\n"
        "atexit.register(tell)\n"
        f"{PROCESS[-1]}\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    argv = [sys.executable, "-c", script, str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*argv, "--home", str(tmp_path / "home")], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.split() == ["0", "1"]


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
