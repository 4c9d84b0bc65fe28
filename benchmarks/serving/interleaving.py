"""Every arm once a round, in random order, on the same prompts: what the machine does meanwhile hits all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.samples import Order, Runner, Samples


class Budget:
    """Minutes that a run may take. What does not begin in time is left out and said to be."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        return time.monotonic() >= self._ends


@dataclass(frozen=True)
class Load:
    """What every arm of a cell is asked for, round after round."""

    streams: int
    prompt: int
    tokens: int
    rounds: int
    repeating: int | None = None
    """The prompt repeats its first so many ids: a text that can be guessed. None: all its ids are random."""

    def orders(self, vocabulary: int, seed: int) -> list[Order]:
        """One a round, of random ids."""
        generator = np.random.default_rng(seed)
        return [self._order(generator, vocabulary) for _ in range(self.rounds)]

    def _order(self, generator: np.random.Generator, vocabulary: int) -> Order:
        drawn = generator.integers(vocabulary, size=(self.streams, self.repeating or self.prompt))
        copies = -(-self.prompt // drawn.shape[1])
        return Order(np.tile(drawn, copies)[:, : self.prompt].tolist(), self.tokens)


LEAST_ROUNDS = 2
"""Where the budget ends within a cell, it stops after so many: one round has no interval."""


async def interleave(
    arms: Mapping[str, Runner], orders: Sequence[Order], budget: Budget, *, seed: int, say: Callable[[str], None]
) -> dict[str, list[Samples]]:
    """Arm to its runs, one a round. Rounds that the budget leaves no time for are not run."""
    shuffle = random.Random(seed)  # noqa: S311 - the order of arms is no secret
    runs: dict[str, list[Samples]] = {arm: [] for arm in arms}
    for number, order in enumerate(orders, start=1):
        if number > LEAST_ROUNDS and budget.spent:
            break
        for arm in shuffle.sample(list(arms), len(arms)):
            say(f"{len(order.prompts)} streams, round {number} of {len(orders)}, {arm}")
            runs[arm].append(await arms[arm](order))
    return runs


async def warm(arms: Mapping[str, Runner], order: Order) -> None:
    """Every arm once, unmeasured."""
    for run in arms.values():
        await run(order)
