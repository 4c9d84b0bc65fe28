"""What running processes hold: memory, file descriptors and threads, from Linux' /proc.

For tables of memory by part, and for soak tests that must find each of them flat.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Self

import psutil

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one process, or of several together. Memory in bytes."""

    pss: int
    """Resident memory, with pages that several processes share divided among them: it adds up."""
    rss: int
    """Resident memory, shared pages counted whole."""
    fds: int
    threads: int

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(self.pss + other.pss, self.rss + other.rss, self.fds + other.fds, self.threads + other.threads)

    @classmethod
    def of(cls, pid: int) -> Self:
        """Raises `ProcessLookupError` where the process is gone."""
        try:
            rollup = (_PROC / str(pid) / "smaps_rollup").read_text()
            fds = sum(1 for _ in (_PROC / str(pid) / "fd").iterdir())
            threads = sum(1 for _ in (_PROC / str(pid) / "task").iterdir())
        except FileNotFoundError:
            raise ProcessLookupError(f"process {pid} is gone") from None
        return cls(_field(rollup, "Pss"), _field(rollup, "Rss"), fds, threads)

    @classmethod
    def of_tree(cls, pid: int) -> Footprint:
        """The process and all below it. Raises `ProcessLookupError` where `pid` itself is gone."""
        try:
            below = psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            raise ProcessLookupError(f"process {pid} is gone") from None
        return reduce(cls.__add__, _still_there(child.pid for child in below), cls.of(pid))


def _still_there(pids: Iterable[int]) -> Iterable[Footprint]:
    """Children may end while they are looked at."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            yield Footprint.of(pid)


def _field(rollup: str, name: str) -> int:
    """Bytes of a field of smaps_rollup (proc(5)), which are given in KiB."""
    line = next(line for line in rollup.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
