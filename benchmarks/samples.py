"""What one run of one arm gives: when the tokens of each stream came."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Samples:
    """Seconds since the streams began together, one list a stream."""

    times: list[list[float]]
    ids: list[list[int]] = field(repr=False)
    """The tokens themselves, to hold the arms' answers against each other."""
    head: float | None = None
    """Mean seconds of the enclave's head over a step, where it has one."""

    @property
    def first(self) -> list[float]:
        """Time to first token of each stream. Raises `ValueError` where one ended before another began."""
        if not all(self.times):
            raise ValueError("a stream had all its tokens before another had its first: ask for more tokens")
        return [times[0] for times in self.times]

    @property
    def gaps(self) -> list[float]:
        """Times between tokens while every stream was decoding: after the last stream's first token."""
        begins = max(self.first)
        return [
            later - earlier for times in self.times for earlier, later in itertools.pairwise(times) if earlier >= begins
        ]
