"""What the process denies its host and its callers: core dumps, tracing, and quotes without end."""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable

import structlog

from stip_protocol.errors import Overloaded

PR_SET_DUMPABLE = 4
"""prctl(2): 0 also keeps other processes of the same user from attaching and from reading /proc/PID/mem."""


def harden_process() -> None:
    """No core dumps, not dumpable. What the system refuses is logged: under SGX memory is closed anyway."""
    log = structlog.get_logger()
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        log.error("core dumps could not be turned off", reason=type(error).__name__)
    try:
        refused = ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    except (OSError, AttributeError) as error:
        log.error("the process could not be made undumpable", reason=type(error).__name__)
    else:
        if refused:
            log.error("the process could not be made undumpable", errno=ctypes.get_errno())


class Rate:
    """A token bucket: `per_second` on average, bursts of twice that."""

    def __init__(self, what: str, per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._rate, self._clock = what, per_second, clock
        self._burst = max(1.0, 2 * per_second)
        self._left, self._seen = self._burst, clock()

    def take(self) -> None:
        """Count one. Raises `Overloaded`, and says when there is room for one again."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._seen) * self._rate)
        self._seen = now
        if self._left < 1:
            error = Overloaded.because(self._what, "more", f"{self._rate:g} a second")
            error.retry_after = (1 - self._left) / self._rate
            raise error
        self._left -= 1
