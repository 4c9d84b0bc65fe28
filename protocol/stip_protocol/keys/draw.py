"""Drawing keys from key streams.

A space of one dimension gets the identity: its only lossless keys are public signs. The exceptions are a centred
space of one dimension, which holds nothing and keeps nothing, and rotary pairs, which have two.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stip_protocol.keys.algebra import Centred, Identity, Key, Monomial, Orthogonal, Permutation, RotaryPairs
from stip_protocol.keys.stream import KeyStream

SCALE_BOUND = 2.0
"""Largest scale, and one over the smallest: bounds what a scale can cost in low-precision dtypes to one bit."""
VOCABULARY_LABEL = "space/vocabulary"
"""Label of the seed that a grant carries where the head is on the server: `derive(root, VOCABULARY_LABEL)`."""
STREAM_LABEL = "key"
"""Label of a space's stream under its seed."""


def _order(stream: KeyStream, size: int) -> NDArray[np.intp]:
    """A uniform permutation: the order of distinct random words, drawn again on a tie, is exactly uniform."""
    while True:
        words = stream.words(size)
        order = np.argsort(words, kind="stable")
        ranked = words[order]
        if (ranked[1:] != ranked[:-1]).all():
            return order


def draw_permutation(stream: KeyStream, size: int) -> Permutation:
    """A uniform permutation, the same on any machine."""
    return Permutation(_order(stream, size))


def draw_monomial(stream: KeyStream, size: int) -> Key:
    """A uniform permutation with a diagonal of random signs and log-uniform scales in [1/SCALE_BOUND, SCALE_BOUND]."""
    if size == 1:
        return Identity(size)
    order = _order(stream, size)
    return Monomial(order, _signs(stream, size) * _scales(stream, size))


def draw_signed_permutation(stream: KeyStream, size: int) -> Key:
    """A uniform permutation with a diagonal of random signs: the bit-exact part of `draw_monomial`."""
    return Identity(size) if size == 1 else Monomial(_order(stream, size), _signs(stream, size))


def draw_positive_monomial(stream: KeyStream, size: int) -> Key:
    """A uniform permutation with a diagonal of log-uniform scales in [1/SCALE_BOUND, SCALE_BOUND].

    For ReLU, which positive scales pass through and signs do not: relu(s·x) = s·relu(x) where s > 0.
    """
    return Identity(size) if size == 1 else Monomial(_order(stream, size), _scales(stream, size))


def draw_orthogonal(stream: KeyStream, size: int) -> Key:
    """A Haar-distributed orthogonal matrix: QR of a Gaussian with R's diagonal made positive (Mezzadri 2007)."""
    return Identity(size) if size == 1 else Orthogonal(_haar(stream, size))


def draw_centred_orthogonal(stream: KeyStream, size: int) -> Key:
    """A Haar-distributed orthogonal matrix on the complement of the all-ones vector: what LayerNorms leave to see.

    K = H·diag(0, Q)·H with Q Haar on n-1 dimensions and H the reflection that exchanges e₁ and 1/√n·(1, …, 1):
    what the norm subtracts is dropped, and the variance that it divides by stays. One dimension is all mean: K = 0.
    """
    if size == 1:
        return Centred(np.zeros((1, 1)))
    axis = -np.full(size, 1.0 / np.sqrt(size))
    axis[0] += 1.0
    axis /= np.linalg.norm(axis)
    matrix = np.zeros((size, size))
    matrix[1:, 1:] = _haar(stream, size - 1)
    matrix -= 2.0 * np.outer(axis, axis @ matrix)
    matrix -= 2.0 * np.outer(matrix @ axis, axis)
    return Centred(matrix)


def draw_pair_scalars(stream: KeyStream, size: int) -> Key:
    """A complex scalar per rotary pair: uniform angle, log-uniform scale in [1/SCALE_BOUND, SCALE_BOUND]."""
    return RotaryPairs(_scales(stream, size // 2), 2.0 * np.pi * stream.uniforms(size // 2))


def draw_pair_signs(stream: KeyStream, size: int) -> Key:
    """A sign per rotary pair (j, j + n/2): the bit-exact part of `draw_pair_scalars`."""
    return Monomial(np.arange(size), np.tile(_signs(stream, size // 2), 2))


def draw_pair_scales(stream: KeyStream, size: int) -> Key:
    """A real factor per rotary pair (j, j + n/2), ±s with s log-uniform in [1/SCALE_BOUND, SCALE_BOUND].

    The part of `draw_pair_scalars` that leaves each number where it is.
    """
    half = size // 2
    return Monomial(np.arange(size), np.tile(_signs(stream, half) * _scales(stream, half), 2))


def vocabulary_key(seed: bytes, size: int) -> Permutation:
    """π_c of a vocabulary of `size` ids, from the seed `derive(root, VOCABULARY_LABEL)`.

    `logits'[i] = logits[π_c.index[i]]`: position i of the server's row is the true id `π_c.index[i]`.
    """
    return draw_permutation(KeyStream(seed, STREAM_LABEL), size)


def _signs(stream: KeyStream, count: int) -> NDArray[np.float64]:
    signs: NDArray[np.float64] = np.where(stream.integers(2, count) == 0, 1.0, -1.0)
    return signs


def _scales(stream: KeyStream, count: int) -> NDArray[np.float64]:
    scales: NDArray[np.float64] = np.exp((2.0 * stream.uniforms(count) - 1.0) * np.log(SCALE_BOUND))
    return scales


def _haar(stream: KeyStream, size: int) -> NDArray[np.float64]:
    q, r = np.linalg.qr(stream.normals(size * size).reshape(size, size))
    haar: NDArray[np.float64] = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return haar
