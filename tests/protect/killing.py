"""Protections in processes of their own that kill themselves, with SIGKILL, at a chosen step on the disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
"""What Python tells audit hooks of before it changes a disk; writes and fsync are counted by hand."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["stip_keyservice.protect.instance", "transformers.models.llama.modeling_llama"])


@dataclass(frozen=True)
class Job:
    """One call of `protect`."""

    model: Path
    out: Path
    preset: str = "hardened"
    developer: bytes = bytes(range(32))
    sealing: bytes = bytes(range(1, 33))
    options: tuple[tuple[str, Any], ...] = (("samples", 1), ("shard_bytes", 40_000))

    @property
    def keys(self) -> tuple[Ed25519PrivateKey, X25519PrivateKey]:
        return (
            Ed25519PrivateKey.from_private_bytes(self.developer),
            X25519PrivateKey.from_private_bytes(self.sealing),
        )

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")


def run(job: Job, *, kill_at: int = 0) -> tuple[int, int]:
    """(exit status, steps made). A process that reached step `kill_at` has the status -SIGKILL."""
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_protect, args=(job, kill_at, theirs))
    process.start()
    theirs.close()
    try:
        steps = ours.recv() if ours.poll(100) else 0
    except EOFError:  # it was killed
        steps = kill_at
    process.join(100)
    assert process.exitcode is not None
    return process.exitcode, steps


class _Steps:
    """Counts steps of all threads, and kills the process at one of them."""

    def __init__(self, kill_at: int) -> None:
        self.count = 0
        self._kill_at = kill_at
        self._lock = threading.Lock()

    def step(self) -> None:
        with self._lock:
            self.count += 1
            if self.count == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def _protect(job: Job, kill_at: int, report: Any) -> None:
    from stip_keyservice.protect.instance import protect

    steps, place = _Steps(kill_at), str(job.out)

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and any(str(argument).startswith(place) for argument in arguments):
            steps.step()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            steps.step()
            return function(*arguments, **named)

        return call

    sys.addaudithook(audited)
    os.fsync = counted(os.fsync)
    developer, sealing = job.keys
    protect(
        job.model,
        job.out,
        preset=job.preset,  # type: ignore[arg-type]
        developer=developer,
        seal_to=sealing.public_key(),
        restart_key=sealing,
        progress=lambda stage, done, total: steps.step(),  # after every block that was written
        **dict(job.options),
    )
    report.send(steps.count)
