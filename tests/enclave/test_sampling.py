"""Sampling against a naive reference, and the 64 largest logits against the whole row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stip_enclave.sampling import FULL_ROW, Sampler, Sampling
from stip_protocol.errors import RequestInvalid

# Few distinct values make ties; many rows longer than the 64 that a server sends.
VALUES = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(-12, 12, width=32),
)
ROWS = st.one_of(
    st.lists(VALUES, min_size=1, max_size=200),
    st.integers(1, 3000).map(lambda n: np.random.default_rng(n).normal(size=n).round(1).tolist()),
).map(lambda values: np.array(values, np.float32))
SPECS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.25, 1.0, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 63, 64, 65, 10_000]),
    top_p=st.sampled_from([0.0, 1.0, 0.05, 0.25, 0.5, 0.9, 0.999]),
    seed=st.integers(0, 2**64 - 1),
)


def naive(spec: Sampling, row: np.ndarray, step: int) -> int:
    """The definition, in the plainest terms."""
    order = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))
    if spec.temperature == 0:
        return order[0]
    kept = order[: spec.top_k or None]
    largest = float(row[order[0]])
    weights = [math.exp((float(row[i]) - largest) / spec.temperature) for i in kept]
    if 0 < spec.top_p < 1:
        total, mass, count = math.fsum(weights), 0.0, 0
        for weight in weights:
            mass, count = mass + weight, count + 1
            if mass >= spec.top_p * total:
                break
        kept, weights = kept[:count], weights[:count]
    u = np.random.Generator(np.random.Philox(key=spec.seed, counter=step)).random()
    target, mass = u * math.fsum(weights), 0.0
    for i, weight in zip(kept, weights, strict=True):
        mass += weight
        if mass > target:
            return i
    return kept[-1]


def decided_by_rounding(spec: Sampling, row: np.ndarray) -> bool:
    """Whether the nucleus ends exactly where rounding of the total decides, in any of the two computations."""
    if not 0 < spec.top_p < 1 or spec.temperature == 0:
        return False
    kept = np.sort(row.astype(np.float64))[::-1][: spec.top_k or None]
    weights = np.exp((kept - kept[0]) / spec.temperature)
    return bool((np.abs(np.cumsum(weights) / weights.sum() - spec.top_p) < 1e-12).any())


@settings(deadline=None, max_examples=300)
@given(ROWS, SPECS, st.integers(0, 2**31))
def test_a_pick_is_what_the_definition_says(row: np.ndarray, spec: Sampling, step: int) -> None:
    if not decided_by_rounding(spec, row):
        assert Sampler(spec).pick(row, step) == naive(spec, row, step)


@settings(deadline=None, max_examples=200)
@given(ROWS, SPECS, st.integers(0, 1000), st.integers(0, 2**32 - 1))
def test_a_permuted_row_gives_the_same_id(row: np.ndarray, spec: Sampling, step: int, seed: int) -> None:
    ids = np.random.default_rng(seed).permutation(row.size).astype(np.int32)
    if not decided_by_rounding(spec, row):
        assert Sampler(spec).pick(row[ids], step, ids) == Sampler(spec).pick(row, step)


@settings(deadline=None, max_examples=400)
@given(ROWS, SPECS, st.integers(0, 1000), st.integers(0, 2**32 - 1))
def test_the_largest_64_give_the_same_id_wherever_they_decide(
    row: np.ndarray, spec: Sampling, step: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    ids = generator.permutation(row.size).astype(np.int32)
    permuted = row[ids]
    # Ties at the border fall as the server's sort lets them: at random here.
    top = np.lexsort((generator.random(row.size), -permuted))[:64]
    lse = float(np.float32(np.log(np.exp(row.astype(np.float64)).sum())))
    found = Sampler(spec).pick_top(ids[top], permuted[top], lse, row.size, step)
    if found is not FULL_ROW and not decided_by_rounding(spec, row):
        assert found == Sampler(spec).pick(row, step)


@pytest.mark.parametrize(
    "spec",
    [
        Sampling(),
        Sampling(temperature=0.7, top_k=50, seed=1),
        Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=1),
        Sampling(temperature=1.0, top_p=0.8, seed=1),
    ],
)
def test_ordinary_sampling_needs_no_whole_row(spec: Sampling) -> None:
    row = np.random.default_rng(0).normal(0, 4, 50_000).astype(np.float32)
    top = np.argsort(-row)[:64]
    lse = float(np.log(np.exp(row.astype(np.float64)).sum()))
    assert all(Sampler(spec).pick_top(top, row[top], lse, row.size, step) is not FULL_ROW for step in range(50))


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        (Sampling(), [1.0] * 64),
        (Sampling(temperature=1.0, top_k=40), [3.0] * 10 + [1.0] * 54),
        (Sampling(temperature=1.0, top_k=65), list(range(64, 0, -1))),
        (Sampling(temperature=1.0), list(range(64, 0, -1))),
        (Sampling(temperature=0.5, top_p=0.5), list(range(64, 0, -1))),
        (Sampling(temperature=1.0, top_p=0.9), [1.0] * 32 + [0.5] * 32),
    ],
)
def test_what_the_largest_64_do_not_decide_asks_for_the_row(spec: Sampling, values: list[float]) -> None:
    numbers = np.array(values, np.float32)
    lse = float(np.log(np.exp(numbers.astype(np.float64)).sum() + 1000))
    assert Sampler(spec).pick_top(np.arange(64), numbers, lse, 5000, 0) is FULL_ROW


@pytest.mark.parametrize(
    ("spec", "reads"),
    [
        (Sampling(), True),
        (Sampling(top_k=1000), True),
        (Sampling(temperature=1.0, top_k=63), True),
        (Sampling(temperature=1.0, top_k=64), False),
        (Sampling(temperature=1.0, top_p=0.9), True),
        (Sampling(temperature=0.9, top_p=0.9), False),
        (Sampling(temperature=1.0), False),
    ],
)
def test_it_is_known_before_whether_the_largest_64_can_decide(spec: Sampling, reads: bool) -> None:
    assert Sampler(spec).reads_top(64) is reads
    values = np.linspace(20.0, -20.0, 64, dtype=np.float32)
    lse = float(np.log(np.exp(values.astype(np.float64)).sum()))
    picks = [Sampler(spec).pick_top(np.arange(64), values, lse, 5000, step) for step in range(20)]
    assert reads or all(pick is FULL_ROW for pick in picks)
    assert not reads or not all(pick is FULL_ROW for pick in picks)


def test_a_small_vocabulary_is_all_there() -> None:
    values = np.array([0.1, 0.4, 0.4], np.float32)
    assert Sampler(Sampling()).pick_top(np.array([7, 9, 2]), values, 1.0, 3, 0) == 2


def test_ties_go_to_the_smallest_true_id_in_permuted_space() -> None:
    row, ids = np.array([1.0, 5.0, 5.0, 2.0], np.float32), np.array([0, 3, 1, 2])
    assert Sampler(Sampling()).pick(row, 0, ids) == 1
    assert Sampler(Sampling(temperature=1.0, top_k=1)).pick(row, 0, ids) == 1


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    row = np.zeros(1000, np.float32)
    one, other = (Sampler(Sampling(temperature=1.0, seed=seed)) for seed in (1, 2))
    assert [one.pick(row, step) for step in (3, 0, 7)] == [one.pick(row, step) for step in (3, 0, 7)]
    assert [one.pick(row, step) for step in range(5)] != [other.pick(row, step) for step in range(5)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", math.nan), ("temperature", math.inf), ("temperature", -0.1), ("top_p", 1.1), ("top_p", -0.1),
     ("top_p", math.nan), ("top_k", -1), ("seed", 2**64)],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestInvalid, match=field):
        Sampling(**{field: value})
