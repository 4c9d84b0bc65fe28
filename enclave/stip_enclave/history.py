"""All ids of one session, in order: what it can be replayed from on any replica."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FIRST_ROOM = 256
"""Ids held before the array grows for the first time; then it doubles."""


class History:
    """The ids that a client sent and was given, oldest first. Lives in the enclave alone."""

    def __init__(self) -> None:
        self._room: NDArray[np.uint32] = np.empty(FIRST_ROOM, np.uint32)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> NDArray[np.uint32]:
        """uint32 [n], a view that is good until the next `extend`."""
        return self._room[: self._length]

    def extend(self, ids: NDArray[Any] | list[int]) -> None:
        """Add ids [k] behind the others."""
        end = self._length + len(ids)
        if end > len(self._room):
            grown = np.empty(max(end, 2 * len(self._room)), np.uint32)
            grown[: self._length] = self.ids
            self._room.fill(0)
            self._room = grown
        self._room[self._length : end] = ids
        self._length = end

    def part(self, start: int, end: int | None = None) -> NDArray[np.uint32]:
        """A copy of the ids from `start` to `end`."""
        return self.ids[start:end].copy()

    def agrees(self, start: int, ids: NDArray[np.uint32]) -> int:
        """How many of `ids`, from the first on, are the history's from `start` on."""
        own = self.ids[start : start + len(ids)]
        differing = np.flatnonzero(own != ids[: len(own)])
        return int(differing[0]) if differing.size else len(own)

    def clear(self) -> None:
        """Forget all, and overwrite it: the session has ended."""
        self._room.fill(0)
        self._room, self._length = np.zeros(0, np.uint32), 0
