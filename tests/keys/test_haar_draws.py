"""Orthogonal keys are Haar-distributed, centred ones so on the complement of the all-ones vector.

Mezzadri, "How to generate random matrices from the classical compact groups", Notices of the AMS 54 (2007).
Diaconis and Shahshahani, "On the eigenvalues of random matrices", J. Appl. Probab. 31A (1994).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from stip_protocol.keys import KeyStream, draw_centred_orthogonal, draw_orthogonal

from .chances import ROOTS, Sample, fails_beyond_doubt, mean, passes, same_distribution, streams, uniform

SIZES = [2, 3, 4, 5, 6]
DRAWS = 12_000
"""Matrices of each size, from right and wrong generators alike: a quarter under each root."""

Generator = Callable[[KeyStream, int, int], Sample]
"""From a stream, a count and a size n: matrices [count, n, n]."""


def complement(size: int) -> Sample:
    """[size, size + 1]: an orthonormal basis of what is orthogonal to the all-ones vector (Helmert 1876)."""
    rows = np.tril(np.ones((size, size + 1)))
    rows[np.arange(size), np.arange(1, size + 1)] = -np.arange(1, size + 1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def orthogonal(stream: KeyStream, count: int, size: int) -> Sample:
    return np.stack([draw_orthogonal(stream, size).matrix() for _ in range(count)])


def centred(stream: KeyStream, count: int, size: int) -> Sample:
    """What keys of one dimension more do on the complement."""
    basis = complement(size)
    return basis @ np.stack([draw_centred_orthogonal(stream, size + 1).matrix() for _ in range(count)]) @ basis.T


def qr_as_it_comes(stream: KeyStream, count: int, size: int) -> Sample:
    """Without the signs of R's diagonal: LAPACK's Householder reflections then show (Mezzadri 2007, §5)."""
    return np.linalg.qr(stream.normals(count * size * size).reshape(count, size, size)).Q


def qr_of_uniforms(stream: KeyStream, count: int, size: int) -> Sample:
    """With the signs, but of a matrix whose distribution no rotation leaves alone."""
    q, r = np.linalg.qr(2 * stream.uniforms(count * size * size).reshape(count, size, size) - 1)
    return q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]


def turns_of_planes(stream: KeyStream, count: int, size: int) -> Sample:
    """A uniform turn in the plane of each two axes, then a sign: Hurwitz (1897) needs other angles."""
    matrices = np.broadcast_to(np.eye(size), (count, size, size)).copy()
    for i in range(size):
        for j in range(i + 1, size):
            angle = 2 * np.pi * stream.uniforms(count)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
            matrices[:, [i, j], :] = turn @ matrices[:, [i, j], :]
    matrices[:, 0, :] *= 1.0 - 2.0 * stream.integers(2, count)[:, None]
    return matrices


def signed_permutations(stream: KeyStream, count: int, size: int) -> Sample:
    order = np.argsort(stream.words(count * size).reshape(count, size), axis=1)
    signs = 1.0 - 2.0 * stream.integers(2, count * size).reshape(count, size)
    return np.eye(size)[order] * signs[:, :, None]


def rotations_only(stream: KeyStream, count: int, size: int) -> Sample:
    """Haar on the half of determinant 1: a column is negated where needed."""
    matrices = haar_by_columns(stream, count, size)
    matrices[:, :, 0] *= np.linalg.det(matrices)[:, None]
    return matrices


def haar_by_columns(stream: KeyStream, count: int, size: int) -> Sample:
    """A right one, by Gram and Schmidt, to make wrong ones of."""
    columns = stream.normals(count * size * size).reshape(count, size, size)
    for j in range(size):
        for i in range(j):
            columns[:, :, j] -= (columns[:, :, i] * columns[:, :, j]).sum(1, keepdims=True) * columns[:, :, i]
        columns[:, :, j] /= np.linalg.norm(columns[:, :, j], axis=1, keepdims=True)
    return columns


@cache
def sample(generator: Generator, size: int) -> Sample:
    label = f"{generator.__name__} {size}"
    return np.concatenate([generator(stream, DRAWS // len(ROOTS), size) for stream in streams(label)])


def fixed_turn(size: int) -> Sample:
    return orthogonal(KeyStream(ROOTS[0], "fixed"), 1, size)[0]


def entries(matrices: Sample) -> list[Sample]:
    return list(matrices.reshape(len(matrices), -1).T)


def traces(matrices: Sample) -> Sample:
    """Rounded, for a reflection of the plane has trace 0, and the last bit of that 0 is not what is compared."""
    return np.round(np.trace(matrices, axis1=1, axis2=2), 9) + 0.0


def firsts(q: Sample) -> list[float]:
    """E Q_ij = 0, with variance 1/n."""
    return [mean(entry, 0, 1 / q.shape[1]) for entry in entries(q)]


def seconds(q: Sample) -> list[float]:
    """E Q_ij² = 1/n; Q_ij² is Beta(1/2, (n-1)/2), as for a coordinate of a random unit vector."""
    n = q.shape[1]
    return [mean(entry**2, 1 / n, 3 / (n * (n + 2)) - 1 / n**2) for entry in entries(q)]


def fourths(q: Sample) -> list[float]:
    """E Q_ij⁴ = 3/(n(n+2)), E Q_ij⁸ = 105/(n(n+2)(n+4)(n+6))."""
    n = q.shape[1]
    fourth, eighth = 3 / (n * (n + 2)), 105 / (n * (n + 2) * (n + 4) * (n + 6))
    return [mean(entry**4, fourth, eighth - fourth**2) for entry in entries(q)]


def trace_moments(q: Sample) -> list[float]:
    """E tr Q = 0, E (tr Q)² = 1, and E (tr Q)⁴ = 3 gives its variance (Diaconis and Shahshahani 1994; n ≥ 2)."""
    return [mean(traces(q), 0, 1), mean(traces(q) ** 2, 1, 2)]


def determinants(q: Sample) -> list[float]:
    """+1 and -1 alike."""
    return [mean(np.sign(np.linalg.det(q)), 0, 1)]


def left_invariance(q: Sample) -> list[float]:
    """Trace and corner of Q and of O·Q, in one half of the sample and the other."""
    return turned(q[::2], fixed_turn(q.shape[1]) @ q[1::2])


def right_invariance(q: Sample) -> list[float]:
    return turned(q[::2], q[1::2] @ fixed_turn(q.shape[1]))


def turned(a: Sample, b: Sample) -> list[float]:
    return [same_distribution(traces(a), traces(b)), same_distribution(a[:, 0, 0], b[:, 0, 0])]


Statistic = Callable[[Sample], list[float]]
SEEN_BY: dict[Statistic, list[Generator]] = {
    firsts: [qr_as_it_comes],
    seconds: [turns_of_planes],
    fourths: [qr_of_uniforms, signed_permutations],
    trace_moments: [qr_as_it_comes],
    determinants: [qr_as_it_comes, rotations_only],
    left_invariance: [qr_as_it_comes, signed_permutations],
    right_invariance: [qr_as_it_comes, signed_permutations],
}
"""Each statistic, and generators that it must tell from Haar measure."""
EXCEPT = {(seconds, turns_of_planes, 2), (fourths, qr_of_uniforms, 2)}
"""In the plane one uniform turn and a sign is right, and what a square does to the angle is found by its folds."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("generator", [orthogonal, centred])
@pytest.mark.parametrize("statistic", SEEN_BY)
def test_orthogonal_keys_are_haar(statistic: Statistic, generator: Generator, size: int) -> None:
    """12,000 matrices. False alarm: 1 in 10,000 for each statistic, kind and size."""
    assert passes(statistic(sample(generator, size)))


