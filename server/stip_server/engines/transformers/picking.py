"""The next ids of the sessions that decode alone, for all sessions of a step at once.

Greedy takes the largest logit, ties to the smallest (permuted) id. Otherwise, in float64: divide by the temperature,
keep the `top_k` largest (ties by smallest id), softmax, keep the smallest descending prefix whose mass reaches `top_p`
(nucleus sampling, Holtzman et al., arXiv 1904.09751), renormalise, and invert the cumulative distribution at
u = Philox(key = seed, counter = step) (Salmon et al., SC11): a draw depends on (seed, step) and its row alone.

That is the rule by which enclaves sample, so a generation may go on in another place without repeating a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch

from stip_server.engine import Generation

REACH = 256
"""Candidates that are sorted at first; `GROWTH` times more wherever the draw lies beyond."""
GROWTH = 8


@dataclass(frozen=True, slots=True)
class Draw:
    """How one session's id is drawn."""

    temperature: float
    top_k: int
    top_p: float
    seed: int = field(repr=False)
    step: int

    @classmethod
    def of(cls, generation: Generation, drawn: int) -> Self:
        """The draw after `drawn` ids of a generation."""
        step = generation.step + drawn
        return cls(generation.temperature, generation.top_k, generation.top_p, generation.seed, step)

    def uniform(self) -> float:
        """u in [0, 1)."""
        return float(np.random.Generator(np.random.Philox(key=self.seed, counter=self.step)).random())


def pick(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """One id a row of `logits` [n, V], finite, of any floating dtype and on any device."""
    picked: list[int] = logits.argmax(dim=-1).tolist()  # the first of equal ones, by torch's word
    sampled = [i for i, draw in enumerate(draws) if draw.temperature > 0.0]
    if not sampled:
        return picked
    rows = Rows.of(logits[sampled], [draws[i] for i in sampled])
    reach = max(REACH, *(draw.top_k + 1 for draw in rows.draws))
    while sampled:
        found = rows.within(reach)
        for i, one in zip(sampled, found, strict=True):
            picked[i] = picked[i] if one is None else one
        left = [n for n, one in enumerate(found) if one is None]
        sampled, rows, reach = [sampled[n] for n in left], rows.only(left), reach * GROWTH
    return picked


@dataclass(frozen=True)
class Rows:
    """Rows to draw from. Tensors are [m, 1] but for `logits` [m, V]."""

    logits: torch.Tensor = field(repr=False)
    draws: list[Draw]
    temperature: torch.Tensor = field(repr=False)
    largest: torch.Tensor = field(repr=False)
    kept: torch.Tensor = field(repr=False)
    """How many of the largest may be drawn: V where all."""
    nucleus: torch.Tensor = field(repr=False)
    """The mass of which the smallest prefix is kept; above 1 where the whole is."""
    uniform: torch.Tensor = field(repr=False)
    total: torch.Tensor = field(repr=False)
    """The weight of all, where all may be drawn."""

    @classmethod
    def of(cls, logits: torch.Tensor, draws: list[Draw]) -> Self:
        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

        vocabulary = logits.shape[-1]
        kept = [min(draw.top_k or vocabulary, vocabulary) for draw in draws]
        temperature, largest = column([draw.temperature for draw in draws]), logits.amax(-1, keepdim=True).double()
        total = torch.zeros_like(temperature)
        if whole := [n for n, count in enumerate(kept) if count == vocabulary]:
            total[whole] = ((logits[whole].double() - largest[whole]) / temperature[whole]).exp().sum(-1, keepdim=True)
        return cls(
            logits,
            draws,
            temperature,
            largest,
            torch.tensor(kept, device=logits.device)[:, None],
            column([draw.top_p if 0.0 < draw.top_p < 1.0 else 2.0 for draw in draws]),
            column([draw.uniform() for draw in draws]),
            total,
        )

    def only(self, chosen: list[int]) -> Rows:
        """Some of the rows."""
        tensors = (self.temperature, self.largest, self.kept, self.nucleus, self.uniform, self.total)
        return Rows(self.logits[chosen], [self.draws[n] for n in chosen], *(tensor[chosen] for tensor in tensors))

    def within(self, reach: int) -> list[int | None]:
        """The ids drawn from the `reach` largest of each row; None where they do not decide."""
        vocabulary = self.logits.shape[-1]
        reach = min(reach, vocabulary)
        values, ids = _descending(self.logits, reach)
        mass = ((values.double() - self.largest) / self.temperature).exp().cumsum(-1)
        last = self.kept.clamp(max=reach) - 1
        limited = self.kept < vocabulary
        total = torch.where(limited, mass.gather(-1, last), self.total)
        # What equals the last candidate may go on outside, with smaller ids: only those before it are sure.
        sure = (values > values[:, -1:]).sum(-1, keepdim=True) if reach < vocabulary else torch.full_like(last, reach)
        cut = self.nucleus <= 1.0
        end = torch.where(cut, torch.minimum(torch.searchsorted(mass, self.nucleus * total), last), last)
        drawn = torch.where(cut, mass.gather(-1, end), total)
        place = torch.minimum(torch.searchsorted(mass, self.uniform * drawn, right=True), end)
        needed = torch.maximum(torch.where(cut, end, place), torch.where(limited, last, place)) + 1
        decided = (needed <= sure)[:, 0].tolist()
        return [one if good else None for one, good in zip(ids.gather(-1, place)[:, 0].tolist(), decided, strict=True)]


def _descending(logits: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, ids) of the `reach` largest of each row, by descending logit, then by ascending id."""
    if reach == logits.shape[-1]:
        ordered = logits.sort(dim=-1, descending=True, stable=True)
        return ordered.values, ordered.indices
    ids = logits.topk(reach, dim=-1).indices.sort(dim=-1).values
    ordered = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return ordered.values, ids.gather(-1, ordered.indices)
