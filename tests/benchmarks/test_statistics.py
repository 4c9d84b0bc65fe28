"""From samples to ratios and verdicts: pure functions, held to what they promise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.models import Shape, Subject
from benchmarks.ratios import joined, median, ratio
from benchmarks.samples import Order, Samples
from benchmarks.serving.bench import Scale
from benchmarks.serving.comparison import AGAIN, BASE, PLAIN, Against, cell, gaps, measure, pace, rate, same
from benchmarks.serving.interleaving import LEAST_ROUNDS, Budget, Load, interleave
from benchmarks.serving.sections import curves, delay, drafting, prefill, throughput, tokens
from benchmarks.serving.sections.curves import Plan
from benchmarks.verdict import CONTROL_SPREAD, Verdict, verdict


def samples(gap: float, *, streams: int = 1, count: int = 5, first: float = 1.0, head: float | None = None) -> Samples:
    """Streams whose tokens come every `gap` seconds."""
    times = [[first + gap * number for number in range(count)] for _ in range(streams)]
    return Samples([first] * streams, times, [[7] * (count + 1) for _ in range(streams)], head)


def test_gaps_count_only_while_every_stream_decodes() -> None:
    found = Samples([1.0, 2.5], [[1.0, 2.0, 3.0, 4.5], [2.5, 3.5, 5.0]], [[], []])
    assert found.gaps == [1.5, 1.0, 1.5]
    assert found.pace == [1.5, 1.25]


@pytest.mark.parametrize("times", [[[1.0], [2.0]], [[1.0, 2.0], []]])
def test_a_run_too_short_to_measure_is_refused(times: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="ask for more tokens"):
        _ = Samples([0.5, 0.5], times, [[], []]).gaps


def test_a_ratio_is_of_pooled_medians_and_lies_in_its_interval() -> None:
    under = [[1.0, 1.0, 1.1], [0.9, 1.0, 1.0]]
    over = [[2.0, 2.0, 2.2], [1.8, 2.0, 2.0]]
    found = ratio(over, under, seed=1)
    assert found.value == pytest.approx(2.0)
    assert found.low <= found.value <= found.high
    assert found == ratio(over, under, seed=1)
    assert ratio(over, under, seed=1, less=[1.0, 1.0]).value == pytest.approx(1.0)
    assert median(joined(under, over)) == pytest.approx(1.45)


RATIOS = st.floats(0.1, 10)


@given(RATIOS, RATIOS, RATIOS)
def test_a_control_outside_its_bounds_is_never_a_pass_and_never_a_fail(
    value: float, control: float, target: float
) -> None:
    found = verdict(value, control, target)
    assert (found is Verdict.INCONCLUSIVE) == (abs(control - 1) > CONTROL_SPREAD)
    if found is not Verdict.INCONCLUSIVE:
        assert (found is Verdict.PASS) == (value <= target)


@pytest.mark.parametrize(
    ("value", "control", "expected"),
    [
        (1.05, 1.0, Verdict.PASS),
        (1.0501, 1.0, Verdict.FAIL),
        (1.2, 0.985, Verdict.FAIL),
        (1.0, 1.021, Verdict.INCONCLUSIVE),
        (1.0, 0.979, Verdict.INCONCLUSIVE),
        (1.2, 1.05, Verdict.INCONCLUSIVE),
        (math.nan, 1.0, Verdict.INCONCLUSIVE),
        (1.0, math.nan, Verdict.INCONCLUSIVE),
    ],
)
def test_a_verdict_has_three_values(value: float, control: float, expected: Verdict) -> None:
    assert verdict(value, control, 1.05) is expected


def test_an_arm_is_held_against_both_plain_runs_and_judged_against_its_target() -> None:
    runs = {PLAIN: [samples(0.10)] * 3, AGAIN: [samples(0.101)] * 3, "paper": [samples(0.105)] * 3}
    found = measure(runs, Against("paper"), gaps, target=1.06, seed=0)
    assert found.ratio.value == pytest.approx(0.105 / 0.1005)
    assert found.control.value == pytest.approx(1.01)
    assert found.added == pytest.approx(0.0045)
    assert found.verdict is Verdict.PASS
    assert measure(runs, Against("paper"), gaps, target=1.04, seed=0).verdict is Verdict.FAIL
    assert measure(runs, Against("paper"), gaps, target=None, seed=0).verdict is None


def test_a_noisy_control_makes_a_good_ratio_inconclusive() -> None:
    runs = {PLAIN: [samples(0.10)] * 3, AGAIN: [samples(0.11)] * 3, "paper": [samples(0.1)] * 3}
    assert measure(runs, Against("paper"), gaps, target=1.05, seed=0).verdict is Verdict.INCONCLUSIVE


def test_a_head_in_the_enclave_is_taken_off_before_the_target_is_asked_for() -> None:
    runs = {
        PLAIN: [samples(0.10)] * 2,
        AGAIN: [samples(0.10)] * 2,
        BASE: [samples(0.08)] * 2,
        "hardened": [samples(0.12, head=0.038)] * 2,
    }
    found = measure(runs, Against("hardened", base=BASE), gaps, target=1.05, seed=0)
    assert found.ratio.value == pytest.approx(1.2)
    assert found.served is not None
    assert found.served.value == pytest.approx(0.082 / 0.08)
    assert found.verdict is Verdict.PASS


def test_a_cell_says_how_many_tokens_a_second_all_streams_had_together() -> None:
    runs = {PLAIN: [samples(0.1, streams=4)], AGAIN: [samples(0.1, streams=4)], "paper": [samples(0.2, streams=4)]}
    subject = Subject("m", "a model", "float32", None)
    found = cell(runs, Against("paper", more={"delay": 0.01}), subject, Load(4, 8, 5, 1), seed=0, token=pace)
    assert (found.rate, found.plain_rate) == (pytest.approx(20), pytest.approx(40))
    assert rate(runs[PLAIN]) == pytest.approx(40)
    assert (found.streams, found.rounds, found.delay, found.same) == (4, 1, 0.01, 1.0)


def test_tokens_behind_the_first_difference_do_not_count_as_the_same() -> None:
    left = Samples([], [], [[1, 2, 3, 4], [1, 2]])
    right = Samples([], [], [[1, 9, 3, 4], [1, 2, 3]])
    assert same([left], [right]) == pytest.approx(3 / 6)


def test_prompts_are_the_same_for_a_seed_and_repeat_where_they_should() -> None:
    load = Load(3, 20, 4, 2, repeating=8)
    orders = load.orders(1000, seed=5)
    assert orders == load.orders(1000, seed=5)
    assert orders != load.orders(1000, seed=6)
    for order in orders:
        assert [len(prompt) for prompt in order.prompts] == [20, 20, 20]
        assert all(prompt[at] == prompt[at % 8] for prompt in order.prompts for at in range(20))
    assert orders[0].seconds == [prompt[:1] for prompt in orders[0].prompts]


async def test_every_arm_runs_once_a_round_on_the_same_prompts() -> None:
    seen: list[tuple[str, Order]] = []

    def arm(name: str):  # type: ignore[no-untyped-def]
        async def run(order: Order) -> Samples:
            seen.append((name, order))
            return samples(0.1)

        return run

    orders = Load(1, 4, 2, 6).orders(100, seed=0)
    arms = {name: arm(name) for name in "abc"}
    said: list[str] = []
    runs = await interleave(arms, orders, Budget(3600), seed=0, say=said.append)
    assert {name: len(found) for name, found in runs.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [seen[at : at + 3] for at in range(0, 18, 3)]
    for number, of_round in enumerate(rounds):
        assert {name for name, _ in of_round} == set("abc")
        assert all(order is orders[number] for _, order in of_round)
    assert len({tuple(name for name, _ in of_round) for of_round in rounds}) > 1
    assert said[-1].startswith("1 streams, round 6 of 6")


async def test_a_spent_budget_leaves_as_many_rounds_as_an_interval_needs() -> None:
    async def run(order: Order) -> Samples:
        return samples(0.1)

    orders = Load(1, 4, 2, 6).orders(100, seed=0)
    runs = await interleave({"a": run}, orders, Budget(0.0), seed=0, say=lambda what: None)
    assert len(runs["a"]) == LEAST_ROUNDS


def test_a_curve_varies_one_variable_at_a_time_around_one_middle() -> None:
    middle, load = Shape(1000, 128, 2), Load(1, 32, 8, 2)
    loads = {"streams": (load, Load(8, 32, 16, 2)), "prompt": (Load(1, 16, 8, 2), load)}
    plan = Plan(middle, load, {"width": (64, 128, 256), "depth": (1, 2)}, loads)
    points = list(plan.points())
    assert [shape for shape, _ in points] == [middle, Shape(1000, 64, 2), Shape(1000, 256, 2), Shape(1000, 128, 1)]
    assert {(each.axis, each.at) for each in points[0][1]} == {
        ("width", 128), ("depth", 2), ("streams", 1), ("streams", 8), ("prompt", 16), ("prompt", 32)
    }  # fmt: skip
    for _, found in points:
        for each in found:
            assert sum((each.load.streams != load.streams, each.load.prompt != load.prompt)) <= 1


def plans() -> Iterator[tuple[str, Load]]:
    """Every load of every section, at every scale."""
    for scale in Scale:
        for loads in tokens.PLANS[scale].loads.values():
            yield from (("tokens", load) for load in loads)
        yield from (("prefill", load) for load in prefill.PLANS[scale].loads)
        yield from (("throughput", load) for load in throughput.PLANS[scale].loads)
        yield from (("delay", load) for load in delay.PLANS[scale].loads)
        yield "drafting", drafting.PLANS[scale].load
        for _, points in curves.PLANS[scale].points():
            yield from (("curves", point.load) for point in points)


@pytest.mark.parametrize(("section", "load"), sorted(set(plans()), key=str))
def test_every_plan_asks_for_tokens_while_all_its_streams_decode(section: str, load: Load) -> None:
    # Streams may be taken up one by one, each for one token of the others.
    assert load.tokens >= load.streams + 3, section
    assert load.rounds >= 1
