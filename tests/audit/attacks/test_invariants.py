"""What is compared between two networks is what only the residual key can change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stip_keyservice.audit.attacks.folded import complement, fold
from stip_keyservice.audit.attacks.invariants import (
    conjugated,
    conjugator,
    flattened,
    layers_of,
    matched,
    polar,
    sorted_columns,
)
from tests.audit.attacks import relatives

WIDTH = 24


def generator(seed: int = 3) -> np.random.Generator:
    return np.random.default_rng(seed)


def orthogonal(width: int, seed: int = 3) -> np.ndarray:
    return np.asarray(np.linalg.qr(generator(seed).normal(size=(width, width)))[0])


def symmetric(seed: int, width: int = WIDTH, rank: int = WIDTH) -> np.ndarray:
    rows = generator(seed).normal(size=(rank, width))
    return np.asarray(rows.T @ rows)


@pytest.mark.parametrize("preset", ["paper", "hardened"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_key_but_the_residuals_changes_what_is_compared(
    ground: Any, tmp_path: Path, family: str, preset: str
) -> None:
    plain = relatives.tiny(family, tmp_path / "plain")
    known = relatives.protected(ground, plain, tmp_path / "made", preset)
    keyed, source = fold(known.server), fold(plain)
    inner = keyed.seen.T @ known.residual @ source.seen
    for ours, theirs in layers_of(keyed, source, 2):
        pairs = zip(conjugated(keyed, ours), conjugated(source, theirs), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, inner @ other @ inner.T, atol=2e-5 * np.abs(one).max())


def test_sorted_columns_ignore_order_and_sign_of_rows_and_follow_the_columns() -> None:
    matrix, columns = generator().normal(size=(9, 5)), generator(4).permutation(5)
    changed = (-matrix[generator(5).permutation(9)])[:, columns]
    np.testing.assert_array_equal(sorted_columns(changed), sorted_columns(matrix)[columns])


def test_flattening_commutes_with_a_change_of_basis() -> None:
    matrix, basis = symmetric(1), orthogonal(WIDTH)
    np.testing.assert_allclose(flattened(basis @ matrix @ basis.T), basis @ flattened(matrix) @ basis.T, atol=1e-9)


def test_flattening_says_nothing_of_directions_that_a_thin_product_does_not_have() -> None:
    thin, basis = symmetric(1, rank=5), orthogonal(WIDTH)
    np.testing.assert_allclose(flattened(basis @ thin @ basis.T), basis @ flattened(thin) @ basis.T, atol=1e-9)
    assert np.linalg.matrix_rank(flattened(thin) - np.linalg.eigvalsh(flattened(thin))[0] * np.eye(WIDTH)) == 5


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_matrices_conjugated_by_one_orthogonal_key_give_it_up_to_its_sign(noise: float) -> None:
    key, random = orthogonal(WIDTH), generator(9)
    matrices = [symmetric(seed) for seed in range(8)]
    moved = [matrix + noise * symmetric(seed + 50) for seed, matrix in enumerate(matrices)]
    ours = [flattened(key @ matrix @ key.T) for matrix in matrices]
    found = conjugator(ours, [flattened(matrix) for matrix in moved], random)
    assert abs(relatives.cosine(found, key)) > (0.98 if noise else 0.999)


def test_matrices_that_have_nothing_in_common_give_no_key() -> None:
    key = orthogonal(WIDTH)
    ours = [flattened(key @ symmetric(seed) @ key.T) for seed in range(8)]
    found = conjugator(ours, [flattened(symmetric(seed + 50)) for seed in range(8)], generator(9))
    assert abs(relatives.cosine(found, key)) < 0.3


def test_a_polar_factor_is_orthogonal_and_solves_procrustes() -> None:
    rows, key = generator().normal(size=(40, WIDTH)), orthogonal(WIDTH)
    np.testing.assert_allclose(polar(rows.T @ (rows @ key)), key, atol=1e-9)


def test_rows_match_by_direction_whatever_their_length_and_sign() -> None:
    rows, order = generator().normal(size=(30, WIDTH)), generator(4).permutation(30)
    scales = generator(5).uniform(0.5, 2, 30) * np.where(generator(6).random(30) < 0.5, -1, 1)
    index, cosines = matched(rows[order] * scales[:, None], rows)
    assert index.tolist() == order.tolist()
    np.testing.assert_allclose(cosines, np.sign(scales), atol=1e-5)


def test_the_complement_of_the_mean_is_orthonormal_and_has_no_mean() -> None:
    basis = complement(WIDTH)
    np.testing.assert_allclose(basis.T @ basis, np.eye(WIDTH - 1), atol=1e-12)
    np.testing.assert_allclose(basis.sum(axis=0), 0, atol=1e-12)
