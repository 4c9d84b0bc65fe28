"""Computing protected tensors, a row block at a time: W' = K_w·(W·γ)·K_r⁻¹ and b' = K_w·(b + W·β).

In stored orientation a part is S' = L·S·Rᵀ, with (L, R) = (K_w, K_r⁻ᵀ) for a matrix stored [out, in] and
(K_r⁻ᵀ, K_w) for one stored [in, out] (Conv1D). Keys that only move values and flip signs act on the stored
dtype and are bit-exact; all others act in float64, and the result is rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from stip_protocol.errors import CheckpointInvalid
from stip_protocol.keys import Key, Term

TORCH_DTYPE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that can be protected, by their safetensors names."""
_ROWS = 1024
"""Rows of W that one step of W·β reads."""


class TensorSource(Protocol):
    """The plain checkpoint, by stored name. Tensors come in their stored dtype, on the CPU, and are not written to.

    A permutation gathers rows from anywhere in a tensor, so `tensor` is asked again for every row block: keep
    the last one, or map the file.
    """

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) along the first axis."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        ...


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
        return torch.full((stop - start, *self.shape[1:]), self.value, dtype=torch.float64)


@dataclass(frozen=True, repr=False)
class Fold:
    """The γ and β of a norm that fold into the matrix after it. `shift` is added to a stored weight to give γ."""

    weight: str
    bias: str | None
    shift: float

    def gamma(self, source: TensorSource) -> torch.Tensor:
        return source.tensor(self.weight).double() + self.shift


