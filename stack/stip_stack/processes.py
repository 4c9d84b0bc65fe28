"""One part as a real process: started from its command, known by what it announces, ended with its parent."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from stip_protocol.errors import StipError, Unavailable

_TIED = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1  # prctl(2): the signal a process gets when the thread that started it ends, however it ends
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Ties a process to its parent before it becomes the program. Not done between fork and exec: there a parent with
threads (gRPC's, torch's) leaves the child in no state to run Python."""


class Process:
    """A running part. `address` and `metrics` are where it listens.

    The child gets a process group of its own, so that Ctrl-C reaches the parent alone, which then stops its
    children in order; and it is sent SIGTERM when the parent dies without stopping it: when the *thread* that started
    it ends, as prctl(2) has it, so it is to be started from one that lasts.
    """

    def __init__(
        self, name: str, argv: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.argv = argv
        self.log = log
        self.address = ""
        self.metrics = ""
        self._asked = False
        self._log = log.open("ab")
        self._process = subprocess.Popen(  # the pipe carries the announcement only
            [sys.executable, "-I", "-S", "-c", _TIED, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_until_listening(self, seconds: float = 120.0) -> None:
        """Read the announcement. Raises `Unavailable` with the end of the log where none comes."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0 and selector.select(left):
                line = stdout.readline()
                if not line:
                    break
                with contextlib.suppress(ValueError):
                    said = json.loads(line)
                    if isinstance(said, dict) and said.get("event") == "listening":
                        self.address, self.metrics = said["address"], said["metrics"]
                        return
        self.stop(seconds=0.0)
        raise Unavailable(f"{self.name} did not start (exit {self._process.returncode}):\n{self.end_of_log()}")

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._process.kill()
        self._process.wait()
        self._close()

    def reread(self, seconds: float = 30.0) -> bool:
        """Have it read a table of its configuration again (SIGHUP); whether it took what it found.

        Raises `Unavailable` where it says nothing of that.
        """
        before = self._reread()
        self._process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + seconds
        while len(said := self._reread()) == len(before):
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.name} did not read its configuration again:\n{self.end_of_log()}")
            time.sleep(0.02)
        return said[-1] == "configuration taken"

    def terminate(self) -> None:
        """Ask it to drain and leave (SIGTERM), once; `stop` waits for it."""
        if self.running and not self._asked:
            # A second signal could meet an interpreter that is past its handlers.
            self._asked = True
            self._process.terminate()

    def stop(self, seconds: float = 20.0) -> int:
        """SIGTERM, then SIGKILL after `seconds`. Returns the exit status; idempotent."""
        if self.running:
            self.terminate()
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
        status = self._process.wait()
        self._close()
        return status

    def end_of_log(self, lines: int = 12) -> str:
        """The last lines of what the process wrote to stderr."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _reread(self) -> list[str]:
        lines = self.log.read_text(errors="replace").splitlines()
        words = ("configuration taken", "configuration not taken")
        return [word for line in lines for word in words if f'"{word}"' in line]

    def _close(self) -> None:
        self._log.close()
        if self._process.stdout is not None:
            self._process.stdout.close()


def run(argv: Sequence[str], *, seconds: float = 600.0) -> str:
    """Run a command of ours to its end and return its stdout. Raises `StipError` with its stderr where it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise _failed(argv, done.returncode, done.stderr)
    return done.stdout


def run_side_by_side(
    commands: Mapping[str, Sequence[str]], *, at_once: int, ended: Callable[[str, float], None]
) -> None:
    """Run commands of ours by name, so many at once, each to its end; `ended` is told which, and its seconds.

    Raises `StipError` with the stderr of the first that fails, once the others were told to stop and have stopped.
    """
    children: list[subprocess.Popen[str]] = []
    starting, stopping = threading.Lock(), threading.Event()

    def one(argv: Sequence[str]) -> float:
        began = time.monotonic()
        with starting:  # so that no child is missed by who stops them
            if stopping.is_set():
                return 0.0
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _TIED, *argv],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            children.append(child)
        with child:
            _, said = child.communicate()
        if child.returncode != 0:
            raise _failed(argv, child.returncode, said)
        return time.monotonic() - began

    with ThreadPoolExecutor(at_once) as pool:
        names = {pool.submit(one, argv): name for name, argv in commands.items()}
        try:
            for future in as_completed(names):
                ended(names[future], future.result())
        except BaseException:
            with starting:
                stopping.set()
                for child in children:
                    child.terminate()
            raise


def _failed(argv: Sequence[str], status: int, said: str) -> StipError:
    return StipError(f"{Path(argv[0]).name} {argv[1]} failed ({status}): {said.strip()[-2000:]}")
