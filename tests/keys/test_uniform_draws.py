"""Permutations, signs, integers and scales are drawn uniformly, and generators that nearly are do not pass for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from itertools import permutations, product

import numpy as np
import pytest

from stip_protocol.keys import (
    SCALE_BOUND,
    Key,
    KeyStream,
    Permutation,
    draw_monomial,
    draw_pair_scalars,
    draw_pair_scales,
    draw_pair_signs,
    draw_permutation,
    draw_positive_monomial,
    draw_signed_permutation,
)

from .chances import ROOTS, Sample, chi_square, fails_beyond_doubt, passes, streams, uniform

Order = tuple[int, ...]
DRAWS = 12_000
"""Draws under each root, from right and wrong generators alike."""


class Coarse(KeyStream):
    """A key stream with words of two bits, in which ties are the rule."""

    def words(self, count: int) -> np.ndarray:
        return super().words(count) >> np.uint64(62)


def outcome_chances(draws: list[Callable[[], Hashable]], outcomes: list[Hashable]) -> list[float]:
    """One χ² over all outcomes for each drawer; an outcome that is not listed fails."""
    chances = []
    for draw in draws:
        counts = Counter(draw() for _ in range(DRAWS))
        assert set(counts) <= set(outcomes)
        chances.append(chi_square([counts[outcome] for outcome in outcomes], DRAWS / len(outcomes)))
    return chances


def order_of(key: Permutation) -> Order:
    return tuple(key.index.tolist())


def swapped_with_any(stream: KeyStream, size: int) -> Order:
    """The naive shuffle: each place swapped with any place, nⁿ ways that n! does not divide."""
    order = list(range(size))
    for place, word in enumerate(stream.words(size)):
        other = int(word % np.uint64(size))
        order[place], order[other] = order[other], order[place]
    return tuple(order)


def sorted_with_ties(stream: KeyStream, size: int) -> Order:
    """Words of four bits, sorted without a look at ties."""
    return tuple(np.argsort(stream.words(size) >> np.uint64(60), kind="stable").tolist())


def one_cycle(stream: KeyStream, size: int) -> Order:
    """Sattolo's slip in the shuffle of Fisher and Yates: no place is swapped with itself."""
    order = list(range(size))
    for place, word in zip(range(size - 1, 0, -1), stream.words(size), strict=False):
        other = int(word % np.uint64(place))
        order[place], order[other] = order[other], order[place]
    return tuple(order)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_permutations_are_uniform(size: int) -> None:
    """χ² over all n! outcomes, 12,000 draws under each of four roots. False alarm: 1 in 10,000 for each size."""
    draws = [lambda stream=stream: order_of(draw_permutation(stream, size)) for stream in streams("permutation")]
    assert passes(outcome_chances(draws, [*permutations(range(size))]))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ties_are_drawn_again(size: int) -> None:
    """Words of two bits, which four places hardly ever get without a tie. False alarm: 1 in 10,000 for each size."""
    coarse = [Coarse(root, "ties") for root in ROOTS]
    draws = [lambda stream=stream: order_of(draw_permutation(stream, size)) for stream in coarse]
    assert passes(outcome_chances(draws, [*permutations(range(size))]))


@pytest.mark.parametrize("size", [3, 4, 5])
@pytest.mark.parametrize("wrong", [swapped_with_any, sorted_with_ties, one_cycle])
def test_a_shuffle_that_is_not_uniform_is_found(wrong: Callable[[KeyStream, int], Order], size: int) -> None:
    draws = [lambda stream=stream: wrong(stream, size) for stream in streams("wrong")]
    assert fails_beyond_doubt(outcome_chances(draws, [*permutations(range(size))]))


