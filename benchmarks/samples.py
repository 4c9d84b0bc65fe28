"""What one run of one arm gives: when the tokens of each stream came.

A run has two turns. In the first, all prompts depart together and each stream has one token: that is prefill and time
to first token. In the second, every stream goes on from one more id and decodes: that is time per token, with no prompt
in between. An engine may take the streams up one by one, each for one token of the others: a run needs a few tokens
more than it has streams.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Order:
    """One run that is asked of an arm: a stream a prompt."""

    prompts: list[list[int]] = field(repr=False)
    tokens: int
    """Of the second turn, a stream; the run ends when the first stream has them all."""

    @property
    def seconds(self) -> list[list[int]]:
        """The prompts of the second turn: the first id of the first, again."""
        return [prompt[:1] for prompt in self.prompts]


@dataclass(frozen=True)
class Samples:
    """Seconds since each turn began, one entry a stream."""

    first: list[float]
    """Time to the first token, of the first turn."""
    times: list[list[float]]
    """When the tokens of the second turn came."""
    ids: list[list[int]] = field(repr=False)
    """The tokens of both turns, to hold the arms' answers against each other."""
    head: float | None = None
    """Mean seconds of the enclave's head over a step of the second turn, where it has one."""

    @property
    def gaps(self) -> list[float]:
        """Times between tokens while every stream was decoding. Raises `ValueError` where there were none."""
        return [gap for stream in self._steady() for gap in stream]

    @property
    def pace(self) -> list[float]:
        """The mean of a stream's gaps, for tokens that come several at a time. Raises as `gaps`."""
        return [sum(stream) / len(stream) for stream in self._steady() if stream]

    def _steady(self) -> list[list[float]]:
        """The gaps of each stream after the last one's first token."""
        if not all(self.times):
            raise ValueError("a stream had all its tokens before another had its first: ask for more tokens")
        begins = max(times[0] for times in self.times)
        steady = [
            [later - earlier for earlier, later in itertools.pairwise(times) if earlier >= begins]
            for times in self.times
        ]
        if not any(steady):
            raise ValueError("no two tokens came while every stream was decoding: ask for more tokens")
        return steady


Runner = Callable[[Order], Awaitable[Samples]]
"""An arm."""
