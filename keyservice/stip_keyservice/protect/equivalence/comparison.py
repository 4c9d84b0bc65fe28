"""Differences between two lists of vectors, gathered batch by batch: hidden states in keyed coordinates, logits.

Everything is summed in float64. `spread` is the standard deviation of the reference's values in a row (a
position's hidden state, or its logits), averaged over rows: what differences are relative to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict

from stip_protocol.keys import Key

BLOCK_VALUES = 1 << 23
"""Values that are compared at once."""


class Differences(BaseModel):
    """Absolute differences from a reference, and the reference's spread. NaN where a value is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    largest: float
    mean: float
    rms: float
    spread: float

    @property
    def relative_largest(self) -> float:
        """Over the spread."""
        return self.largest / (self.spread or 1.0)

    @property
    def relative_mean(self) -> float:
        """Over the spread."""
        return self.mean / (self.spread or 1.0)

    @property
    def relative_rms(self) -> float:
        """Over the spread."""
        return self.rms / (self.spread or 1.0)


@dataclass
class Tally:
    """Sums over pairs of rows [n, width]."""

    rows: int = 0
    values: int = 0
    largest: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    spread: float = 0.0

    def add(self, reference: torch.Tensor, found: torch.Tensor) -> None:
        """Both [n, width]."""
        step = max(1, BLOCK_VALUES // reference.shape[1])
        for start in range(0, len(reference), step):
            expected = reference[start : start + step].double()
            difference = (expected - found[start : start + step].double()).abs()
            total = difference.sum().item()
            self.largest = max(self.largest, difference.max().item()) if math.isfinite(total) else math.nan
            self.total += total
            self.squares += difference.square().sum().item()
            self.spread += expected.std(dim=1).sum().item()
            self.rows += len(expected)
            self.values += difference.numel()

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            rows=self.rows + other.rows,
            values=self.values + other.values,
            largest=max(self.largest, other.largest) if math.isfinite(self.largest + other.largest) else math.nan,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            spread=self.spread + other.spread,
        )

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.values)

    def figures(self) -> Differences:
        return Differences(
            largest=self.largest, mean=self.total / self.values, rms=self.rms, spread=self.spread / self.rows
        )


@dataclass
class Picks:
    """Logits against logits: their differences, and whether both pick the same id."""

    tally: Tally = field(default_factory=Tally)
    same: int = 0
    gaps: list[torch.Tensor] = field(default_factory=list)
    """[n]: the reference's own gap between its pick and the other's."""

    def add(self, reference: torch.Tensor, found: torch.Tensor) -> None:
        """Both [n, vocabulary]."""
        self.tally.add(reference, found)
        expected, picked = reference.argmax(1, keepdim=True), found.argmax(1, keepdim=True)
        self.same += int((picked == expected).sum())
        self.gaps.append((reference.gather(1, expected).double() - reference.gather(1, picked).double()).flatten())

    def __add__(self, other: Picks) -> Picks:
        return Picks(self.tally + other.tally, self.same + other.same, self.gaps + other.gaps)

    @property
    def top1(self) -> float:
        """Share of positions where both pick the same id."""
        return self.same / self.tally.rows

    def top1_with_ties(self, width: float) -> float:
        """The same, where a gap of at most `width` counts as agreement."""
        return int((torch.cat(self.gaps) <= width).sum()) / self.tally.rows


def keyed(key: Key, rows: torch.Tensor) -> torch.Tensor:
    """Plain rows [n, size] as the key's space carries them, in float64."""
    return torch.from_numpy(key.apply(rows.double().numpy().T)).T
