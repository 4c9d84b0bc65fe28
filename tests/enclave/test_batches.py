"""The picks of a step over all its sessions are those of one session at a time."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stip_enclave.batches import FEW, pick_rows, pick_tops
from stip_enclave.sampling import FULL_ROW, Sampler, Sampling

SPECS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.25, 1.0, 1.0, 3.0, 1e-30]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 63, 64, 65, 10_000]),
    top_p=st.sampled_from([0.0, 1.0, 0.05, 0.5, 0.9, 0.999]),
    seed=st.integers(0, 2**64 - 1),
)
DRAWS = st.sampled_from([1, FEW - 1, FEW, 3 * FEW]).flatmap(
    lambda count: st.lists(st.tuples(SPECS.map(Sampler), st.integers(0, 2**31)), min_size=count, max_size=count)
)
DTYPES = st.sampled_from(["float32", "float64", "float16", "bfloat16"])


def rows_of(count: int, size: int, seed: int, dtype: str) -> np.ndarray:
    """Logits [count, size] as an enclave holds them: few distinct values in every third row, half precision widened."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (count, size))
    logits[::3] = logits[::3].round()
    native = logits.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return native if native.itemsize > 2 else native.astype(np.float32)


@settings(deadline=None, max_examples=150)
@given(DRAWS, st.sampled_from([1, 30, 64, 65, 500, 3000]), st.integers(0, 2**32 - 1), DTYPES, st.booleans())
def test_whole_rows_together_are_picked_as_one_by_one(
    draws: Any, size: int, seed: int, dtype: str, permuted: bool
) -> None:
    generator = np.random.default_rng(seed)
    logits = rows_of(len(draws) + 2, size, seed, dtype)
    ids = generator.permutation(size).astype(np.int32) if permuted else None
    rows = generator.choice(len(logits), len(draws), replace=False).tolist()
    expected = [sampler.pick(logits[row], step, ids) for row, (sampler, step) in zip(rows, draws, strict=True)]
    assert pick_rows(logits, rows, draws, ids) == expected


@settings(deadline=None, max_examples=300)
@given(DRAWS, st.sampled_from([64, 65, 500, 3000]), st.integers(0, 2**32 - 1), DTYPES)
def test_largest_logits_together_are_picked_as_one_by_one(draws: Any, size: int, seed: int, dtype: str) -> None:
    generator = np.random.default_rng(seed)
    logits = rows_of(len(draws), size, seed, dtype)
    ids = generator.permutation(size).astype(np.int32)
    # Ties at the border fall as the server's sort lets them: at random here.
    top = np.lexsort((generator.random(logits.shape), -logits), axis=-1)[:, :64]
    values = np.take_along_axis(logits, top, axis=1)
    lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1)).astype(np.float32).astype(np.float64)
    expected = [
        sampler.pick_top(ids[top[row]], values[row], float(lse[row]), size, step)
        for row, (sampler, step) in enumerate(draws)
    ]
    assert pick_tops(ids[top], values, lse, size, draws) == expected


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([1, FEW, 3 * FEW]), st.sampled_from([64, 500]), st.integers(0, 2**32 - 1), DTYPES)
def test_the_likeliest_of_tied_logits_is_the_smallest_id(count: int, size: int, seed: int, dtype: str) -> None:
    logits = rows_of(count, size, seed, dtype).round()
    draws = [(Sampler(Sampling()), 0)] * count
    naive = [min(np.flatnonzero(row == row.max()).tolist()) for row in logits]
    assert pick_rows(logits, list(range(count)), draws) == naive


def test_every_way_of_sampling_is_among_those_compared_and_some_need_the_row() -> None:
    logits = rows_of(12, 3000, 1, "float32")
    top = np.argsort(-logits, axis=1)[:, :64]
    lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    settings_ = [
        {}, {"temperature": 0.7, "top_k": 40}, {"temperature": 0.7, "top_k": 40, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 0.2}, {"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.9},
    ]  # fmt: skip
    draws = [(Sampler(Sampling(seed=at, **settings_[at % 6])), at) for at in range(12)]
    found = pick_tops(top, np.take_along_axis(logits, top, axis=1), lse, 3000, draws)
    for sampling in range(4):
        assert any(found[at] is not FULL_ROW for at in range(sampling, 12, 6)), settings_[sampling]
    assert all(found[at] is FULL_ROW for at in (4, 5, 10, 11))


@pytest.mark.parametrize("extreme", [3.4e38, -3.4e38])
def test_extreme_logits_are_picked_as_one_by_one(extreme: float) -> None:
    logits = rows_of(FEW, 500, 2, "float32")
    logits[:, 7] = extreme
    draws = [(Sampler(Sampling(temperature=1e-3, top_k=20, top_p=0.9, seed=seed)), 5) for seed in range(FEW)]
    expected = [sampler.pick(row, step) for row, (sampler, step) in zip(logits, draws, strict=True)]
    assert pick_rows(logits, list(range(FEW)), draws) == expected


@pytest.mark.parametrize("whole", [False, True])
def test_tied_candidates_of_many_rows_are_drawn_in_the_order_of_their_true_ids(whole: bool) -> None:
    generator, count = np.random.default_rng(0), 3 * FEW
    logits = generator.normal(0, 3, (count, 3000)).round().astype(np.float32)
    ids = generator.permutation(3000).astype(np.int32)
    draws = [(Sampler(Sampling(temperature=1.0, top_k=(2, 5, 9, 20)[seed % 4], seed=seed)), 3) for seed in range(count)]
    expected = [sampler.pick(row, step, ids) for row, (sampler, step) in zip(logits, draws, strict=True)]
    if whole:
        assert pick_rows(logits, list(range(count)), draws, ids) == expected
        return
    top = np.lexsort((generator.random(logits.shape), -logits), axis=-1)[:, :64]
    lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    found = pick_tops(ids[top], np.take_along_axis(logits, top, axis=1), lse, 3000, draws)
    decided = [at for at, token in enumerate(found) if token is not FULL_ROW]
    assert len(decided) > count / 2
    assert [found[at] for at in decided] == [expected[at] for at in decided]
