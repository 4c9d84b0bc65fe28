"""Who is let in: sessions and positions are counted, and no account keeps the others out. No clock of its own.

As long as nobody was turned away lately, an account may take whatever is free. While others wait, what is free goes to
who holds least: an account whose dominant share (of sessions or of positions, whichever is larger) exceeds that of one
that waits gets no more. So nothing stays unused that only one wants, and shares move towards those of dominant resource
fairness (Ghodsi et al., NSDI 2011) as sessions end. Nobody is evicted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from stip_protocol.errors import Overloaded

TURNED_AWAY = 1024
"""Accounts that are remembered as waiting for room, at most."""
RETRY_LEAST, RETRY_MOST = 0.1, 30.0
"""Seconds. Bounds of what is said about trying again; who does not within the larger one is forgotten."""
GAP_SMOOTHING = 1 / 8
FIRST_GAP = 1.0
"""Seconds between the ends of sessions, until two were seen."""


@dataclass(frozen=True)
class Refusal:
    """The last one of an account that waits."""

    at: float
    ends: int
    """Sessions that had ended by then."""
    times: int
    """Refusals since the last of those ended."""


class Admission:
    """Counts what is held. Times in seconds of one monotonic clock."""

    def __init__(self, sessions: int, positions: int) -> None:
        self._limits = {"sessions": sessions, "positions": positions}
        self._held: dict[bytes, Counter[str]] = {}
        self._total: Counter[str] = Counter()
        self._waiting: OrderedDict[bytes, Refusal] = OrderedDict()
        self._last_end: float | None = None
        self._gap: float | None = None
        self._ends = 0

    def enter(self, account: bytes, positions: int, now: float) -> None:
        """Let a session in, or raise `Overloaded` with the seconds after which trying again may help."""
        asked = Counter(sessions=1, positions=positions)
        outweighs = self._share(account) > self._least_waiting(account, now)
        for what, limit in self._limits.items():
            if outweighs or asked[what] > limit - self._total[what]:
                raise self._overloaded(account, what, limit, now)
        self._waiting.pop(account, None)
        self._held.setdefault(account, Counter()).update(asked)
        self._total.update(asked)

    def leave(self, account: bytes, positions: int, now: float) -> None:
        """A session ended."""
        ended = Counter(sessions=1, positions=positions)
        self._total.subtract(ended)
        self._held[account].subtract(ended)
        if not self._held[account]["sessions"]:
            del self._held[account]
        if self._last_end is not None:
            gap = now - self._last_end
            self._gap = gap if self._gap is None else self._gap + GAP_SMOOTHING * (gap - self._gap)
        self._last_end, self._ends = now, self._ends + 1

    def retry_after(self, account: bytes | None = None) -> float:
        """Seconds after which there may be room: for every other account that waits once, and for as many sessions of
        this one as were turned away since the last end. Who asks again and again waits longer, and nobody else does."""
        gap = FIRST_GAP if self._gap is None else self._gap
        own = self._waiting.get(account) if account is not None else None
        ahead = len(self._waiting) if own is None else len(self._waiting) - 1 + own.times
        return min(max(RETRY_LEAST, gap * max(1, ahead)), RETRY_MOST)

    def _share(self, account: bytes) -> float:
        """The largest part that an account holds of anything."""
        held = self._held.get(account)
        return max(held[what] / limit for what, limit in self._limits.items()) if held else 0.0

    def _least_waiting(self, account: bytes, now: float) -> float:
        """The smallest share of another account that waits."""
        while self._waiting and next(iter(self._waiting.values())).at < now - RETRY_MOST:
            self._waiting.popitem(last=False)
        return min((self._share(other) for other in self._waiting if other != account), default=1.0)

    def _overloaded(self, account: bytes, what: str, limit: int, now: float) -> Overloaded:
        before = self._waiting.get(account)
        times = before.times + 1 if before is not None and before.ends == self._ends else 1
        self._waiting[account] = Refusal(now, self._ends, times)
        self._waiting.move_to_end(account)
        if len(self._waiting) > TURNED_AWAY:
            self._waiting.popitem(last=False)
        held = self._total[what]
        return Overloaded(
            f"{what}: got {held} of {limit} taken, allowed: what is free, and while others wait no more than they hold",
            field=what,
            retry_after=self.retry_after(account),
        )
