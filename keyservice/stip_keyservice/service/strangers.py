"""Refusals of callers that are nobody's users, as far as they proved: recorded, and bounded.

Whoever can reach the port, or an enclave, can be refused as often as they like, and must not fill the disk with it. Per
peer and minute the first few refusals are recorded in full; what comes after is counted, and the count becomes one
entry when the minute has ended. Peers beyond a number are counted together. The counts are in memory: a crash loses
those of its last minute, which the metrics of the same process would have lost too.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

MINUTE = 60
OTHERS = "others"
"""Who the peers beyond the bound are, together."""
DETAIL_LIMIT = 128


@dataclass(frozen=True)
class Folded:
    """The refusals of one peer in one minute that were not recorded one by one."""

    peer: str
    count: int
    code: str
    """The most frequent one."""
    detail: str
    """How many of each code."""


@dataclass
class _Tally:
    in_full: int = 0
    folded: Counter[str] = field(default_factory=Counter)


class Strangers:
    """Refusals of this minute, by peer. Safe from any thread."""

    def __init__(self, *, in_full: int = 8, peers: int = 64) -> None:
        """`in_full`: refusals of one peer recorded one by one, a minute. `peers`: those told apart, a minute."""
        self._in_full, self._peers = in_full, peers
        self._lock = threading.Lock()
        self._minute, self._tallies = 0, dict[str, _Tally]()
        self._ended: list[Folded] = []

    def recorded(self, peer: str, code: str, *, now: int) -> bool:
        """Whether this refusal gets an entry of its own. Where not, it has been counted."""
        with self._lock:
            self._turn(now)
            known = peer in self._tallies or len(self._tallies) < self._peers
            tally = self._tallies.setdefault(peer if known else OTHERS, _Tally())
            if known and tally.in_full < self._in_full:
                tally.in_full += 1
                return True
            tally.folded[code] += 1
            return False

    def ended(self, *, now: int) -> Sequence[Folded]:
        """What was folded in minutes that are over; each is handed out once."""
        with self._lock:
            self._turn(now)
            ended, self._ended = self._ended, []
            return ended

    def give_back(self, folded: Sequence[Folded]) -> None:
        """Keep what could not be written for the next time."""
        with self._lock:
            self._ended[:0] = folded[: self._peers + 1]

    def close(self) -> Sequence[Folded]:
        """Everything folded and not handed out yet, also of the running minute."""
        with self._lock:
            self._turn(self._minute * MINUTE + MINUTE)
            ended, self._ended = self._ended, []
            return ended

    def _turn(self, now: int) -> None:
        minute = now // MINUTE
        # Who read the clock just before the minute turned belongs to the one that runs: nobody begins anew by it.
        if minute > self._minute or minute < self._minute - 1:
            made = [_folded(peer, tally) for peer, tally in self._tallies.items() if tally.folded]
            # Minutes that nobody wrote (a database that does not answer) stay bounded: the newest are kept.
            self._ended = (self._ended + made)[-4 * (self._peers + 1) :]
            self._minute, self._tallies = minute, {}


def _folded(peer: str, tally: _Tally) -> Folded:
    common = tally.folded.most_common()
    detail = ", ".join(f"{code} {count}" for code, count in common)
    return Folded(peer, tally.folded.total(), common[0][0], detail[:DETAIL_LIMIT])
