"""The key algebra: one convention, duals and inverses, row blocks, distributions."""

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol.errors import Unrepresentable
from stip_protocol.keys import (
    SCALE_BOUND,
    VOCABULARY_LABEL,
    Blocks,
    HeadsKey,
    Identity,
    Key,
    KeyStream,
    Monomial,
    Orthogonal,
    Permutation,
    RotaryPairs,
    derive,
    draw_centred_orthogonal,
    draw_monomial,
    draw_orthogonal,
    draw_pair_scalars,
    draw_pair_scales,
    draw_pair_signs,
    draw_permutation,
    draw_positive_monomial,
    draw_signed_permutation,
    vocabulary_key,
)

ROOT = bytes(range(32))
FLAT: dict[str, Callable[[KeyStream, int], Key]] = {
    "identity": lambda _, size: Identity(size),
    "permutation": draw_permutation,
    "monomial": draw_monomial,
    "signed permutation": draw_signed_permutation,
    "positive monomial": draw_positive_monomial,
    "orthogonal": draw_orthogonal,
}
PAIRED: dict[str, Callable[[KeyStream, int], Key]] = {
    "signs": draw_pair_signs,
    "scales": draw_pair_scales,
    "scalars": draw_pair_scalars,
}


@st.composite
def keys(draw: st.DrawFn) -> Key:
    """Any key: flat or of heads, of a random size."""
    stream = KeyStream(draw(st.binary(min_size=32, max_size=32)), "test")
    kind = draw(st.sampled_from([*FLAT, *PAIRED, "wide", "narrow"]))
    if kind in FLAT:
        return FLAT[kind](stream, draw(st.integers(1, 9)))
    if kind in PAIRED:
        return PAIRED[kind](stream, 2 * draw(st.integers(1, 4)))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inner, width = draw(st.sampled_from([*FLAT.values(), *PAIRED.values()])), 2 * draw(st.integers(1, 3))
    key = HeadsKey(
        draw_permutation(stream, kv_heads),
        [draw_permutation(stream, group) for _ in range(kv_heads)],
        [inner(stream, width) for _ in range(kv_heads)],
    )
    return key.wide if kind == "wide" else key.narrow


def arrays(*shape: int) -> np.ndarray:
    count = math.prod(shape)
    return KeyStream(ROOT, f"data {shape}").normals(count).reshape(shape)


@given(keys())
def test_the_inverse_undoes_a_key(key: Key) -> None:
    assert np.allclose(key.inverse.matrix() @ key.matrix(), np.eye(key.size), atol=1e-12)


@given(keys())
def test_the_dual_is_the_inverse_transposed(key: Key) -> None:
    assert np.allclose(key.dual.matrix(), np.linalg.inv(key.matrix()).T, atol=1e-12)


@given(keys(), st.data())
def test_row_blocks_are_rows_of_the_whole(key: Key, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, key.size - 1))
    stop = data.draw(st.integers(start + 1, key.size))
    x = arrays(key.size, 3)
    assert np.allclose(key.apply(x, start, stop), (key.matrix() @ x)[start:stop], atol=1e-12)


@given(keys(), keys())
def test_out_takes_the_key_and_in_takes_the_dual(writes: Key, reads: Key) -> None:
    """W' = K_w·W·K_r⁻¹ maps keyed inputs to keyed outputs."""
    weight, x = arrays(writes.size, reads.size), arrays(reads.size)
    keyed = reads.dual.apply(writes.apply(weight).T).T
    assert np.allclose(keyed @ reads.apply(x), writes.apply(weight @ x), atol=1e-10)


@given(keys())
def test_the_identity_is_recognised(key: Key) -> None:
    assert key.identity == np.array_equal(key.matrix(), np.eye(key.size))


@given(keys())
def test_exact_keys_keep_every_bit(key: Key) -> None:
    x = arrays(key.size, 2).astype(np.float16)
    if not key.exact:
        assert key.apply(x).dtype == np.float64
        return
    moved = key.apply(x)
    assert moved.dtype == np.float16
    assert sorted(np.abs(moved).ravel()) == sorted(np.abs(x).ravel())
    assert np.array_equal(key.inverse.apply(moved).view(np.uint16), x.view(np.uint16))


