"""Intervals cover the truth as often as they say, and lack of data never looks like certainty."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stip_keyservice.audit import intervals

SESSIONS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=20).filter(
    lambda pairs: any(count for _, count in pairs)
)


def arrays(pairs: list[tuple[int, int]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    counts = np.array([count for _, count in pairs], np.float64)
    return np.minimum(np.array([hits for hits, _ in pairs], np.float64), counts), counts


def test_wilsons_interval_is_the_published_one() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for hits, trials, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        found = intervals.wilson(hits, trials)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@pytest.mark.parametrize(("hits", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilsons_interval_refuses_what_is_no_share(hits: int, trials: int) -> None:
    with pytest.raises(ValueError, match="trials"):
        intervals.wilson(hits, trials)


@given(SESSIONS, st.integers(0, 9))
def test_a_share_lies_inside_its_interval_and_the_interval_has_width(pairs: list[tuple[int, int]], seed: int) -> None:
    hits, counts = arrays(pairs)
    found = intervals.share(hits, counts, trials=int(counts.sum()), seed=seed)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.value == pytest.approx(hits.sum() / counts.sum())
    assert found.high - found.low > 0
    alone = intervals.wilson(hits.sum(), int(counts.sum()))
    assert found.low <= alone.low + 1e-12
    assert found.high >= alone.high - 1e-12


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_certainty_in_every_session_is_certainty_up_to_the_number_of_trials(rate: float) -> None:
    counts = np.full(10, 30.0)
    found = intervals.share(rate * counts, counts, trials=300, seed=1)
    assert found.value == rate
    assert 3 / 300 < found.high - found.low < 4 / 300


def test_one_session_has_the_interval_of_its_trials() -> None:
    found = intervals.share(np.array([3.0]), np.array([10.0]), trials=10, seed=1)
    assert found == intervals.wilson(3, 10)


def test_sessions_that_are_all_or_nothing_widen_the_interval() -> None:
    counts = np.full(20, 50.0)
    even = intervals.share(np.full(20, 25.0), counts, trials=1000, seed=1)
    clustered = intervals.share(np.tile([0.0, 50.0], 10), counts, trials=1000, seed=1)
    assert clustered.high - clustered.low > 5 * (even.high - even.low)


def test_sessions_that_count_nothing_change_nothing() -> None:
    hits, counts = np.array([3.0, 9.0, 4.0]), np.array([10.0, 10.0, 8.0])
    with_empty = intervals.share(np.append(hits, 0.0), np.append(counts, 0.0), trials=28, seed=1)
    assert with_empty == intervals.share(hits, counts, trials=28, seed=1)
    with pytest.raises(ValueError, match="nothing was counted"):
        intervals.share(np.zeros(2), np.zeros(2), trials=1, seed=1)


def test_the_same_seed_draws_the_same_interval() -> None:
    hits, counts = np.arange(20.0), np.full(20, 23.0)
    first = intervals.share(hits, counts, trials=460, seed=1)
    intervals._weights.cache_clear()
    assert intervals.share(hits, counts, trials=460, seed=1) == first
    assert intervals.share(hits, counts, trials=460, seed=2) != first


@pytest.mark.parametrize(("rate", "alike"), [(0.3, 4.0), (0.05, 40.0), (0.9, 10.0)])
def test_intervals_of_clustered_sessions_cover_the_truth_about_as_often_as_they_say(rate: float, alike: float) -> None:
    generator, trials, covered = np.random.default_rng(7), 400, 0
    for _ in range(trials):
        rates = generator.beta(rate * alike, (1 - rate) * alike, size=16)  # tokens of one session are alike
        hits, counts = generator.binomial(40, rates).astype(np.float64), np.full(16, 40.0)
        found = intervals.share(hits, counts, trials=640, seed=1)
        covered += found.low <= rate <= found.high
    assert 0.92 <= covered / trials <= 0.99


def test_a_perplexity_is_the_exponential_of_the_mean_surprise() -> None:
    sessions = [np.array([1.0, 2.0]), np.array([3.0, 2.0, 4.0]), np.array([0.5])]
    found = intervals.exponential_mean(*intervals.by_session(sessions), seed=1)
    assert found.value == pytest.approx(np.exp(12.5 / 6))
    assert found.low < found.value < found.high


def test_a_perplexity_of_one_text_alone_has_an_interval_too() -> None:
    found = intervals.exponential_mean(*intervals.by_session([np.array([1.0, 2.0, 3.0])]), seed=1)
    assert found.value == pytest.approx(np.exp(2))
    assert found.low < found.value < found.high
