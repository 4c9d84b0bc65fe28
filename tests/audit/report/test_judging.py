"""Levels say what the intervals are sure of, and nothing more."""

from __future__ import annotations

import pytest

from stip_keyservice.audit.document import Bounds, Cell, Metric
from stip_keyservice.audit.report.judging import LOOKS, Level, counts, judge, main, of_kind, worst
from stip_protocol.leakage import Interval

from .conftest import share, tokens


def _metric(value: float, low: float, high: float, prior: Interval | None) -> Metric:
    measured = Interval(value=value, low=low, high=high)
    return Metric(name="token_top1", measured=measured, prior=prior, counted=100)


GUESS = Interval(value=0.18, low=0.16, high=0.20)


@pytest.mark.parametrize(
    ("measured", "level"),
    [
        ((0.05, 0.03, 0.08), Level.GUESS),
        ((0.20, 0.17, 0.24), Level.GUESS),
        ((0.22, 0.19, 0.26), Level.UNCLEAR),
        ((0.6, 0.1, 0.95), Level.UNCLEAR),
        ((0.26, 0.23, 0.29), Level.SOME),
        ((0.6, 0.59, 0.61), Level.SOME),
        ((0.7, 0.61, 0.75), Level.MUCH),
        ((0.95, 0.91, 0.97), Level.MUCH),
        ((0.95, 0.93, 0.97), Level.ALL),
        ((1.0, 0.998, 1.0), Level.ALL),
    ],
)
def test_the_lower_end_of_a_figure_is_held_against_the_upper_end_of_the_guess(
    measured: tuple[float, float, float], level: Level
) -> None:
    assert judge(_metric(*measured, GUESS)) is level


def test_a_wide_interval_above_the_guess_is_never_called_a_guess() -> None:
    assert judge(_metric(0.9, 0.0, 1.0, GUESS)) is Level.UNCLEAR


def test_a_guess_that_gets_everything_is_not_beaten() -> None:
    assert judge(_metric(1, 1, 1, Interval(value=1, low=1, high=1))) is Level.GUESS


def test_without_a_guess_nothing_is_compared() -> None:
    assert judge(_metric(0.9, 0.8, 1.0, None)) is Level.UNCOMPARED
    bounds = Bounds(value=31, low=28, high=34)
    assert judge(Metric(name="stolen_perplexity", measured=bounds, prior=bounds, counted=9)) is Level.UNCOMPARED


def test_every_level_is_told_apart_without_colours() -> None:
    assert set(LOOKS) == set(Level)
    assert len({look.sign for look in LOOKS.values()}) == len({look.words for look in LOOKS.values()}) == len(Level)


def test_tokens_stand_for_a_cell_before_copies_and_keys() -> None:
    metrics = (share("residual_cosine", 1.0, 0.06), share("stolen_agreement", 0.9, 0.2), *tokens(0.3))
    shown = main(Cell(attack="D", knowledge="base", metrics=metrics))
    assert shown is not None
    assert shown.name == "token_top1"


def test_of_several_models_the_first_stands_for_all() -> None:
    metrics = (share("stolen_agreement", 0.4, 0.2, of="best"), share("stolen_agreement", 0.3, 0.2, of="other"))
    shown = main(Cell(attack="J", knowledge="accomplice", metrics=metrics))
    assert shown is not None
    assert shown.of == "best"


def test_what_is_read_of_answers_alone_is_never_counted_as_sessions() -> None:
    spliced = Cell(attack="K", knowledge="accomplice", metrics=tokens(1.0))
    assert of_kind(spliced, "text") is None
    assert of_kind(spliced, "answers") is spliced.metrics[0]
    assert counts(spliced, spliced.metrics[0]) == "of tokens, answers alone"


def test_a_metric_that_nobody_knows_is_named_by_itself() -> None:
    cell = Cell(attack="Z", knowledge="server", metrics=(share("new_figure", 0.5, 0.2),))
    assert main(cell) is cell.metrics[0]
    assert counts(cell, cell.metrics[0]) == "new figure"


def test_the_worst_cell_is_the_one_that_is_surely_worst() -> None:
    sure = Cell(attack="B", knowledge="table", metrics=(_metric(0.5, 0.48, 0.52, GUESS),))
    unsure = Cell(attack="C", knowledge="table", metrics=(_metric(0.6, 0.1, 0.9, GUESS),))
    absent = Cell(attack="D", knowledge="table", not_applicable="no base")
    assert worst([unsure, absent, sure], "text") == (sure, sure.metrics[0])
    assert worst([absent], "text") is None
