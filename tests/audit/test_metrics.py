"""Figures are what their definitions say, by direct computation and on cases where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stip_keyservice.audit import metrics
from stip_keyservice.audit.claims import NO_GUESS
from stip_protocol.keys import KeyStream, draw_centred_orthogonal, draw_orthogonal, draw_permutation

SEEDS = st.integers(0, 2**31)
TEXTS = st.lists(st.lists(st.sampled_from("abcde"), max_size=12), min_size=1, max_size=5)


def stream(seed: int) -> KeyStream:
    return KeyStream(seed.to_bytes(32, "big"), "tests/metrics")


def subsequence(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, by its definition."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + subsequence(one[:-1], other[:-1])
    return max(subsequence(one[:-1], other), subsequence(one, other[:-1]))


def orthogonal(width: int, seed: int = 1) -> NDArray[np.float64]:
    return draw_orthogonal(stream(seed), width).apply(np.eye(width))


# Tokens.


def test_a_token_is_found_where_the_true_id_is_among_the_first_guesses() -> None:
    guesses, true = np.array([[3, 1], [1, 3], [NO_GUESS, 3], [7, 8]]), np.array([3, 3, 3, 3])
    assert metrics.found(guesses, true, 1).tolist() == [True, False, False, False]
    assert metrics.found(guesses, true, 2).tolist() == [True, True, True, False]


# ROUGE-L.


@settings(max_examples=50)
@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_rouge_l_is_twice_the_longest_common_subsequence_over_both_lengths(one: list[str], other: list[str]) -> None:
    expected = 2 * subsequence(one, other) / (len(one) + len(other)) if one or other else 1.0
    assert metrics.rouge_l([one], [other]).tolist() == pytest.approx([expected])


@given(TEXTS)
def test_rouge_l_of_a_text_with_itself_is_one(texts: list[list[str]]) -> None:
    assert metrics.rouge_l(texts, texts).tolist() == [1.0] * len(texts)


@given(TEXTS, SEEDS)
def test_rouge_l_is_a_share_the_same_both_ways_and_of_each_text_alone(texts: list[list[str]], seed: int) -> None:
    shuffled = [texts[place] for place in np.random.default_rng(seed).permutation(len(texts))]
    scores = metrics.rouge_l(texts, shuffled)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert scores.tolist() == metrics.rouge_l(shuffled, texts).tolist()
    alone = [metrics.rouge_l([one], [other])[0] for one, other in zip(texts, shuffled, strict=True)]
    assert scores.tolist() == alone


def test_rouge_l_of_nothing_in_common_is_zero() -> None:
    assert metrics.rouge_l([["a", "b"], []], [["c", "d"], ["c"]]).tolist() == [0.0, 0.0]


# Keys.


def test_every_entry_of_a_right_permutation_is_found_whatever_its_scale() -> None:
    key = draw_permutation(stream(1), 30).apply(np.eye(30))
    assert metrics.is_permutation(key)
    assert metrics.permutation_found(0.1 * key + 0.01, key).all()


def test_a_sign_is_part_of_a_signed_permutation() -> None:
    signed = draw_permutation(stream(1), 4).apply(np.diag([1.0, -1.0, 1.0, -1.0]))
    assert metrics.is_permutation(signed)
    assert metrics.permutation_found(np.abs(signed), signed).sum() == 2


def test_no_claim_is_no_entry_of_a_permutation() -> None:
    assert not metrics.permutation_found(np.zeros((5, 5)), np.eye(5)).any()


def test_a_dense_key_is_no_permutation() -> None:
    assert not metrics.is_permutation(orthogonal(8))
    assert not metrics.is_permutation(2 * np.eye(8))


def test_cosines_of_the_true_key_are_one_up_to_scale_and_sign() -> None:
    key = orthogonal(16)
    assert metrics.cosines(-3 * key, key).tolist() == pytest.approx([1.0] * 16)
    assert metrics.cosines(np.zeros((16, 16)), key).tolist() == [0.0] * 16


def test_cosines_of_an_unrelated_key_are_those_of_random_directions() -> None:
    found = metrics.cosines(orthogonal(256, 1), orthogonal(256, 2)).mean()
    assert found == pytest.approx(metrics.random_cosine(256), abs=0.01)


def test_what_a_claim_says_of_a_direction_that_the_key_drops_does_not_count() -> None:
    key = draw_centred_orthogonal(stream(3), 16).apply(np.eye(16))
    rubbish = np.outer(np.arange(16.0), np.ones(16))
    assert metrics.cosines(key + rubbish, key).tolist() == pytest.approx([1.0] * 16)


def test_axes_are_put_in_the_order_of_the_true_ones_whatever_their_order_and_signs() -> None:
    key, generator = orthogonal(24), np.random.default_rng(8)
    shuffled = key[:, generator.permutation(24)] * generator.choice([-1.0, 1.0], 24)
    assert metrics.cosines(shuffled, key).mean() < 0.5
    assert metrics.cosines(metrics.axes_in_order(shuffled, key), key).tolist() == pytest.approx([1.0] * 24)


def test_each_claimed_axis_stands_for_one_true_axis_at_most() -> None:
    key = orthogonal(12)
    same = np.tile(key[:, :1], 12)  # right once, and rubbish eleven times
    found = metrics.cosines(metrics.axes_in_order(same, key), key)
    assert (found > 0.5).sum() == 1
    assert not metrics.axes_in_order(np.zeros((12, 12)), key).any()


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_cosine_of_random_directions_is_the_textbooks(width: int) -> None:
    assert metrics.random_cosine(width) == pytest.approx([1, 2 / np.pi, 1 / 2][width - 1])


# Stolen models.


def test_surprise_is_the_negative_logarithm_of_a_softmax() -> None:
    logits = np.random.default_rng(2).normal(size=(6, 9)).astype(np.float32)
    true = np.array([0, 8, 3, 3, 1, 5])
    shares = np.exp(logits.astype(np.float64))
    expected = -np.log(shares[np.arange(6), true] / shares.sum(axis=1))
    np.testing.assert_allclose(metrics.surprise(logits, true), expected, atol=1e-12)


def test_an_impossible_token_costs_what_the_floor_says() -> None:
    logits = np.array([[0.0, -np.inf]], np.float32)
    assert metrics.surprise(logits, np.array([1])).tolist() == pytest.approx([-np.log(metrics.FLOOR)])


# "Distance correlations".


def slow_distance_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Székely and Rizzo 2013, definitions 2 and 3, entry by entry."""
    n = len(x)
    tables = []
    for points in (x, y):
        far = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in points] for a in points])
        table = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if i != j:
                    table[i, j] = far[i, j] - far[i].sum() / (n - 2) - far[:, j].sum() / (n - 2)
                    table[i, j] += far.sum() / ((n - 1) * (n - 2))
        tables.append(table)
    one, other = tables
    square = (one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum())
    return float(np.sqrt(max(0.0, square)))


