"""How long a session looks for a seat, and how it spreads its attempts."""

from __future__ import annotations

import asyncio
import secrets
import time

from stip_enclave.links import RETRY_SECONDS
from stip_protocol.errors import ReplicaLost

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between attempts, doubled each time, times 0.5 to 1.5: sessions that were lost together do not return
together."""
_random = secrets.SystemRandom()


class Patience:
    """Bounds the attempts of one journey by time without progress, from the first attempt on: a session that rests
    for an hour after its seat was lost has all of it."""

    def __init__(self, seconds: float) -> None:
        self.avoid: set[str] = set()
        """Replicas that were lost or refused: asked again where there is no other."""
        self._seconds = seconds
        self._deadline: float | None = None
        self._next = 0.0

    async def before_an_attempt(self) -> None:
        """Nothing before the first, a pause before each later one. Raises `ReplicaLost` where there is no time left."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._seconds
        pause = self._next * _random.uniform(0.5, 1.5)
        self._next = min(max(FIRST_PAUSE, 2 * self._next), LONGEST_PAUSE)
        if not pause:
            return
        if time.monotonic() + pause > self._deadline:
            message = f"no replica took the session over in {self._seconds:g} s"
            raise ReplicaLost(message, retry_after=RETRY_SECONDS)
        await asyncio.sleep(pause)

    def extend(self, seconds: float) -> None:
        """Time that a session waited for its turn is not held against it."""
        if self._deadline is not None:
            self._deadline += seconds

    def renew(self) -> None:
        """A new turn has all its time."""
        self._deadline, self._next = None, 0.0