@dataclass(frozen=True, repr=False)
class MatrixPart:
    """Slab [start, stop) of a stored matrix, between two keys. `reads` is the dual, K_r⁻ᵀ."""

    tensor: str
    start: int
    stop: int
    transposed: bool
    writes: Key
    reads: Key
    fold: Fold | None = None
    alias: str | None = None
    """Another stored name of the same values (a tied head that was stored too), compared while reading."""

    @property
    def sources(self) -> tuple[str, ...]:
        folded = (self.fold.weight,) if self.fold else ()
        return (self.tensor, *folded, *((self.alias,) if self.alias else ()))

    def block(self, source: TensorSource, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the part in stored orientation."""
        left, right = (self.reads, self.writes) if self.transposed else (self.writes, self.reads)
        exact = left.exact and right.exact and self.fold is None
        gamma = self.fold.gamma(source) if self.fold else None
        rows: torch.Tensor | None = None
        for term in left.terms(start, stop):
            taken = self._take(source, term.source)
            if not exact:
                taken = taken.double()
            if gamma is not None and self.transposed:
                taken = taken * gamma[_index(term.source)][:, None]
            if rows is None:
                rows = taken.new_zeros((stop - start, taken.shape[1]))
            _add(rows, term, taken, exact=exact)
        if rows is None:
            raise ValueError("an empty row block")
        if gamma is not None and not self.transposed:
            rows = rows * gamma
        return rows if right.identity else _columns(right, rows, exact=exact)

    def _take(self, source: TensorSource, index: slice | np.ndarray) -> torch.Tensor:
        taken = self._stored(source, self.tensor, index)
        if self.alias and not torch.equal(taken, self._stored(source, self.alias, index)):
            raise CheckpointInvalid.because(self.alias, "other values", f"those of {self.tensor}: the head is tied")
        return taken

    def _stored(self, source: TensorSource, name: str, index: slice | np.ndarray) -> torch.Tensor:
        if self.transposed:
            return gather(source, name, index)[:, self.start : self.stop]
        shifted = (
            slice(index.start + self.start, index.stop + self.start) if isinstance(index, slice) else index + self.start
        )
        return gather(source, name, shifted)


@dataclass(frozen=True, repr=False)
class VectorPart:
    """Slab [start, stop) of a stored vector under a key; with `matrix`, b + W·β instead of b (`tensor` None: b = 0)."""

    tensor: str | None
    start: int
    stop: int
    writes: Key
    matrix: MatrixPart | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        named = (self.tensor,) if self.tensor else ()
        if self.matrix is None or self.matrix.fold is None or self.matrix.fold.bias is None:
            return named
        return (*named, self.matrix.tensor, self.matrix.fold.bias)

    def vector(self, source: TensorSource) -> torch.Tensor:
        plain = source.tensor(self.tensor)[self.start : self.stop] if self.tensor else None
        moved = self._shift(source)
        if moved is not None:
            plain = moved if plain is None else plain.double() + moved
        if plain is None:
            raise ValueError("a vector part without a vector")
        exact = self.writes.exact and moved is None
        if not exact:
            plain = plain.double()
        out = plain.new_zeros((plain.shape[0], 1))
        for term in self.writes.terms(0, self.writes.size):
            _add(out, term, plain[_index(term.source), None], exact=exact)
        return out[:, 0]

    def _shift(self, source: TensorSource) -> torch.Tensor | None:
        """W·β, in float64."""
        part = self.matrix
        if part is None or part.fold is None or part.fold.bias is None:
            return None
        beta = source.tensor(part.fold.bias).double()
        if part.transposed:
            shift = torch.zeros(part.stop - part.start, dtype=torch.float64)
            for first in range(0, beta.shape[0], _ROWS):
                last = min(first + _ROWS, beta.shape[0])
                shift += beta[first:last] @ source.rows(part.tensor, first, last)[:, part.start : part.stop].double()
            return shift
        return torch.cat(
            [
                source.rows(part.tensor, first, min(first + _ROWS, part.stop)).double() @ beta
                for first in range(part.start, part.stop, _ROWS)
            ]
        )


@dataclass(frozen=True, repr=False)
class Matrix:
    """A stored matrix, put together from its parts along `out`."""

    parts: tuple[MatrixPart, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return _unique(name for part in self.parts for name in part.sources)

    def rows(self, source: TensorSource, start: int, stop: int) -> torch.Tensor:
        if self.parts[0].transposed:
            return torch.cat([part.block(source, start, stop) for part in self.parts], dim=1)
        return torch.cat(
            [
                part.block(source, max(start, part.start) - part.start, min(stop, part.stop) - part.start)
                for part in self.parts
                if max(start, part.start) < min(stop, part.stop)
            ]
        )


@dataclass(frozen=True, repr=False)
class Vector:
    """A stored vector, put together from its parts."""

    parts: tuple[VectorPart, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return _unique(name for part in self.parts for name in part.sources)

    def rows(self, source: TensorSource, start: int, stop: int) -> torch.Tensor:
        return torch.cat([part.vector(source) for part in self.parts])[start:stop]


def gather(source: TensorSource, name: str, index: slice | np.ndarray) -> torch.Tensor:
    """Rows of a stored tensor. Nearby rows are read as one range, scattered ones from the whole tensor."""
    if isinstance(index, slice):
        return source.rows(name, index.start, index.stop)
    low, high = int(index.min()), int(index.max()) + 1
    if high - low <= 2 * index.size:
        return source.rows(name, low, high)[torch.tensor(index - low)]
    return source.tensor(name)[torch.tensor(index)]


def stored(rows: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """Round once, to the stored dtype.

    Raises `CheckpointInvalid` where a value is not finite: it was not in the checkpoint, or does not fit.
    """
    rounded = rows.to(TORCH_DTYPE[dtype])
    if rows.dtype is torch.float64 and not torch.isfinite(rounded).all():
        raise CheckpointInvalid.because(name, "values that are not finite", f"values that fit {dtype} once keyed")
    return rounded.contiguous()


def _index(index: slice | np.ndarray) -> slice | torch.Tensor:
    return index if isinstance(index, slice) else torch.tensor(index)


def _add(out: torch.Tensor, term: Term, taken: torch.Tensor, *, exact: bool) -> None:
    """`out[term.out] += weight · taken`; in an exact key every row comes once, and is moved or negated."""
    if exact:
        negative = None if term.weight is None else torch.tensor(term.weight < 0)[:, None]
        out[term.out] = taken if negative is None else torch.where(negative, -taken, taken)
    elif term.weight is None:
        out[term.out] += taken
    elif term.weight.ndim == 2:
        out[term.out].addmm_(torch.tensor(term.weight), taken)
    else:
        out[term.out] += torch.tensor(term.weight)[:, None] * taken


def _columns(key: Key, rows: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """rows·Kᵀ: the key on the columns."""
    out = torch.zeros_like(rows)
    for term in key.terms(0, key.size):
        index = _index(term.source)
        taken = rows[:, index] if isinstance(index, slice) else rows.index_select(1, index)
        _add(out.T, term, taken.T, exact=exact)
    return out


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
