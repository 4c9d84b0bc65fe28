"""Differences are what their definitions say, however they are gathered."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stip_keyservice.protect.equivalence import comparison
from stip_keyservice.protect.equivalence.comparison import Picks, Tally, keyed
from stip_protocol.keys import KeyStream, draw_centred_orthogonal, draw_orthogonal

SHAPES = st.tuples(st.integers(1, 9), st.integers(2, 7), st.integers(0, 2**31))


def pair(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width, seed = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator), torch.randn(rows, width, generator=generator)


@given(SHAPES, st.integers(0, 9))
def test_a_tally_is_the_figures_of_all_rows(shape: tuple[int, int, int], cut: int) -> None:
    reference, found = pair(shape)
    parts = Tally(), Tally()
    for part, rows in zip(parts, (slice(None, cut), slice(cut, None)), strict=True):
        part.add(reference[rows], found[rows])
    figures = (parts[0] + parts[1]).figures()
    difference = (reference.double() - found.double()).abs()
    assert figures.largest == difference.max().item()
    assert figures.mean == pytest.approx(difference.mean().item())
    assert figures.rms == pytest.approx(difference.square().mean().sqrt().item())
    assert figures.worst_row_rms == pytest.approx(difference.square().mean(1).sqrt().max().item())
    assert figures.worst_column_rms == pytest.approx(difference.square().mean(0).sqrt().max().item())
    assert figures.spread == pytest.approx(reference.double().std(dim=1, correction=0).mean().item())
    assert figures.relative_rms == pytest.approx(figures.rms / figures.spread)


def test_large_tallies_are_added_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, found = pair((9, 5, 1))
    whole, blocks = Tally(), Tally()
    whole.add(reference, found)
    monkeypatch.setattr(comparison, "BLOCK_VALUES", 11)
    blocks.add(reference, found)
    assert blocks.figures().model_dump() == pytest.approx(whole.figures().model_dump())
    assert blocks.rows == 9


def test_one_value_has_no_spread_and_is_compared() -> None:
    tally = Tally()
    tally.add(torch.tensor([[2.0], [3.0]]), torch.tensor([[2.0], [3.5]]))
    figures = tally.figures()
    assert figures.spread == 0.0
    assert figures.relative_largest == 0.5


def test_nothing_compared_is_no_agreement() -> None:
    picks = Picks()
    assert math.isnan(picks.tally.figures().rms)
    assert picks.top1 == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_as_nan_for_good(value: float) -> None:
    reference, found = pair((4, 3, 0))
    bad = found.clone()
    bad[1, 1] = value
    tally = Tally()
    tally.add(reference, bad)
    tally.add(reference, found)
    assert math.isnan(tally.figures().largest)
    assert not tally.figures().relative_rms <= 1e30
    assert math.isnan((Tally() + tally).figures().largest)
    assert math.isnan((tally + Tally()).figures().largest)


def test_a_tie_is_a_small_gap_of_the_reference() -> None:
    reference = torch.tensor([[3.0, 2.9, 0.0], [3.0, 1.0, 0.0], [1.0, 5.0, 2.0]])
    found = torch.tensor([[2.9, 3.0, 0.0], [0.0, 1.0, 0.5], [1.0, 5.0, 2.0]])
    picks = Picks()
    picks.add(reference, found)
    assert picks.top1 == pytest.approx(1 / 3)
    assert picks.top1_with_ties(0.2) == pytest.approx(2 / 3)
    assert picks.top1_with_ties(2.0) == 1.0
    assert picks.top1_with_ties(math.nan) == 0.0
    assert (picks + picks).top1 == picks.top1


@pytest.mark.parametrize("draw", [draw_orthogonal, draw_centred_orthogonal])
def test_keyed_rows_are_the_keys_matrix_times_each(draw: object) -> None:
    key = draw(KeyStream(bytes(32), "key"), 6)  # type: ignore[operator]
    rows, _ = pair((4, 6, 3))
    expected = rows.double().numpy() @ key.matrix().T
    assert np.allclose(keyed(key, rows).numpy(), expected, rtol=0, atol=1e-14)
    assert keyed(key, rows).dtype is torch.float64
