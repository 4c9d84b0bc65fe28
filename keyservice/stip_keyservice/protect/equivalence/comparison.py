"""Differences between two lists of vectors, gathered batch by batch: hidden states in keyed coordinates, logits.

Everything is summed in float64. `spread` is the standard deviation of the reference's values in a row (a
position's hidden state, or its logits), averaged over rows: what differences are relative to. One row or one column
that is wrong among many right ones hardly shows in figures of all: the worst of each is told too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict

from stip_protocol.keys import Key

BLOCK_VALUES = 1 << 20
"""Values that are compared at once."""


class Differences(BaseModel):
    """Absolute differences from a reference, and the reference's spread. NaN where a value is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    largest: float
    mean: float
    rms: float
    spread: float
    worst_row_rms: float
    """Root mean square of the row that differs most: of one position."""
    worst_column_rms: float
    """The same of a column: of one id, over all positions."""

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

    @property
    def relative_worst_row(self) -> float:
        """Over the spread."""
        return self.worst_row_rms / (self.spread or 1.0)

    @property
    def relative_worst_column(self) -> float:
        """Over the spread."""
        return self.worst_column_rms / (self.spread or 1.0)


@dataclass
class Tally:
    """Sums over pairs of rows [n, width]."""

    rows: int = 0
    values: int = 0
    largest: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    spread: float = 0.0
    worst_row: float = 0.0
    """Mean square of the row that differs most."""
    columns: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    """[width] sums of squares, or [1] before there is a row."""

    def add(self, reference: torch.Tensor, found: torch.Tensor) -> None:
        """Both [n, width]."""
        step = max(1, BLOCK_VALUES // reference.shape[1])
        for start in range(0, len(reference), step):
            expected = reference[start : start + step].double()
            difference = expected.sub(found[start : start + step]).abs_()
            total, largest = difference.sum().item(), difference.max().item()
            self.largest = max(self.largest, largest) if math.isfinite(total) else math.nan
            self.total += total
            squares = difference.square_()
            self.squares += squares.sum().item()
            self.worst_row = max(self.worst_row, squares.mean(dim=1).max().item())
            self.columns = self.columns + squares.sum(dim=0)
            self.spread += expected.std(dim=1, correction=0).sum().item()
            self.rows += len(expected)
            self.values += squares.numel()

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            rows=self.rows + other.rows,
            values=self.values + other.values,
            largest=max(self.largest, other.largest) if math.isfinite(self.largest + other.largest) else math.nan,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            spread=self.spread + other.spread,
            worst_row=max(self.worst_row, other.worst_row),
            columns=self.columns + other.columns,
        )

    @property
    def rms(self) -> float:
        """NaN where there is no row."""
        return math.sqrt(self.squares / self.values) if self.values else math.nan

    def figures(self) -> Differences:
        """NaN where there is no row: nothing was compared."""
        rows = self.rows or math.nan
        return Differences(
            largest=self.largest if self.rows else math.nan,
            mean=self.total / self.values if self.values else math.nan,
            rms=self.rms,
            spread=self.spread / rows,
            worst_row_rms=math.sqrt(self.worst_row),
            worst_column_rms=math.sqrt(self.columns.max().item() / rows),
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
        """Share of positions where both pick the same id; 0 of none."""
        return self.same / self.tally.rows if self.tally.rows else 0.0

    def top1_with_ties(self, width: float) -> float:
        """The same, where a gap of at most `width` counts as agreement."""
        return int((torch.cat(self.gaps) <= width).sum()) / self.tally.rows if self.tally.rows else 0.0


def keyed(key: Key, rows: torch.Tensor) -> torch.Tensor:
    """Plain rows [n, size] as the key's space carries them, in float64."""
    return torch.from_numpy(key.apply(rows.double().numpy().T)).T
