"""Rows of a table against rows under a secret key: nearest neighbours, and keys from matched rows.

Rows are vectors; a keyed row is K·x. All arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stip_keyservice.audit.view import Floats, Ids

Doubles = NDArray[np.float64]

BLOCK = 256
"""Queries compared at a time: bounds memory at BLOCK x V distances."""
CENTRED = 1e-4
"""Mean of a row over its length below which it counts as centred; a row of d random entries has about 1/d."""
RANK = 1e-6
"""Singular values below this share of the largest are rounding."""


def nearest(queries: Doubles | Floats, table: Doubles | Floats, count: int) -> tuple[Ids, Doubles]:
    """The `count` rows of `table` [V, d] that are nearest to each of `queries` [m, d] in Euclidean distance.

    Returns indices [m, count], the nearest first, and their distances [m, count]. `count` is cut to V.
    """
    wide, count = np.asarray(table, np.float64), min(count, len(table))
    squares = np.einsum("vd,vd->v", wide, wide)
    found, distances = [], []
    for first in range(0, len(queries), BLOCK):
        block = np.asarray(queries[first : first + BLOCK], np.float64)
        # |q - t|² less |q|²: that is the same for all rows of the table
        scores = squares - 2 * block @ wide.T
        best = np.argpartition(scores, count - 1, axis=1)[:, :count]
        # exact differences for the few that count: the expanded square loses half of the digits
        gaps = np.linalg.norm(wide[best] - block[:, None], axis=2)
        order = np.lexsort((best, gaps), axis=1)
        found.append(np.take_along_axis(best, order, axis=1))
        distances.append(np.take_along_axis(gaps, order, axis=1))
    if not found:
        return np.zeros((0, count), np.int64), np.zeros((0, count))
    return np.concatenate(found).astype(np.int64), np.concatenate(distances)


def is_centred(rows: Doubles | Floats) -> bool:
    """Whether every one of these rows [m, d] has mean 0: a key of a LayerNorm's residual drops the mean."""
    wide = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    return bool((np.abs(wide.sum(axis=1)) <= CENTRED * np.sqrt(wide.shape[1]) * lengths).all())


def centred(rows: Doubles | Floats) -> Doubles:
    """Rows [m, d] less their means."""
    wide = np.asarray(rows, np.float64)
    return np.asarray(wide - wide.mean(axis=1, keepdims=True))


def comparable(plain: Doubles | Floats, keyed: Doubles | Floats) -> Doubles:
    """`plain` rows [V, d], less their means where those were dropped from the `keyed` ones [m, d]."""
    return centred(plain) if is_centred(keyed) else np.asarray(plain, np.float64)


def procrustes(plain: Doubles | Floats, keyed: Doubles | Floats) -> Doubles:
    """The orthogonal K [d, d] with the least |keyed - plain·Kᵀ|, for matched rows [m, d].

    Schönemann, Psychometrika 31 (1966): K = U·Vᵀ of the singular value decomposition keyedᵀ·plain = U·S·Vᵀ. Fewer than
    d independent rows leave K free outside of their span; what is returned then is one choice.
    """
    left, _, right = np.linalg.svd(np.asarray(keyed, np.float64).T @ np.asarray(plain, np.float64))
    return np.asarray(left @ right)


@dataclass(frozen=True)
class Alignment:
    """An orthogonal key as far as matched rows tell it: on their span of r dimensions."""

    plain: Doubles
    """[d, r] an orthonormal basis of the span of the plain rows."""
    keyed: Doubles
    """[d, r] where the key takes it."""
    key: Doubles
    """[d, d] the key, completed outside of the span in some orthogonal way."""

    def plain_features(self, rows: Doubles | Floats) -> Doubles:
        """[m, r + 1] of plain rows [m, d]: what the key is known to keep."""
        return _features(np.asarray(rows, np.float64), self.plain)

    def keyed_features(self, rows: Doubles | Floats) -> Doubles:
        """[m, r + 1] of keyed rows [m, d]: equal to the plain rows' where they match."""
        return _features(np.asarray(rows, np.float64), self.keyed)


def align(plain: Doubles | Floats, keyed: Doubles | Floats) -> Alignment:
    """What matched rows [m, d], m >= 1, tell about their key; as `procrustes`, with the span it holds for."""
    left, lengths, right = np.linalg.svd(np.asarray(keyed, np.float64).T @ np.asarray(plain, np.float64))
    rank = max(1, int((lengths > RANK * lengths[0]).sum()))
    return Alignment(right[:rank].T, left[:, :rank], left @ right)


def _features(rows: Doubles, basis: Doubles) -> Doubles:
    """Coordinates in the span, and the length of what is left: the least distance under any completion of the key."""
    inside = rows @ basis
    rest = np.einsum("md,md->m", rows, rows) - np.einsum("mr,mr->m", inside, inside)
    return np.column_stack([inside, np.sqrt(np.maximum(rest, 0))])


def signed_permutation(plain: Doubles | Floats, keyed: Doubles | Floats) -> Doubles:
    """The signed permutation K [d, d] that takes the columns of `plain` [m, d] to those of `keyed` [m, d] best.

    A column of the keyed rows goes with the plain one, or its negative, at the least distance; where several want the
    same one, the nearest gets it and the others' rows of K stay 0. One row is enough where its values are distinct.
    """
    wide, other = np.asarray(plain, np.float64), np.asarray(keyed, np.float64)
    products = other.T @ wide
    squares = (other**2).sum(axis=0)[:, None] + (wide**2).sum(axis=0)[None, :] - 2 * np.abs(products)
    wishes, gaps = squares.argmin(axis=1), squares.min(axis=1)
    found = np.zeros_like(products)
    taken: set[int] = set()
    for column in np.argsort(gaps, kind="stable"):
        wish = int(wishes[column])
        if wish not in taken:
            taken.add(wish)
            found[column, wish] = 1.0 if products[column, wish] >= 0 else -1.0
    return found
