"""Computing protected tensors, a row block at a time: W' = K_w·(W·γ)·K_r⁻¹ and b' = K_w·(b + W·β).

In stored orientation a part is S' = L·S·Rᵀ, with (L, R) = (K_w, K_r⁻ᵀ) for a matrix stored [out, in] and
(K_r⁻ᵀ, K_w) for one stored [in, out] (Conv1D). Keys that only move values and flip signs act on the stored
dtype and are bit-exact; all others act in float64, and the result is rounded once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from stip_keyservice.protect.application import Index, Rows, gathered, mixed, mixed_columns, moves
from stip_protocol.errors import CheckpointInvalid
from stip_protocol.keys import Key

TORCH_DTYPE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that can be protected, by their safetensors names."""
_ROWS = 1024
"""Rows of W that one step of W·β reads."""
_NEAR = 2
"""Rows are read for a block alone where they lie within this many times as many; otherwise the whole matrix is kept."""

Range = tuple[int, int]


class TensorSource(Protocol):
    """The plain checkpoint, by stored name. Tensors come in their stored dtype, on the CPU, and are not written to.

    A tensor of three axes (a stack of experts) is seen as a matrix: its first two axes as one. A vector's rows
    are its elements. Asked from several threads.
    """

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), read for this call."""
        ...

    def span(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The same, kept for the calls that follow: the blocks of one matrix gather from all of it."""
        ...


@dataclass(frozen=True)
class Stored:
    """Where a plain tensor lies: rows [start, stop) of a stored one."""

    name: str
    start: int
    stop: int

    def whole(self, source: TensorSource) -> torch.Tensor:
        """All of it, kept."""
        return source.span(self.name, self.start, self.stop)


class Recipe(Protocol):
    """How one output tensor is computed."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Stored names of the tensors read."""
        ...

    def rows(self, source: TensorSource, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), in the tensor's own dtype where exact and in float64 otherwise."""
        ...


