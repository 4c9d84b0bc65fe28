"""The weights of a model of transformers, found by parameter name in a checkpoint that may store them otherwise.

A checkpoint stores a stack of experts one by one where transformers 5 holds one parameter, ties a head to a
table, and lacks a prefix where it is of the base class. `Weights` answers for parameters; what is stored, and
where, stays behind it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from stip_keyservice.protect.folding import Stored, TensorSource
from stip_protocol.errors import StipError

Alter = Callable[[str, torch.Tensor], None]
"""What is done, in place, to a block of rows after it is read: (a name of the block, its rows as they are computed
with)."""
READ_VALUES = 1 << 18
"""Values that are read at once into memory that is there: more, given back, would be kept by an allocator."""
ALTERED_VALUES = 1 << 22
"""Values that are altered at once."""


def as_stored(name: str, rows: torch.Tensor) -> None:
    """No alteration."""


@dataclass(frozen=True)
class Weights:
    """Parameters in `dtype`, read from `source` at every call; nothing is kept.

    `stored` places every canonical tensor, `fused` gives the canonical tensors whose rows, one after another,
    are those of a parameter that has another name or form, and `refusal` is what a missing or needless tensor
    raises.
    """

    source: TensorSource
    stored: Mapping[str, Stored]
    fused: Mapping[str, tuple[str, ...]]
    dtype: torch.dtype
    refusal: type[StipError]
    alter: Alter = as_stored
    what: str = field(default="checkpoint")

    def canonical(self, parameter: str) -> tuple[str, ...]:
        """The canonical tensors that `parameter` consists of."""
        return self.fused.get(parameter, (parameter,))

    def check(self, parameters: Mapping[str, Sequence[int]]) -> None:
        """Raise `refusal` unless `parameters` (name → shape) are all there, of that many rows, and nothing else is."""
        used: set[str] = set()
        for parameter, shape in parameters.items():
            rows = 0
            for name in self.canonical(parameter):
                if name not in self.stored:
                    raise self.refusal.because(f"{self.what}, tensor {name}", "none", f"one, for {parameter}")
                rows += _length(self.stored[name])
                used.add(name)
            if rows != (expected := math.prod(shape[:-1]) if len(shape) > 1 else shape[0]):
                raise self.refusal.because(f"{self.what}, rows of {parameter}", rows, expected)
        if needless := sorted(self.stored.keys() - used):
            raise self.refusal.because(f"{self.what}, tensor {needless[0]}", "one", "none: no parameter reads it")

    def fill(self, parameter: str, out: torch.Tensor) -> None:
        """The whole parameter, into `out` of its shape."""
        rows = out if out.ndim == 1 else out.view(-1, out.shape[-1])
        reached = 0
        for name, first, last in self._pieces(parameter, 0, len(rows)):
            block = rows[reached : reached + last - first]
            step = max(1, READ_VALUES * len(rows) // max(1, rows.numel()))
            for start in range(first, last, step):
                stop = min(start + step, last)
                block[start - first : stop - first] = self.source.rows(self.stored[name].name, start, stop)
            self.alter(f"{name}/{first}", block)
            reached += last - first

    def rows(self, parameter: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the parameter, its axes but the last flattened."""
        blocks = []
        for name, first, last in self._pieces(parameter, start, stop):
            block = self.source.rows(self.stored[name].name, first, last).to(self.dtype)
            self.alter(f"{name}/{first}", block)
            blocks.append(block)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def chosen(self, parameter: str, index: torch.Tensor) -> torch.Tensor:
        """The rows at `index`, which ascends: runs of neighbours are read at once."""
        breaks = (torch.diff(index) != 1).nonzero().flatten() + 1
        runs = torch.tensor_split(index, breaks)
        return torch.cat([self.rows(parameter, int(run[0]), int(run[-1]) + 1) for run in runs])

    def _pieces(self, parameter: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """(canonical tensor, first and last stored row) of the parameter's rows [start, stop)."""
        offset = 0
        for name in self.canonical(parameter):
            place = self.stored[name]
            first, last = max(start, offset), min(stop, offset + _length(place))
            if first < last:
                yield name, place.start + first - offset, place.start + last - offset
            offset += _length(place)


def moved_within_rounding(dtype: torch.dtype, seed: int, rounded: Callable[[str], bool]) -> Alter:
    """Moves every weight of the tensors that are `rounded` anew at random by up to half the distance of its neighbours
    in `dtype`, to what it might have been before it was rounded; zeros stay. Norm weights stay too.

    What a block gets depends on `seed`, its name and place, so that it is the same however a file is read.
    """

    def move(name: str, rows: torch.Tensor) -> None:
        tensor = name.rpartition("/")[0]
        if not rounded(tensor) or (rows.ndim == 1 and not tensor.endswith("bias")):
            return
        drawn = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big", signed=True)
        generator = torch.Generator().manual_seed(drawn)
        for values in rows.split(max(1, ALTERED_VALUES * len(rows) // rows.numel())):  # type: ignore[no-untyped-call]
            step = torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps / 2), torch.frexp(values).exponent)
            step *= torch.rand(values.shape, generator=generator) - 0.5
            values += torch.where(values == 0, 0.0, step)

    return move


def _length(place: Stored) -> int:
    return place.stop - place.start
