"""Which session holds which slot. Bookkeeping only: the cache carries the moves out."""

from __future__ import annotations

from dataclasses import dataclass

from stip_server.engines.transformers.sequence import Sequence


@dataclass(frozen=True)
class Vacate:
    """Empty a slot: the last slot's rows move in, and what no longer belongs to a session is zeroed.

    `source` equals `slot` where the last slot itself is left.
    """

    slot: int
    source: int
    rows: int
    """That the session that left ever wrote: also those that it took back."""
    moved: int
    """That the session in `source` ever wrote."""


class SlotTable:
    """Active slots are [0, len): a session that leaves is replaced by the last one, one copy instead of many."""

    def __init__(self) -> None:
        self._held: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, slot: int) -> Sequence:
        return self._held[slot]

    def assign(self, sequence: Sequence) -> None:
        """Give a session the next slot."""
        sequence.slot = len(self._held)
        self._held.append(sequence)

    def leave(self, sequence: Sequence) -> Vacate:
        """Take a session out; the session in the last slot takes its place."""
        slot, last = sequence.slot, self._held.pop()
        sequence.slot = -1
        source = len(self._held)
        if last is sequence:
            return Vacate(slot, slot, sequence.written, 0)
        last.slot = slot
        self._held[slot] = last
        return Vacate(slot, source, sequence.written, last.written)