def place_chance(draw: Callable[[KeyStream, int], Order]) -> float:
    """χ² of where each of 8 goes. Rows and columns have fixed sums: 7 · 7 degrees."""
    size, counts = 8, np.zeros((8, 8))
    for stream in streams("places"):
        for _ in range(DRAWS // 4):
            counts[np.arange(size), draw(stream, size)] += 1
    return chi_square(counts.ravel(), DRAWS / size, margins=2 * size - 1)


def test_permutations_have_no_favourite_places() -> None:
    """12,000 draws. False alarm: 1 in 10,000."""
    assert passes([place_chance(lambda stream, size: order_of(draw_permutation(stream, size)))])
    assert fails_beyond_doubt([place_chance(swapped_with_any)])


def signed_order(key: Key) -> tuple[Order, Order]:
    """Read off what becomes of 100⁰, 100¹, …: no scale makes one look like another."""
    assert SCALE_BOUND < 10
    moved = key.apply(100.0 ** np.arange(key.size))
    order = np.rint(np.log10(np.abs(moved)) / 2).astype(int)
    return tuple(order.tolist()), tuple(np.sign(moved).astype(int).tolist())


def pair_signs(key: Key) -> tuple[Order, Order]:
    order, signs = signed_order(key)
    assert signs[: key.size // 2] == signs[key.size // 2 :]
    return order, signs[: key.size // 2]


STILL: list[Order] = [tuple(range(6))]
SIGNED: dict[str, tuple[Callable[[KeyStream, int], Key], int, Callable[[Key], Hashable], list[Order], int]] = {
    "signed permutation": (draw_signed_permutation, 3, signed_order, [*permutations(range(3))], 3),
    "monomial": (draw_monomial, 3, signed_order, [*permutations(range(3))], 3),
    "pair signs": (draw_pair_signs, 6, pair_signs, STILL, 3),
    "pair scales": (draw_pair_scales, 6, pair_signs, STILL, 3),
}


@pytest.mark.parametrize("kind", SIGNED)
def test_signs_are_uniform_whatever_the_order(kind: str) -> None:
    """Every permutation with every choice of signs (6 · 8 outcomes; 8 for pairs). False alarm: 1 in 10,000."""
    draw, size, seen, orders, free = SIGNED[kind]
    outcomes = [*product(orders, product((1, -1), repeat=free))]
    assert passes(
        outcome_chances([lambda stream=stream: seen(draw(stream, size)) for stream in streams(kind)], outcomes)
    )


def lopsided(stream: KeyStream, size: int) -> tuple[Order, Order]:
    """Signs that are minus in 7 of 16."""
    signs = np.where(stream.words(size) % np.uint64(16) < 7, -1, 1)
    return order_of(draw_permutation(stream, size)), tuple(signs.tolist())


def tied_to_the_order(stream: KeyStream, size: int) -> tuple[Order, Order]:
    """Signs from the words that give the order: even by themselves, and never a plus before a minus."""
    words = stream.words(size)
    order = np.argsort(words)
    return tuple(order.tolist()), tuple(np.where(words[order] >> np.uint64(63), -1, 1).tolist())


def turning_only(stream: KeyStream, size: int) -> tuple[Order, Order]:
    """Signs whose product makes every determinant 1."""
    order = draw_permutation(stream, size)
    signs = 1 - 2 * stream.integers(2, size)
    signs[0] *= round(np.linalg.det(order.matrix())) * signs.prod()
    return order_of(order), tuple(signs.tolist())


@pytest.mark.parametrize("wrong", [lopsided, tied_to_the_order, turning_only])
def test_signs_that_are_not_uniform_are_found(wrong: Callable[[KeyStream, int], tuple[Order, Order]]) -> None:
    outcomes = [*product(permutations(range(3)), product((1, -1), repeat=3))]
    draws = [lambda stream=stream: wrong(stream, 3) for stream in streams("wrong")]
    assert fails_beyond_doubt(outcome_chances(draws, outcomes))


def integer_chances(draw: Callable[[KeyStream], np.ndarray], bound: int) -> list[float]:
    """χ² of 20,000 integers under each root: which of up to 16 stretches of [0, bound) they are in, and residues."""
    cells = min(bound, 16)
    edges = np.array([-(-bound * cell // cells) for cell in range(cells + 1)], dtype=np.uint64)
    chances = []
    for stream in streams(f"integers below {bound}"):
        drawn = draw(stream).astype(np.uint64)
        assert drawn.max() < bound
        stretch = np.bincount(np.searchsorted(edges, drawn, side="right") - 1, minlength=cells)
        share = [int(width) / bound * drawn.size for width in np.diff(edges)]
        chances.append(chi_square(stretch, np.array(share)))
        residue = np.bincount((drawn % np.uint64(cells)).astype(np.int64), minlength=cells)
        even = [len(range(first, bound, cells)) / bound * drawn.size for first in range(cells)]
        chances.append(chi_square(residue, np.array(even)))
    return chances


SMALL = [2, 3, 7, 10, 11, 13]
LARGE = [3 << 61, 5 << 60, 7 << 60, (1 << 64) * 2 // 5 | 1]
"""2⁶⁴ is 2⅔, 3⅕, 2 2/7 and 2½ times these bounds: a modulus draws the low part of each too often."""


@pytest.mark.parametrize("bound", [*SMALL, *LARGE, 257, 50_257, (1 << 64) // 3 + 1, (1 << 63) - 1, 1 << 63])
def test_integers_are_uniform(bound: int) -> None:
    """Stretches and residues. False alarm: 1 in 10,000 for each bound."""
    assert passes(integer_chances(lambda stream: stream.integers(bound, 20_000), bound))


def test_only_zero_is_below_one() -> None:
    assert not streams("one")[0].integers(1, 100).any()


@pytest.mark.parametrize("bound", LARGE)
def test_a_modulus_of_a_word_is_found(bound: int) -> None:
    assert fails_beyond_doubt(integer_chances(lambda stream: stream.words(20_000) % np.uint64(bound), bound))


@pytest.mark.parametrize("bound", [b for b in SMALL if b != 2])
def test_a_modulus_of_four_bits_is_found(bound: int) -> None:
    def wrong(stream: KeyStream) -> np.ndarray:
        return (stream.words(20_000) >> np.uint64(60)) % np.uint64(bound)

    assert fails_beyond_doubt(integer_chances(wrong, bound))


def scales(key: Key) -> Sample:
    return np.abs(key.matrix()).max(1)


def pair_scales(key: Key) -> Sample:
    rows = key.matrix()
    half = key.size // 2
    return np.hypot(rows[:half].diagonal(), rows[half:].diagonal())  # s·cos θ over s·sin θ


SCALED: dict[str, tuple[Callable[[KeyStream, int], Key], Callable[[Key], Sample]]] = {
    "monomial": (draw_monomial, scales),
    "positive monomial": (draw_positive_monomial, scales),
    "pair scales": (draw_pair_scales, lambda key: scales(key)[: key.size // 2]),
    "pair scalars": (draw_pair_scalars, pair_scales),
}


def log_uniform(values: Sample) -> float:
    return uniform((np.log(values) / np.log(SCALE_BOUND) + 1) / 2)


@pytest.mark.parametrize("kind", SCALED)
def test_scales_are_log_uniform(kind: str) -> None:
    """4,000 scales under each root, Kolmogorov-Smirnov. False alarm: 1 in 10,000 for each kind."""
    draw, seen = SCALED[kind]
    drawn = [np.concatenate([seen(draw(stream, 40)) for _ in range(200)])[:4000] for stream in streams(kind)]
    assert passes([log_uniform(values) for values in drawn])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda stream: 0.5 + 1.5 * stream.uniforms(4000),
        lambda stream: 1 + stream.uniforms(4000),
        lambda stream: np.exp(np.clip(stream.normals(4000), -0.69, 0.69)),
    ],
    ids=["uniform", "above one", "log-normal, cut"],
)
def test_scales_that_are_not_log_uniform_are_found(wrong: Callable[[KeyStream], Sample]) -> None:
    assert fails_beyond_doubt([log_uniform(wrong(stream)) for stream in streams("wrong")])


def angles_and_scales(key: Key) -> Sample:
    """[pairs, 2], both in [0, 1]."""
    rows = key.matrix()
    half = key.size // 2
    sine, cosine = rows[half:].diagonal(), rows[:half].diagonal()
    turn = np.arctan2(sine, cosine) / (2 * np.pi) % 1
    return np.stack([turn, (np.log2(np.hypot(sine, cosine)) + 1) / 2], axis=1)


def turn_chances(samples: list[Sample]) -> list[float]:
    chances = []
    for sample in samples:
        cells = np.minimum((sample * 6).astype(int), 5)
        counts = np.bincount(cells[:, 0] * 6 + cells[:, 1], minlength=36)
        chances += [uniform(sample[:, 0]), chi_square(counts, len(sample) / 36)]
    return chances


def test_angles_are_uniform_whatever_the_scale() -> None:
    """4,000 angles under each root, and χ² on 6 × 6 cells of angle and scale. False alarm: 1 in 10,000."""
    assert SCALE_BOUND == 2
    drawn = [
        np.concatenate([angles_and_scales(draw_pair_scalars(stream, 40)) for _ in range(200)])
        for stream in streams("angles")
    ]
    assert passes(turn_chances(drawn))


def test_angles_that_follow_the_scale_or_half_the_circle_are_found() -> None:
    same = [np.repeat(stream.uniforms(4000)[:, None], 2, axis=1) for stream in streams("wrong")]
    half = [stream.uniforms(8000).reshape(-1, 2) * [0.5, 1] for stream in streams("wrong")]
    assert fails_beyond_doubt(turn_chances(same))
    assert fails_beyond_doubt(turn_chances(half))
