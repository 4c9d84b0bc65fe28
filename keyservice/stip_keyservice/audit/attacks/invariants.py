"""What no key of the inner spaces changes: pure algebra over folded matrices.

A residual key K turns what reads the residual into W·K⁻¹ and what writes it into K·W; the keys of heads and
feed-forwards act on the other side. Products in which that other side cancels are conjugated by K alone, and what is
sorted or normalised over it is moved by K alone. Two networks with the same plain weights then give K away; the
methods here need nothing else, and degrade gently where the weights are not quite the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from stip_keyservice.audit.attacks.folded import Doubles, Folded, Layer
from stip_keyservice.audit.view import Floats, Ids

NEGLIGIBLE = 1e-7
"""Eigenvalues below this share of the largest are zeros of a product of thin matrices."""
SETTLED = 1e-3
"""Relative change of an iterate that ends power iteration."""
ITERATIONS = 100


def conjugated(folded: Folded, layer: Layer) -> list[Doubles]:
    """Symmetric [e, e] matrices of one layer, in the coordinates of `folded.seen`, that each key of the inner spaces
    leaves as they are and a residual key K turns into K·M·Kᵀ.

    Reorderings cancel in sums over rows, diagonals in normalised rows, orthogonal maps of a head in W·Wᵀ, a complex
    scalar on a rotary pair in the normalised pair; anything invertible cancels in W_o·W_v and W_qᵀ·W_k.
    """
    seen, heads, kv_heads = folded.seen, folded.heads, folded.kv_heads
    queries, keys, values = (each.weight @ seen for each in (layer.queries, layer.keys, layer.values))
    output, up, down = seen.T @ layer.output.weight, layer.up.weight @ seen, seen.T @ layer.down.weight
    pair = unit_pairs if folded.names.rotary else _rows
    found = [
        _gram(pair(queries, heads)),
        _gram(pair(keys, kv_heads)),
        _gram(values),
        _gram(output.T),
        _gram(units(up)),
        _gram(units(down.T)),
        _symmetric(output @ _repeated(values, heads, kv_heads)),
        _symmetric(queries.T @ _repeated(keys, heads, kv_heads)),
        _symmetric(down @ up),
    ]
    return found + ([_gram(layer.gate.weight @ seen)] if layer.gate else [])


def flattened(matrix: Doubles) -> Doubles:
    """A function of a symmetric matrix [e, e]: its eigenvalues replaced by their ranks, spread evenly over [-1, 1].

    It commutes with conjugation, has no trace, and moves little where a drift mixes neighbouring eigenvectors; the
    eigenvectors of the zeros of a thin product, which are arbitrary, share their mean rank.
    """
    eigenvalues, vectors = np.linalg.eigh(matrix)
    ranks = np.linspace(-1.0, 1.0, len(matrix))
    zeros = np.abs(eigenvalues) < NEGLIGIBLE * np.abs(eigenvalues).max()
    if zeros.any():
        ranks[zeros] = ranks[zeros].mean()
    flat: Doubles = (vectors * ranks) @ vectors.T
    return flat


def conjugator(ours: Sequence[Doubles], theirs: Sequence[Doubles], generator: np.random.Generator) -> Doubles:
    """The orthogonal K [e, e], up to its sign, with ours[i] ≈ K·theirs[i]·Kᵀ for flattened symmetric matrices.

    Power iteration X ← Σ ours[i]·X·theirs[i]. With X = K·Y it is Y ← Σ M·Y·M, a completely positive map, whose
    Perron vector is a positive matrix (Evans and Høegh-Krohn 1978): X becomes K·Y with Y > 0, and K is X's polar
    factor. A handful of matrices in general position leaves a wide gap to the second eigenvalue (quantum expanders:
    Hastings, Phys. Rev. A 76, 032315, 2007), so that a random start settles in tens of rounds.
    """
    width, count = len(ours[0]), len(ours)
    left = np.concatenate(ours).astype(np.float32)
    right = np.concatenate(theirs).astype(np.float32)
    x: Floats = generator.standard_normal((width, width)).astype(np.float32)
    for _ in range(ITERATIONS):
        before = x
        products = (left @ x).reshape(count, width, width)
        x = (products.transpose(1, 0, 2).reshape(width, -1) @ right).astype(np.float32)
        x /= np.float32(np.linalg.norm(x))
        if np.linalg.norm(x - before) < SETTLED:
            break
    return polar(x.astype(np.float64))


def polar(matrix: Doubles) -> Doubles:
    """The nearest orthogonal matrix; for Bᵀ·A the solution K of A ≈ B·K (Procrustes: Schönemann 1966)."""
    left, _, right = np.linalg.svd(matrix)
    nearest: Doubles = left @ right
    return nearest


def sorted_columns(matrix: Doubles) -> Doubles:
    """[in, out]: the sorted absolute values of each column of [out, in]. No reordering or negation of the rows shows
    in it, and a reordering of the columns reorders it."""
    return np.sort(np.abs(matrix), axis=0).T


def units(rows: Doubles) -> Doubles:
    """[n, d] rows of length one; zero rows stay zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


def matched(rows: Doubles, others: Doubles) -> tuple[Ids, Doubles]:
    """For each of `rows` [n, d] the one of `others` [m, d] with the largest |cosine|, and that cosine with its sign."""
    ours, theirs = units(rows).astype(np.float32), units(others).astype(np.float32)
    indices, cosines = [], []
    for block in np.array_split(ours, max(1, len(ours) * len(theirs) >> 24)):
        products = block @ theirs.T
        best = np.abs(products).argmax(axis=1)
        indices.append(best)
        cosines.append(np.take_along_axis(products, best[:, None], axis=1)[:, 0])
    return np.concatenate(indices).astype(np.int64), np.concatenate(cosines).astype(np.float64)


def layers_of(ours: Folded, theirs: Folded, most: int) -> Iterator[tuple[Layer, Layer]]:
    """At most so many pairs of layers, evenly spaced: the first always."""
    count = len(ours.layers)
    for number in np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)):
        yield ours.layers[number], theirs.layers[number]


def _gram(rows: Doubles) -> Doubles:
    return rows.T @ rows


def _symmetric(matrix: Doubles) -> Doubles:
    return matrix + matrix.T


def _rows(rows: Doubles, heads: int) -> Doubles:
    return rows


def unit_pairs(rows: Doubles, heads: int) -> Doubles:
    """Rows of heads, each rotary pair (j, j + w/2) brought to length one."""
    pairs = rows.reshape(heads, 2, -1, rows.shape[1])
    lengths = np.sqrt((pairs**2).sum(axis=(1, 3), keepdims=True))
    return (pairs / np.where(lengths > 0, lengths, 1.0)).reshape(rows.shape)


def _repeated(rows: Doubles, heads: int, kv_heads: int) -> Doubles:
    """Key-value heads, each as often as query heads share it."""
    return np.repeat(rows.reshape(kv_heads, -1, rows.shape[1]), heads // kv_heads, axis=0).reshape(-1, rows.shape[1])
