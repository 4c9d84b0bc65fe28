"""How far a protection is: how fast it goes, what is left, and how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STAGES = {
    "check": "Finished files",
    "keys": "Keys",
    "server": "Server part",
    "enclave": "Enclave part",
    "certificate": "Certificate",
}
"""The stages in order, with their titles. `check` is there where an interrupted run is gone on with."""
BYTES = frozenset({"check", "server", "enclave"})
"""Stages that count bytes; the others count steps."""
LINE_SECONDS = 10.0
"""Seconds between two lines where there is no terminal."""

Progress = Callable[[str, int, int], None]
"""(stage, done, total), the first time with what was done before."""
Clock = Callable[[], float]


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody wants to see."""


@dataclass(frozen=True)
class StageTime:
    """What one stage took: seconds, and the bytes it went through; 0 for stages that count something else."""

    seconds: float
    nbytes: int


class Stages:
    """Takes the time of each stage, and tells `progress`."""

    def __init__(self, progress: Progress, clock: Clock = time.monotonic) -> None:
        self._progress = progress
        self._clock = clock
        self.times: dict[str, StageTime] = {}
        """Of the stages that have ended, in order."""

    @contextmanager
    def stage(self, name: str, total: int, before: int = 0) -> Iterator[Callable[[int], None]]:
        """Gives what counts the stage's steps, of which `before` were done by an earlier run."""
        done = before

        def advance(step: int) -> None:
            nonlocal done
            done += step
            self._progress(name, done, total)

        began = self._clock()
        advance(0)
        yield advance
        nbytes = done - before if name in BYTES else 0
        self.times[name] = StageTime(self._clock() - began, nbytes)


class Lines:
    """Progress as plain lines, one every `LINE_SECONDS`: for logs."""

    def __init__(self, say: Callable[[str], None], clock: Clock = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._said = clock()
        self._began: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        began, before = self._began.setdefault(stage, (now, done))
        if now - self._said < LINE_SECONDS or done == before:
            return
        self._said = now
        rate = (done - before) / (now - began)
        left = f"{rate_of(stage, rate)}, {duration((total - done) / rate)} left"
        self._say(f"{STAGES[stage]}: {amount(stage, done)} of {amount(stage, total)} ({done / total:.0%}), {left}")


def amount(stage: str, count: float) -> str:
    """A number of a stage's units."""
    if stage not in BYTES:
        return f"{count:.0f}"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def rate_of(stage: str, rate: float) -> str:
    """A stage's units a second."""
    return f"{rate / 1e6:.0f} MB/s" if stage in BYTES else f"{rate:.2f}/s"


def duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
