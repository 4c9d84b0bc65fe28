"""The plain arm: the engine called directly gives the plain model's tokens, in both turns, however it decodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.direct import DirectEngine
from benchmarks.models import DEMO_MODEL
from benchmarks.samples import Order
from stip_enclave.sampling import Sampler, Sampling
from stip_server.engine import Form
from stip_stack.reference import PlainModel

PROMPTS = [[5, 6, 7, 8, 9], [100, 3, 77], [1024, 8, 8, 8]]
TOKENS = 6


@pytest.fixture(scope="module")
def engine() -> Iterator[DirectEngine]:
    with DirectEngine(DEMO_MODEL, "float32", {"slots": 4, "threads": 1, "max_positions": 64}) as running:
        yield running


@pytest.mark.parametrize("form", [Form.TOP, Form.IDS])
async def test_both_turns_give_the_plain_tokens(engine: DirectEngine, form: Form) -> None:
    found = await engine.arm(form)(Order(PROMPTS, TOKENS))
    plain, greedy = PlainModel(DEMO_MODEL), Sampler(Sampling())
    assert len(found.first) == len(found.times) == len(found.ids) == len(PROMPTS)
    assert max(map(len, found.times)) == TOKENS
    for prompt, times, ids in zip(PROMPTS, found.times, found.ids, strict=True):
        first = plain.generate(prompt, greedy, max_tokens=1, stop_ids=frozenset())
        again = [*prompt, *first, prompt[0]]
        second = plain.generate(again, greedy, max_tokens=TOKENS, stop_ids=frozenset())
        assert ids == (first + second)[: len(ids)]
        assert len(ids) == len(times) + 1
        assert times == sorted(times)
        assert times[0] > 0


async def test_a_run_without_a_head_has_as_many_times(engine: DirectEngine) -> None:
    found = await engine.arm(Form.HIDDEN)(Order(PROMPTS, TOKENS))
    assert max(map(len, found.times)) == TOKENS
    assert all(gap > 0 for gap in found.gaps)


async def test_one_engine_serves_one_run_after_the_other(engine: DirectEngine) -> None:
    arm = engine.arm(Form.TOP)
    runs = [await arm(Order(PROMPTS[:1], TOKENS)) for _ in range(3)]
    assert runs[0].ids == runs[1].ids == runs[2].ids