@given(st.integers(1, 9), st.binary(min_size=32, max_size=32))
def test_a_monomial_is_its_permutation_part_times_a_bounded_diagonal(size: int, root: bytes) -> None:
    key = draw_monomial(KeyStream(root, "test"), size)
    diagonal = key.matrix() @ np.linalg.inv(key.permutation_part.matrix())
    assert np.allclose(diagonal, np.diag(np.diagonal(diagonal)))
    assert (np.abs(np.diagonal(diagonal)) <= SCALE_BOUND).all()
    assert (np.abs(np.diagonal(diagonal)) >= 1 / SCALE_BOUND).all()


@given(st.integers(1, 9), st.binary(min_size=32, max_size=32))
def test_a_signed_permutation_has_a_diagonal_of_signs(size: int, root: bytes) -> None:
    key = draw_signed_permutation(KeyStream(root, "test"), size)
    diagonal = key.matrix() @ key.permutation_part.matrix().T
    assert key.exact
    assert np.array_equal(np.abs(diagonal), np.eye(size))


@given(st.integers(1, 9), st.binary(min_size=32, max_size=32))
def test_positive_monomials_commute_with_relu(size: int, root: bytes) -> None:
    key = draw_positive_monomial(KeyStream(root, "test"), size)
    diagonal = np.diagonal(key.matrix() @ key.permutation_part.matrix().T)
    x = arrays(size, 3)
    assert (diagonal >= 1 / SCALE_BOUND).all()
    assert (diagonal <= SCALE_BOUND).all()
    assert np.array_equal(key.apply(np.maximum(x, 0)), np.maximum(key.apply(x), 0))


@given(st.integers(1, 9), st.binary(min_size=32, max_size=32))
def test_pair_scales_move_nothing_and_treat_both_halves_alike(half: int, root: bytes) -> None:
    key = draw_pair_scales(KeyStream(root, "test"), 2 * half)
    factors = np.diagonal(key.matrix())
    assert np.array_equal(key.matrix(), np.diag(factors))
    assert np.array_equal(factors[:half], factors[half:])
    assert (np.abs(factors) >= 1 / SCALE_BOUND).all()
    assert (np.abs(factors) <= SCALE_BOUND).all()
    assert key.permutation_part.identity


@pytest.mark.parametrize("draw", [draw_orthogonal, draw_pair_scalars])
def test_a_dense_key_has_no_permutation_part(draw: Callable[[KeyStream, int], Key]) -> None:
    with pytest.raises(Unrepresentable):
        _ = draw(KeyStream(ROOT, "test"), 4).permutation_part


@given(st.integers(1, 4), st.binary(min_size=32, max_size=32), st.floats(-10, 10), st.sampled_from([*PAIRED]))
def test_rotary_keys_commute_with_rotary_positions(half: int, root: bytes, position: float, kind: str) -> None:
    key = PAIRED[kind](KeyStream(root, "test"), 2 * half)
    turn = RotaryPairs(np.ones(half), position / 10.0 ** np.arange(half)).matrix()
    assert np.allclose(key.matrix() @ turn, turn @ key.matrix())
    assert np.allclose(key.matrix().T @ key.dual.matrix(), np.eye(2 * half))


@pytest.mark.parametrize("size", [1, 2, 3, 17])
def test_centred_keys_are_orthogonal_and_drop_the_mean(size: int) -> None:
    key = draw_centred_orthogonal(KeyStream(ROOT, "test"), size)
    centring, matrix = np.eye(size) - 1 / size, key.matrix()
    for product in (matrix @ matrix.T, key.inverse.matrix() @ matrix, key.dual.matrix().T @ matrix):
        assert np.allclose(product, centring, atol=1e-13)
    assert np.allclose(matrix @ np.ones(size), 0, atol=1e-13)
    assert not key.identity
    assert not key.exact
    x = arrays(size, 3)
    assert np.allclose(np.vstack([key.apply(x, row, row + 1) for row in range(size)]), matrix @ x, atol=1e-13)


