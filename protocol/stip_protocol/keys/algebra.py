"""Keys on a flat space: the maps, their duals and inverses, applied in row blocks.

A key describes rows [start, stop) of its matrix as `Term`s, so that a caller with its own arrays (a tensor
library, a stream of blocks) applies it without a dense matrix, and moves raw values where the key is exact.
`Key.apply` is the definition in NumPy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stip_protocol.errors import Unrepresentable

Index = NDArray[np.intp]
Vector = NDArray[np.float64]
Array = NDArray[Any]

CHUNK = 1024
"""Source rows of one dense term: bounds the float64 copy that applying it makes."""


@dataclass(frozen=True, repr=False, eq=False)
class Term:
    """`out[self.out] += weight · x[self.source]`, with rows of `out` counted from the block's start.

    `weight` None moves the rows, a vector scales them one by one, a matrix [out, source] mixes them.
    """

    out: slice
    source: slice | Index
    weight: Vector | None


class Key(ABC):
    """An invertible linear map x' = K·x on a space of `size` dimensions (`Centred`: on all of it that is read).

    Immutable; its repr has no content.
    """

    size: int

    @abstractmethod
    def terms(self, start: int, stop: int) -> Iterator[Term]:
        """Rows [start, stop) of K. In an exact key each row of the block is in exactly one term."""

    @property
    @abstractmethod
    def inverse(self) -> Key:
        """K⁻¹."""

    @property
    @abstractmethod
    def dual(self) -> Key:
        """K⁻ᵀ: what covectors take."""

    @property
    @abstractmethod
    def permutation_part(self) -> Key:
        """The permutation of a permutation-times-diagonal key. Raises `Unrepresentable` for a dense one."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether K only moves values and flips signs, so that it is bit-exact in any dtype."""

    @property
    def identity(self) -> bool:
        """Whether K is the identity map."""
        return False

    def apply(self, x: Array, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of K·x, for x of shape [size] or [size, n].

        The dtype of `x` is kept where the key is exact; otherwise the result is float64.
        """
        stop = self.size if stop is None else stop
        out = np.zeros((stop - start, *x.shape[1:]), x.dtype if self.exact else np.float64)
        for term in self.terms(start, stop):
            rows = x[term.source]
            if term.weight is None:
                out[term.out] += rows
            elif term.weight.ndim == 2:
                out[term.out] += term.weight @ rows
            else:
                scale = term.weight.astype(out.dtype).reshape(-1, *(1,) * (x.ndim - 1))
                out[term.out] += scale * rows
        return out

    def matrix(self) -> Vector:
        """K as a dense float64 matrix, for audits and tests."""
        return self.apply(np.eye(self.size))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size})"


def _frozen(array: Array) -> Array:
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array


class Identity(Key):
    """No key: public spaces, and spaces of one dimension."""

    def __init__(self, size: int) -> None:
        self.size = size

    def terms(self, start: int, stop: int) -> Iterator[Term]:
        yield Term(slice(0, stop - start), slice(start, stop), None)

    @property
    def inverse(self) -> Key:
        return self

    @property
    def dual(self) -> Key:
        return self

    @property
    def permutation_part(self) -> Key:
        return self

    @property
    def exact(self) -> bool:
        return True

    @property
    def identity(self) -> bool:
        return True


class Monomial(Key):
    """A permutation and a diagonal: (K·x)[i] = scale[i] · x[index[i]], with no zero on the diagonal."""

    def __init__(self, index: Array, scale: Array) -> None:
        """`index`: a permutation of 0 .. n-1. `scale`: n finite non-zero float64."""
        self.index: Index = _frozen(np.asarray(index, dtype=np.intp))
        self.scale: Vector = _frozen(np.asarray(scale, dtype=np.float64))
        self.size = self.index.size
        _require_permutation(self.index)
        if self.scale.shape != self.index.shape or not (np.isfinite(self.scale) & (self.scale != 0)).all():
            raise ValueError("scale: one finite non-zero number per dimension")

    def terms(self, start: int, stop: int) -> Iterator[Term]:
        yield Term(slice(0, stop - start), self.index[start:stop], self.scale[start:stop])

    @property
    def inverse(self) -> Key:
        back = np.argsort(self.index)
        return Monomial(back, 1.0 / self.scale[back])

    @property
    def dual(self) -> Key:
        return Monomial(self.index, 1.0 / self.scale)

    @property
    def permutation_part(self) -> Key:
        return Permutation(self.index)

    @property
    def exact(self) -> bool:
        return bool((np.abs(self.scale) == 1.0).all())

    @property
    def identity(self) -> bool:
        return bool((self.scale == 1.0).all() and (self.index == np.arange(self.size)).all())


class Permutation(Key):
    """A permutation: (K·x)[i] = x[index[i]]. Its own dual."""

    def __init__(self, index: Array) -> None:
        """`index`: a permutation of 0 .. n-1."""
        self.index: Index = _frozen(np.asarray(index, dtype=np.intp))
        self.size = self.index.size
        _require_permutation(self.index)

    def terms(self, start: int, stop: int) -> Iterator[Term]:
        yield Term(slice(0, stop - start), self.index[start:stop], None)

    @property
    def inverse(self) -> Permutation:
        return Permutation(np.argsort(self.index))

    @property
    def dual(self) -> Key:
        return self

    @property
    def permutation_part(self) -> Key:
        return self

    @property
    def exact(self) -> bool:
        return True

    @property
    def identity(self) -> bool:
        return bool((self.index == np.arange(self.size)).all())


class Orthogonal(Key):
    """A dense orthogonal matrix in float64. Its own dual."""

    def __init__(self, matrix: Array) -> None:
        """`matrix`: [n, n], orthogonal; the caller's promise, because checking costs a product."""
        self._matrix: Vector = _frozen(np.asarray(matrix, dtype=np.float64))
        self.size = self._matrix.shape[0]
        if self._matrix.shape != (self.size, self.size):
            raise ValueError("matrix: square")

    def terms(self, start: int, stop: int) -> Iterator[Term]:
        for first in range(0, self.size, CHUNK):
            source = slice(first, min(first + CHUNK, self.size))
            yield Term(slice(0, stop - start), source, self._matrix[start:stop, source])

    @property
    def inverse(self) -> Key:
        return Orthogonal(self._matrix.T)

    @property
    def dual(self) -> Key:
        return self

    @property
    def permutation_part(self) -> Key:
        raise Unrepresentable.because("permutation part", "a dense key", "a permutation times a diagonal")

    @property
    def exact(self) -> bool:
        return False

    @property
    def identity(self) -> bool:
        on_diagonal = (np.diagonal(self._matrix) == 1.0).all()  # what tells nearly always, at no cost
        return bool(on_diagonal and (self._matrix == np.eye(self.size)).all())


class Centred(Orthogonal):
    """Orthogonal on the complement of the all-ones vector, which it drops: for spaces that LayerNorms alone read.

    They subtract the mean (Ba et al. 2016), so what a vector or a matrix has along (1, …, 1) tells nobody
    anything but an observer. Invertible up to that mean: `inverse`, the transpose, is the pseudo-inverse.
    """

    @property
    def inverse(self) -> Key:
        return Centred(self._matrix.T)


class RotaryPairs(Key):
    """A complex scalar s·e^{iθ} on each rotary pair: the maps that commute with rotary position embedding.

    Pairs are half-split, (j, j + n/2), as Hugging Face stores them (Su et al., arXiv 2104.09864 interleave).
    Queries take the key and keys its dual (1/s)·e^{iθ}, which leaves every q·k unchanged.
    """

    def __init__(self, scale: Array, angle: Array) -> None:
        """`scale` and `angle` (radians): [n/2], scale positive."""
        self._scale: Vector = _frozen(np.asarray(scale, dtype=np.float64))
        self._angle: Vector = _frozen(np.asarray(angle, dtype=np.float64))
        if self._scale.shape != self._angle.shape or not (np.isfinite(self._scale) & (self._scale > 0)).all():
            raise ValueError("scale: one finite positive number per pair")
        self.size = 2 * self._scale.size

    def terms(self, start: int, stop: int) -> Iterator[Term]:
        half = self._scale.size
        rows = np.arange(start, stop)
        pair = rows % half
        sign = np.where(rows < half, -1.0, 1.0)
        yield Term(slice(0, stop - start), rows, self._scale[pair] * np.cos(self._angle[pair]))
        yield Term(
            slice(0, stop - start), (rows + half) % self.size, sign * self._scale[pair] * np.sin(self._angle[pair])
        )

    @property
    def inverse(self) -> Key:
        return RotaryPairs(1.0 / self._scale, -self._angle)

    @property
    def dual(self) -> Key:
        return RotaryPairs(1.0 / self._scale, self._angle)

    @property
    def permutation_part(self) -> Key:
        raise Unrepresentable.because("permutation part", "a rotary key", "a permutation times a diagonal")

    @property
    def exact(self) -> bool:
        return False

    @property
    def identity(self) -> bool:
        return bool((self._scale == 1.0).all() and (self._angle == 0.0).all())


def _require_permutation(index: Index) -> None:
    if index.ndim != 1 or not (np.sort(index) == np.arange(index.size)).all():
        raise ValueError("index: every number from 0 to size - 1 once")
