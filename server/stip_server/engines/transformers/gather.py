"""The gather window: how long a step may wait for sessions that are about to return.

Without a wait, the first session to come back starts a step alone and the others form the next one: streams
split into alternating half-batches and run at up to half the speed, and stay split. Waiting is worth while only for
sessions that are expected soon, so the time from an output to the session's next row is estimated from what was
observed, with the smoothed mean and deviation of RFC 6298 (section 2: α = 1/8, β = 1/4, mean + 4 deviations).
It is estimated for each link: an enclave far away is not waited for, and does not lengthen the wait for a near one.

How soon is soon depends on the step. With steps of S seconds and a return of R, all together take S + R a token, and
two alternating halves twice what half a batch takes: about S where arithmetic is the limit, 2 S where reading the
weights is. Waiting pays below some R between 0 and S; half a step is the middle.
"""

from __future__ import annotations

from collections.abc import Iterable

SMOOTHING = 1 / 8
DEVIATION_SMOOTHING = 1 / 4
DEVIATIONS = 4
RETURN_LIMIT = 1.0
"""Seconds. A session that stays away longer ended a turn: that says nothing about round trips."""
STEP_SHARE = 0.5
"""The longest wait, as a share of a decoding step."""


class ReturnTime:
    """Estimates how long the sessions of one link stay away. Seconds."""

    def __init__(self, unknown: float) -> None:
        """`unknown`: what is expected at most until a return was seen."""
        self._unknown = unknown
        self._mean: float | None = None
        self._deviation = 0.0

    @property
    def usual(self) -> float:
        """The mean; 0 until a return was seen."""
        return self._mean or 0.0

    @property
    def expected(self) -> float:
        """Seconds after an output within which its session is expected back."""
        return self._unknown if self._mean is None else self._mean + DEVIATIONS * self._deviation

    def observe(self, seconds: float) -> None:
        """A session came back `seconds` after its output."""
        if seconds > RETURN_LIMIT:
            return
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
            return
        self._deviation += DEVIATION_SMOOTHING * (abs(self._mean - seconds) - self._deviation)
        self._mean += SMOOTHING * (seconds - self._mean)


class GatherWindow:
    """Decides about waiting. Times in seconds of one monotonic clock, links by number."""

    def __init__(self, window: float) -> None:
        """`window`: the longest wait whatever the steps take."""
        self.window = window
        self._step: float | None = None
        self._links: dict[int, ReturnTime] = {}

    @property
    def limit(self) -> float:
        """The longest wait."""
        return self.window if self._step is None else min(self.window, STEP_SHARE * self._step)

    def stepped(self, seconds: float) -> None:
        """A decoding step took `seconds`."""
        self._step = seconds if self._step is None else self._step + SMOOTHING * (seconds - self._step)

    def link(self, number: int) -> ReturnTime:
        """The estimate of a link."""
        found = self._links.get(number)
        if found is None:
            found = self._links[number] = ReturnTime(self.window)
        return found

    def forget(self, number: int) -> None:
        """A link has no session any more."""
        self._links.pop(number, None)

    def patience(self, away: Iterable[tuple[int, float]], ready: float, now: float) -> float:
        """Seconds to wait before a step that could begin since `ready`; 0 means go.

        `away` are the sessions that did not yet return: each one's link, and when it got its output. Sessions that
        are overdue are not waited for, and neither are those that usually take longer than the wait may last.
        """
        end, latest = ready + self.limit, now
        for number, at in away:
            link = self.link(number)
            back = at + link.expected
            if back > now and at + link.usual <= end:
                latest = max(latest, back)
        return max(0.0, min(latest, end) - now)
