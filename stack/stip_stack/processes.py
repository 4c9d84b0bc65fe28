"""One part as a real process: started from its command, known by what it announces, ended with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stip_protocol.errors import StipError, Unavailable

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a child gets when its parent dies, however it dies."""


_LIBC = ctypes.CDLL(None)
"""Loaded before any fork: a child between fork and exec may do little."""


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Process:
    """A running part. `address` and `metrics` are where it listens.

    The child gets a process group of its own, so that Ctrl-C reaches the parent alone, which then stops its
    children in order; and it is sent SIGTERM when the parent dies without stopping it.
    """

    def __init__(
        self, name: str, argv: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.argv = argv
        self.log = log
        self.address = ""
        self.metrics = ""
        self._log = log.open("ab")
        self._process = subprocess.Popen(  # the pipe carries the announcement only
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=_die_with_parent,
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

    def terminate(self) -> None:
        """Ask it to drain and leave (SIGTERM); `stop` waits for it."""
        if self.running:
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

    def _close(self) -> None:
        self._log.close()
        if self._process.stdout is not None:
            self._process.stdout.close()


def run(argv: Sequence[str], *, seconds: float = 600.0) -> str:
    """Run a command of ours to its end and return its stdout. Raises `StipError` with its stderr where it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise StipError(f"{Path(argv[0]).name} {argv[1]} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return done.stdout
