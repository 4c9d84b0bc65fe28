"""Whose prompt is next: accounts take turns, and within one its sessions do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from stip_server.engine import Session
from stip_server.engines.transformers.sequence import Sequence


class Turns:
    """Round robin twice over. Whoever comes, comes last: leaving and joining again gains nothing."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._accounts: dict[bytes, tuple[int, int]] = {}
        """Of each account: its last turn, and its sessions."""
        self._sessions: dict[Session, int] = {}

    def join(self, sequence: Sequence) -> None:
        turn, sessions = self._accounts.get(sequence.account, (next(self._numbers), 0))
        self._accounts[sequence.account] = turn, sessions + 1
        self._sessions[sequence.session] = next(self._numbers)

    def leave(self, sequence: Sequence) -> None:
        turn, sessions = self._accounts.pop(sequence.account)
        if sessions > 1:
            self._accounts[sequence.account] = turn, sessions - 1
        del self._sessions[sequence.session]

    def next(self, waiting: Iterable[Sequence]) -> Sequence:
        """Who has waited longest for a turn; it has it now."""
        chosen = min(waiting, key=lambda s: (self._accounts[s.account][0], self._sessions[s.session]))
        turn = next(self._numbers)
        self._accounts[chosen.account] = turn, self._accounts[chosen.account][1]
        self._sessions[chosen.session] = turn
        return chosen
