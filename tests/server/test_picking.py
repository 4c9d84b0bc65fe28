"""Ids drawn for all sessions of a step: the rule by which enclaves sample, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stip_enclave.sampling import Sampler, Sampling
from stip_server.engine import Generation
from stip_server.engines.transformers.picking import REACH, Draw, pick


def draw(temperature: float = 0.0, top_k: int = 0, top_p: float = 0.0, seed: int = 0, step: int = 0) -> Draw:
    return Draw(temperature, top_k, top_p, seed, step)


def enclave(row: torch.Tensor, how: Draw) -> int:
    spec = Sampling(temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, seed=how.seed)
    return Sampler(spec).pick(row.float().numpy(), how.step)


HOWS = st.builds(
    draw,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 50, 400, 10_000, 2**32 - 1]),
    top_p=st.sampled_from([0.0, 0.01, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
)


@settings(deadline=None)
@given(st.lists(HOWS, min_size=1, max_size=6), st.sampled_from([2, 64, 1000, 5000]), st.integers(0, 2**32), st.data())
def test_every_row_is_drawn_as_an_enclave_would_draw_it(
    hows: list[Draw], vocabulary: int, seed: int, data: st.DataObject
) -> None:
    # Coarse values tie often.
    scale = data.draw(st.sampled_from([0.5, 2.0, 100.0]))
    logits = torch.randn(len(hows), vocabulary, generator=torch.Generator().manual_seed(seed)).mul(4).round() / scale
    assert pick(logits, hows) == [enclave(row, how) for row, how in zip(logits, hows, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_smallest_of_equal_ids(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 700, dtype=dtype)
    logits[0, [600, 17, 300]] = 4.0
    logits[1, 699] = 1.0
    assert pick(logits, [draw()] * 3) == [17, 699, 0]
    assert pick(logits, [draw(temperature=1.0, top_k=1, seed=9)] * 3) == [17, 699, 0]


@pytest.mark.parametrize("top_k", [0, REACH, 3 * REACH])
def test_a_draw_beyond_the_candidates_that_are_sorted_first_is_found(top_k: int) -> None:
    logits = torch.zeros(1, 40 * REACH)
    hows = [draw(temperature=1.0, top_k=top_k, seed=seed) for seed in range(20)]
    picked = [pick(logits, [how])[0] for how in hows]
    assert picked == [enclave(logits[0], how) for how in hows]
    assert len(set(picked)) > 10


def test_draws_follow_the_distribution() -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    hows = [draw(temperature=1.0, seed=5, step=step) for step in range(4000)]
    counts = np.bincount(pick(row.expand(len(hows), -1), hows), minlength=4) / len(hows)
    expected = torch.softmax(row.double(), 0).numpy()
    assert np.abs(counts - expected).max() < 4 * np.sqrt(0.25 / len(hows))


def test_a_generation_that_goes_on_repeats_no_draw() -> None:
    whole = Generation(5, 10, frozenset(), temperature=1.0, seed=3)
    later = Generation(9, 6, frozenset(), temperature=1.0, seed=3, step=4)
    assert [Draw.of(whole, n) for n in range(4, 10)] == [Draw.of(later, n) for n in range(6)]
