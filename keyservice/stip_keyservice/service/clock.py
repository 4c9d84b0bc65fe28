"""The time of decisions: it never goes back, whatever the machine's clock does.

The audit log remembers when it was last written, so the log is the floor: a decision is made at the later of the
machine's time and the last entry's. A clock a little behind (`CLOCK_SKEW`: another replica wrote) changes nothing; one
that is further behind was set back, or was ahead when the last entry was written, and nothing is released or renewed
until it is repaired, or until the operator says that it is right (`audit-log accept-clock`, an entry of its own).

A clock that stands still ends nothing by time. It extends nothing either: every lease ends with its tokens, every
token was debited from a budget, and a nonce is spent once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from stip_protocol.errors import ClockRefused
from stip_protocol.lease import CLOCK_SKEW


def settle(now: int, last: int) -> int:
    """When a decision is made whose clock says `now`, after an entry of `last`. Raises `ClockRefused`."""
    behind = last - now
    if behind > CLOCK_SKEW:
        remedy = "set the clock, or accept it with `stip-keyservice audit-log accept-clock`"
        raise ClockRefused.because(
            "clock", f"{behind} s behind the audit log's last entry", f"at most {CLOCK_SKEW} s ({remedy})"
        )
    return max(now, last)


class ServiceClock:
    """Unix seconds that never fall below the audit log's last entry."""

    def __init__(self, last: Callable[[], int], refresh: Callable[[], int], wall: Callable[[], float] = time.time):
        """`last`: the time of the last entry known here; `refresh` reads it from the log again."""
        self._last, self._refresh, self._wall = last, refresh, wall

    def machine(self) -> int:
        """What the machine's clock says. Entries that decide nothing are written by it: the log dates none before its
        last one, and a last one that this process only remembers may have been overruled since."""
        return int(self._wall())

    def reading(self) -> int:
        """The time to look at the state by, whether the clock is good or not."""
        return max(int(self._wall()), self._last())

    @property
    def behind(self) -> bool:
        """Whether `require` would have to read the log, or refuse."""
        return self._last() - int(self._wall()) > CLOCK_SKEW

    def require(self) -> int:
        """The time to decide at. Raises `ClockRefused`, and `Unavailable` where the log cannot be read."""
        now = int(self._wall())
        try:
            return settle(now, self._last())
        except ClockRefused:  # perhaps only of an entry that the operator has overruled since
            return settle(now, self._refresh())