@pytest.mark.parametrize("draw", [*FLAT.values()])
def test_a_space_of_one_dimension_gets_no_key(draw: Callable[[KeyStream, int], Key]) -> None:
    assert all(draw(KeyStream(ROOT, str(i)), 1).identity for i in range(20))


def test_a_centred_space_of_one_dimension_keeps_nothing() -> None:
    key = draw_centred_orthogonal(KeyStream(ROOT, "test"), 1)
    for kept in (key, key.inverse, key.dual):
        assert np.array_equal(kept.matrix(), [[0.0]])


def test_wide_heads_follow_their_key_value_head() -> None:
    stream = KeyStream(ROOT, "heads")
    kv_heads, group, width = 3, 2, 4
    key = HeadsKey(
        draw_permutation(stream, kv_heads),
        [draw_permutation(stream, group) for _ in range(kv_heads)],
        [draw_orthogonal(stream, width) for _ in range(kv_heads)],
    )
    queries, keys_ = arrays(kv_heads * group * width), arrays(kv_heads * width)

    def scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        q, k = q.reshape(kv_heads, group, width), k.reshape(kv_heads, width)
        return np.einsum("hgw,hw->hg", q, k)

    plain, keyed = scores(queries, keys_), scores(key.wide.apply(queries), key.narrow.dual.apply(keys_))
    assert sorted(keyed.ravel()) == pytest.approx(sorted(plain.ravel()))
    assert sorted(map(tuple, np.sort(keyed).round(9))) == sorted(map(tuple, np.sort(plain).round(9)))


def test_the_vocabulary_key_is_the_same_on_every_machine() -> None:
    key = vocabulary_key(derive(ROOT, VOCABULARY_LABEL), 50_257)
    assert (
        hashlib.sha256(key.index.astype("<u4").tobytes()).hexdigest()
        == "e9b9d18045c0c5e7ad3954cba427029c1bcaf5af5008195acdb9231f3d826f7f"
    )


def test_the_vocabulary_key_maps_positions_of_a_row_to_true_ids() -> None:
    key = vocabulary_key(derive(ROOT, VOCABULARY_LABEL), 11)
    logits = arrays(11)
    permuted = key.apply(logits)
    assert np.array_equal(permuted, logits[key.index])
    assert np.array_equal(permuted[key.inverse.index], logits)
    assert key.index[permuted.argmax()] == logits.argmax()


def test_a_large_vocabulary_is_a_permutation() -> None:
    key = vocabulary_key(bytes(32), 256_000)
    assert (np.bincount(key.index) == 1).all()


@given(keys())
def test_keys_show_their_size_only(key: Key) -> None:
    shown = {
        f"{kind.__name__}(size={key.size})"
        for kind in (Identity, Permutation, Monomial, Orthogonal, RotaryPairs, Blocks)
    }
    assert repr(key) in shown


def test_keys_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        draw_permutation(KeyStream(ROOT, "a"), 4).index[0] = 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Permutation(np.array([0, 0])),
        lambda: Permutation(np.array([1, 2])),
        lambda: Monomial(np.array([0, 1]), np.array([1.0, 0.0])),
        lambda: Monomial(np.array([0, 1]), np.array([1.0, np.nan])),
        lambda: Orthogonal(np.zeros((2, 3))),
        lambda: RotaryPairs(np.array([-1.0]), np.array([0.0])),
        lambda: Blocks(Permutation(np.arange(2)), [Identity(2)]),
        lambda: Blocks(Permutation(np.arange(2)), [Identity(2), Identity(3)]),
        lambda: HeadsKey(Permutation(np.arange(2)), [Permutation(np.arange(2))], [Identity(2), Identity(2)]),
    ],
)
def test_maps_that_are_not_invertible_are_not_keys(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"\w+: "):
        make()