@pytest.mark.parametrize(
    ("statistic", "wrong", "size"),
    [
        (statistic, wrong, size)
        for statistic, generators in SEEN_BY.items()
        for wrong in generators
        for size in SIZES
        if (statistic, wrong, size) not in EXCEPT
    ],
)
def test_matrices_that_are_nearly_haar_are_found(statistic: Statistic, wrong: Generator, size: int) -> None:
    drawn = sample(wrong, size)
    assert np.allclose(drawn @ drawn.transpose(0, 2, 1), np.eye(size))  # orthogonal all the same
    assert fails_beyond_doubt(statistic(drawn))


def angle(q: Sample) -> list[float]:
    """The turn of the plane's first axis, and the same folded to an eighth, over rotations and over reflections."""
    turns = np.arctan2(q[:, 1, 0], q[:, 0, 0]) / (2 * np.pi) % 1
    rotation = np.linalg.det(q) > 0
    parts = [turns[part] for part in (rotation, ~rotation) if part.any()]
    return [uniform(part) for part in parts] + [uniform(np.abs(8 * part % 2 - 1)) for part in parts]


@pytest.mark.parametrize("generator", [orthogonal, centred])
def test_orthogonal_keys_turn_the_plane_by_any_angle(generator: Generator) -> None:
    """Kolmogorov-Smirnov over 12,000. False alarm: 1 in 10,000 for each kind."""
    assert passes(angle(sample(generator, 2)))


@pytest.mark.parametrize("wrong", [qr_as_it_comes, qr_of_uniforms, signed_permutations])
def test_angles_that_are_preferred_are_found(wrong: Generator) -> None:
    assert fails_beyond_doubt(angle(sample(wrong, 2)))


def test_a_centred_key_of_the_plane_is_a_sign_on_its_diagonal() -> None:
    """±½·[[1, -1], [-1, 1]], alike. False alarm: 1 in 10,000."""
    drawn = np.concatenate([centred(stream, DRAWS // len(ROOTS), 1) for stream in streams("line")])
    assert np.allclose(np.abs(drawn), 1, atol=1e-15)
    assert passes([mean(drawn.ravel(), 0, 1)])


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 64])
def test_centred_keys_drop_the_all_ones_vector_both_ways(size: int) -> None:
    basis, ones = complement(size - 1), np.ones(size)
    for stream in streams("both ways"):
        key = draw_centred_orthogonal(stream, size)
        for matrix in (key.matrix(), key.inverse.matrix(), key.dual.matrix()):
            assert np.allclose(matrix @ ones, 0, atol=1e-12)
            assert np.allclose(ones @ matrix, 0, atol=1e-12)
            inner = basis @ matrix @ basis.T
            assert np.allclose(inner @ inner.T, np.eye(size - 1), atol=1e-12)
