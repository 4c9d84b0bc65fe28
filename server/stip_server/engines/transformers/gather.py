"""The gather window: how long a step may wait for sessions that are about to return.

Without a wait, the first session to come back starts a step alone and the others form the next one: streams
split into alternating half-batches and run at half speed. Waiting is worth while only for sessions that are
expected within the window, so the time from an output to the session's next row is estimated from what was
observed, with the smoothed mean and deviation of RFC 6298 (section 2: α = 1/8, β = 1/4, mean + 4 deviations).
"""

from __future__ import annotations

from collections.abc import Iterable

SMOOTHING = 1 / 8
DEVIATION_SMOOTHING = 1 / 4
DEVIATIONS = 4
RETURN_LIMIT = 1.0
"""Seconds. A session that stays away longer ended a turn: that says nothing about round trips."""


class GatherWindow:
    """Estimates return times and decides about waiting. Times in seconds of one monotonic clock."""

    def __init__(self, window: float) -> None:
        self.window = window
        self._mean: float | None = None
        self._deviation = 0.0

    @property
    def expected_return(self) -> float:
        """Seconds after an output within which its session is expected back; the window until one was seen."""
        return self.window if self._mean is None else self._mean + DEVIATIONS * self._deviation

    def returned(self, seconds: float) -> None:
        """A session came back `seconds` after its output."""
        if seconds > RETURN_LIMIT:
            return
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
            return
        self._deviation += DEVIATION_SMOOTHING * (abs(self._mean - seconds) - self._deviation)
        self._mean += SMOOTHING * (seconds - self._mean)

    def patience(self, answered: Iterable[float], ready: float, now: float) -> float:
        """Seconds to wait before a step that could begin since `ready`; 0 means go.

        `answered` are the times at which the sessions that did not yet return got their outputs. Sessions that
        are overdue are not waited for.
        """
        expected = self.expected_return
        latest = max((at + expected for at in answered if at + expected > now), default=now)
        return max(0.0, min(latest, ready + self.window) - now)