@dataclass(frozen=True)
class Constant:
    """A tensor that says nothing about the model: γ = 1, β = 0 after folding, the absent embedding."""

    value: float
    shape: tuple[int, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return ()

    def rows(self, source: TensorSource, start: int, stop: int) -> torch.Tensor:
        return torch.full(
            (stop - start, *self.shape[1:]), self.value, dtype=torch.bfloat16
        )  # 0 and 1, exact in any dtype


@dataclass(frozen=True, repr=False)
class Fold:
    """The γ and β of a norm that fold into the matrix after it. `shift` is added to a stored weight to give γ."""

    weight: Stored
    bias: Stored | None
    shift: float
    absorbed_at: float = 0.0
    """Where W·β has no bias to go to: the c that the norm holds for β. See `MatrixPart`."""

    def gamma(self, source: TensorSource) -> torch.Tensor:
        return self.weight.whole(source).double() + self.shift

    def beta(self, source: TensorSource) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.whole(source).double()


@dataclass(frozen=True, repr=False)
class MatrixPart:
    """A slab of a stored matrix, between two keys. `reads` is the dual, K_r⁻ᵀ.

    Where the fold absorbs: the norm is a LayerNorm, whose normalised output has no mean, K_r drops the all-ones
    direction, and the norm is left with β = c·1, so that what is read is K_r·n + c·1. Adding (W·β)·1ᵀ/(c·d) to the
    matrix then adds W·β to the product, and nothing else of the matrix sees the ones.
    """

    tensor: Stored
    ranges: tuple[Range, ...]
    """Of `out`, within the plain tensor."""
    transposed: bool
    writes: Key
    reads: Key
    fold: Fold | None = None
    alias: Stored | None = None
    """Another place of the same values (a tied head that was stored too), compared while reading."""
    scale: float = 1.0
    """Factor of a table's rows."""

    @property
    def sources(self) -> tuple[str, ...]:
        fold = self.fold
        folded = (fold.weight.name,) if fold else ()
        absorbed = (fold.bias.name,) if fold and fold.absorbed_at and fold.bias else ()
        return (self.tensor.name, *folded, *absorbed, *((self.alias.name,) if self.alias else ()))

    @property
    def size(self) -> int:
        """Rows along `out`."""
        return sum(stop - start for start, stop in self.ranges)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """What the part has of rows [start, stop) of the plain tensor: (row of the tensor, first, last of the part)."""
        done = 0
        for low, high in self.ranges:
            first, last = max(start, low), min(stop, high)
            if first < last:
                yield first, done + first - low, done + last - low
            done += high - low

    def block(self, source: TensorSource, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the protected part in stored orientation."""
        left, right = (self.reads, self.writes) if self.transposed else (self.writes, self.reads)
        moved = moves(left, start, stop)
        columns = None if self.fold or self.scale != 1.0 else moves(right, 0, right.size)
        if moved and columns:
            return columns.columns(moved.signed(self.rows(source, moved.index)))
        wide = self._wide(source)
        rows = moved.signed(wide(moved.index)) if moved else mixed(left, wide, start, stop)
        if self.fold is None or self.transposed:
            return mixed_columns(right, rows)
        keyed = mixed_columns(right, rows * self.fold.gamma(source))
        if self.fold.absorbed_at and (beta := self.fold.beta(source)) is not None:
            keyed = keyed + (rows @ beta / (beta.shape[0] * self.fold.absorbed_at))[:, None]
        return keyed

    def rows(self, source: TensorSource, index: slice | Index) -> torch.Tensor:
        """Plain rows, along `out` of the part, or along `in` of a matrix that is stored transposed."""
        taken = self._gather(source, self.tensor, index)
        if self.alias and not torch.equal(taken, self._gather(source, self.alias, index)):
            allowed = f"those of {self.tensor.name}: the head is tied"
            raise CheckpointInvalid.because(self.alias.name, "other values", allowed)
        if not self.transposed:
            return taken
        pieces = [taken[:, low:high] for low, high in self.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _wide(self, source: TensorSource) -> Rows:
        """Plain rows in float64, times what scales them."""

        def rows(index: slice | Index) -> torch.Tensor:
            taken = self.rows(source, index).double()
            if self.scale != 1.0:
                taken = taken * self.scale
            if self.fold is None or not self.transposed:
                return taken
            at = index if isinstance(index, slice) else torch.tensor(index)
            return taken * self.fold.gamma(source)[at][:, None]

        return rows

    def _gather(self, source: TensorSource, stored: Stored, index: slice | Index) -> torch.Tensor:
        """Rows near each other are read as one range, scattered ones from the whole tensor."""
        rows = np.arange(index.start, index.stop) if isinstance(index, slice) else index
        places = rows if self.transposed else self._places(rows)
        low, high = int(places.min()), int(places.max()) + 1
        if high - low > _NEAR * len(places):
            return gathered(stored.whole(source), places, axis=0)
        near = source.rows(stored.name, stored.start + low, stored.start + high)
        in_order = high - low == len(places) and bool((np.diff(places) == 1).all())
        return near if in_order else gathered(near, places - low, axis=0)

    def _places(self, rows: Index) -> Index:
        """Rows of the plain tensor that rows of the part are."""
        if len(self.ranges) == 1:
            return rows + self.ranges[0][0]
        lows = np.array([low for low, _ in self.ranges])
        sizes = np.array([high - low for low, high in self.ranges])
        ends = np.cumsum(sizes)
        which = np.searchsorted(ends, rows, side="right")
        places: Index = (lows - (ends - sizes))[which] + rows
        return places


@dataclass(frozen=True, repr=False)
class VectorPart:
    """A slab of a stored vector under a key; with `matrix`, b + W·β instead of b (`tensor` None: b = 0)."""

    tensor: Stored | None
    ranges: tuple[Range, ...]
    writes: Key
    matrix: MatrixPart | None = None
    shift: float = 0.0
    """Added to a stored value before the key acts and taken off again: γ, where a model stores γ - 1."""

    @property
    def sources(self) -> tuple[str, ...]:
        named = (self.tensor.name,) if self.tensor else ()
        if self.matrix is None or self.matrix.fold is None or self.matrix.fold.bias is None:
            return named
        return (*named, self.matrix.tensor.name, self.matrix.fold.bias.name)

    def vector(self, source: TensorSource) -> torch.Tensor:
        """The protected part, in the stored dtype where exact and in float64 otherwise."""
        plain = None
        if self.tensor:
            whole = self.tensor.whole(source)
            plain = torch.cat([whole[low:high] for low, high in self.ranges])
        moved_by = self._shift(source)
        if moved_by is not None:
            plain = moved_by if plain is None else plain.double() + moved_by
        if plain is None:
            raise ValueError("a vector part without a vector")
        moved = moves(self.writes, 0, self.writes.size)
        if moved and (self.shift == 0.0 or moved.negative is None):
            return moved.signed(plain[torch.tensor(moved.index)][:, None])[:, 0]
        column = plain.double()[:, None] + self.shift
        return mixed(self.writes, _rows_of(column), 0, self.writes.size)[:, 0] - self.shift

    def _shift(self, source: TensorSource) -> torch.Tensor | None:
        """W·β, in float64."""
        part = self.matrix
        beta = part.fold.beta(source) if part and part.fold and not part.fold.absorbed_at else None
        if part is None or beta is None:
            return None
        if part.transposed:
            shift = torch.zeros(part.size, dtype=torch.float64)
            for first in range(0, beta.shape[0], _ROWS):
                last = min(first + _ROWS, beta.shape[0])
                shift += beta[first:last] @ part.rows(source, slice(first, last)).double()
            return shift
        steps = [slice(first, min(first + _ROWS, part.size)) for first in range(0, part.size, _ROWS)]
        return torch.cat([part.rows(source, step).double() @ beta for step in steps])


@dataclass(frozen=True, repr=False)
class Matrix:
    """A stored matrix, put together from its parts along `out`."""

    parts: tuple[MatrixPart, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return _unique(name for part in self.parts for name in part.sources)

    def rows(self, source: TensorSource, start: int, stop: int) -> torch.Tensor:
        if self.parts[0].transposed:
            return _interleaved(
                ((low, high), columns)
                for part in self.parts
                for (low, high), columns in _cut(part.ranges, part.block(source, start, stop))
            )
        pieces = sorted(
            (row, number, first, last)
            for number, part in enumerate(self.parts)
            for row, first, last in part.pieces(start, stop)
        )
        blocks = [self.parts[number].block(source, first, last) for _, number, first, last in pieces]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


@dataclass(frozen=True, repr=False)
class Vector:
    """A stored vector, put together from its parts."""

    parts: tuple[VectorPart, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return _unique(name for part in self.parts for name in part.sources)

    def rows(self, source: TensorSource, start: int, stop: int) -> torch.Tensor:
        whole = _interleaved(
            ((low, high), rows[0])
            for part in self.parts
            for (low, high), rows in _cut(part.ranges, part.vector(source)[None])
        )
        return whole[start:stop]


def stored(rows: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """Round once, to the stored dtype.

    Raises `CheckpointInvalid` where a value is not finite: it was not in the checkpoint, or does not fit.
    """
    rounded = rows.to(TORCH_DTYPE[dtype])
    # NaN is the least and the largest there; twenty times as fast as asking every value.
    if not all(math.isfinite(extreme) for extreme in torch.stack(torch.aminmax(rounded)).tolist()):
        raise CheckpointInvalid.because(name, "values that are not finite", f"values that fit {dtype} once keyed")
    return rounded.contiguous()


def _rows_of(matrix: torch.Tensor) -> Rows:
    return lambda index: matrix[index if isinstance(index, slice) else torch.tensor(index)]


def _cut(ranges: Sequence[Range], rows: torch.Tensor) -> Iterator[tuple[Range, torch.Tensor]]:
    """The columns of a part, range by range."""
    sizes = [high - low for low, high in ranges]
    yield from zip(ranges, torch.split(rows, sizes, dim=1), strict=True)


def _interleaved(pieces: Iterable[tuple[Range, torch.Tensor]]) -> torch.Tensor:
    """Pieces in the order of their ranges, joined along the last axis."""
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], dim=-1)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
