"""Where the rows of a step with several sessions stand: a rectangle of slots by rows, most of it somebody's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stip_server.engines.outputs import Piece
from stip_server.engines.transformers.attention import Run


@dataclass(frozen=True)
class Layout:
    """The slots of a step, each with `rows` rows. What is nobody's row stands at a position that exists, and is stored
    in none: `nowhere`."""

    slots: Sequence[int]
    """Ascending: those that are computed."""
    rows: int
    length: int
    """Positions that exist: the longest member's length after the step."""
    lowest: int
    """The lowest position of a member's row."""
    members: Sequence[Piece | None] = field(repr=False)
    """By slot of `slots`, who is computed there."""
    positions: list[list[int]] = field(repr=False)
    """[slots][rows]: where each row stands."""
    targets: list[list[int]] = field(repr=False)
    """[slots][rows]: where it is stored."""
    starts: list[int] = field(repr=False)
    """By piece of work: its first row, counted over the whole rectangle."""

    @classmethod
    def of(cls, work: Sequence[Piece], nowhere: int) -> Layout:
        """The slots of the members alone, with as many rows as the longest of them has."""
        return cls.within(work, nowhere, sorted(w.slot for w in work), max(w.count for w in work))

    @classmethod
    def within(cls, work: Sequence[Piece], nowhere: int, slots: Sequence[int], rows: int) -> Layout:
        """In a rectangle that is given and has room for all of `work`."""
        length, lowest = max(w.position + w.count for w in work), min(w.position for w in work)
        by_slot = {w.slot: w for w in work}
        members = [by_slot.get(slot) for slot in slots]
        positions, targets = [], []
        for w in members:
            own = list(range(w.position, w.position + w.count)) if w else []
            padding = rows - len(own)
            # The last position sees what exists there, if only zeros: a row that sees nothing would be no number.
            positions.append(own + [own[-1] if own else length - 1] * padding)
            targets.append(own + [nowhere] * padding)
        place = {slot: index * rows for index, slot in enumerate(slots)}
        return cls(slots, rows, length, lowest, members, positions, targets, [place[w.slot] for w in work])

    @property
    def first(self) -> int:
        return self.slots[0]

    @property
    def stop(self) -> int:
        return self.slots[-1] + 1

    @property
    def ragged(self) -> bool:
        """Whether some row does not stand at the last position."""
        return self.lowest + 1 != self.length

    @property
    def runs(self) -> tuple[Run, ...] | None:
        """The slots that follow each other; None where all do."""
        if self.stop - self.first == len(self.slots):
            return None
        borders = [i for i, slot in enumerate(self.slots) if i == 0 or slot != self.slots[i - 1] + 1]
        return tuple(
            Run(begin, end, self.slots[begin] - self.first)
            for begin, end in zip(borders, [*borders[1:], len(self.slots)], strict=True)
        )