@settings(max_examples=20)
@given(SEEDS, st.integers(4, 12))
def test_distance_correlation_is_the_bias_corrected_statistic(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, 2))
    y = x[:, :1] + generator.normal(size=(count, 1))
    assert metrics.distance_correlation(x, y) == pytest.approx(slow_distance_correlation(x, y), abs=1e-7)


@settings(max_examples=20)
@given(SEEDS, st.floats(0.01, 100), st.floats(-100, 100), st.booleans())
def test_distance_correlation_with_an_affine_image_is_one(seed: int, scale: float, shift: float, turn: bool) -> None:
    x = np.random.default_rng(seed).normal(size=(20, 3))
    image = scale * (x @ orthogonal(3, seed) if turn else -x) + shift
    assert metrics.distance_correlation(x, image) == pytest.approx(1.0, abs=1e-6)
    assert metrics.distance_correlation(x[:, :1], -scale * x[:, :1] + shift) == pytest.approx(1.0, abs=1e-6)


def test_distance_correlation_of_independent_data_is_near_zero() -> None:
    generator = np.random.default_rng(4)
    found = [
        metrics.distance_correlation(generator.normal(size=(400, 1)), generator.normal(size=(400, 1)))
        for _ in range(20)
    ]
    assert np.mean(found) < 0.06


def test_distance_correlation_sees_what_pearsons_does_not() -> None:
    x = np.linspace(-1, 1, 401)[:, None]
    assert metrics.one_minus_pearson(x, x**2) == pytest.approx(1.0)
    assert metrics.distance_correlation(x, x**2) > 0.4


def test_distance_correlation_of_what_does_not_vary_is_zero() -> None:
    assert metrics.distance_correlation(np.ones((9, 2)), np.arange(18.0).reshape(9, 2)) == 0.0


@pytest.mark.parametrize(("one", "other"), [(3, 3), (5, 6)])
def test_distance_correlation_refuses_too_few_rows_and_rows_that_are_no_pairs(one: int, other: int) -> None:
    with pytest.raises(ValueError, match="four or more pairs"):
        metrics.distance_correlation(np.zeros((one, 1)), np.zeros((other, 1)))


def test_one_minus_pearson_is_zero_for_a_negative_affine_image_and_one_for_constants() -> None:
    x = np.random.default_rng(5).normal(size=(7, 8))
    assert metrics.one_minus_pearson(x, 3 - 2 * x) == pytest.approx(0.0, abs=1e-12)
    assert metrics.one_minus_pearson(x, np.ones((7, 8))) == 1.0


def test_a_key_that_looks_unrelated_entry_by_entry_leaves_every_distance_of_rows() -> None:
    generator = np.random.default_rng(6)
    plain = generator.normal(size=(500, 64)).astype(np.float32)
    keyed = (plain @ orthogonal(64)).astype(np.float32)
    found = metrics.correlation("rows", plain, keyed, generator)
    assert found.one_minus_pearson > 0.9
    assert found.distance_correlation < 0.15
    assert found.distance_correlation_of_rows == pytest.approx(1.0, abs=1e-4)
