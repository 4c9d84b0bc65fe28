"""What a target is, and the promise that every input of it is held to."""

from __future__ import annotations

import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from stip_protocol.errors import BY_CODE, StipError

SECONDS = 5.0
"""For one input: what takes longer counts as a hang. The slowest honest one takes some 20 ms."""
MEMORY = 32 << 20
MEMORY_PER_BYTE = 64
"""Bytes that Python objects may take while one input is read: so many, and so many for each byte of the input."""
MESSAGE = 2048
"""Characters of the longest message of a refusal: none repeats its input."""
ACCEPTED = "accepted"


class Broken(AssertionError):
    """An input broke the promise otherwise than by an exception of its own."""


@dataclass(frozen=True)
class Target:
    """One reader of bytes that somebody else wrote."""

    name: str
    read: Callable[[bytes], object]
    """Ends, or raises `StipError`: anything else is a finding."""
    seeds: Callable[[], list[bytes]]
    """Real inputs, from which the fuzzer starts."""
    longest: int = 4096
    """Bytes of the longest input tried."""


def judge(target: Target, data: bytes) -> str:
    """Read one input; the code of the refusal, or `ACCEPTED`.

    Raises whatever breaks the promise: an exception that is no `StipError`, and `Broken` for a code that is not the
    error's own, a message without bounds, or more time than `SECONDS`.
    """
    started = time.monotonic()
    try:
        target.read(data)
    except StipError as error:
        if BY_CODE.get(error.code) is not type(error):
            raise Broken(f"{type(error).__name__} has the code {error.code}, which is not its own") from error
        if error.code == StipError.code:
            raise Broken("a refusal without a code of its own") from error
        if len(error.message) > MESSAGE or not error.message.isprintable():
            raise Broken(f"{error.code}: a message of {len(error.message)} characters") from error
        return error.code
    finally:
        if (took := time.monotonic() - started) > SECONDS:
            raise Broken(f"took {took:.1f} s, allowed: {SECONDS} s")
    return ACCEPTED


def judge_closely(target: Target, data: bytes) -> str:
    """As `judge`, and an input that never ends is interrupted, and memory is measured.

    tracemalloc sees what Python allocates, not what libraries do beside it: `-rss_limit_mb` bounds those.
    """
    with _interrupted(2 * SECONDS):
        tracemalloc.start()
        try:
            outcome = judge(target, data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    if peak > (allowed := MEMORY + MEMORY_PER_BYTE * len(data)):
        raise Broken(f"took {peak} bytes of memory for {len(data)}, allowed: {allowed}")
    return outcome


@contextmanager
def _interrupted(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Broken(f"did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # of a test runner's own alarm
    began = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)) if left else 0)
        signal.signal(signal.SIGALRM, before)
