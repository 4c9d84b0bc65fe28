"""The transformers engine where it decodes alone, and beside sessions that go step by step."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from stip_server.config import TransformersSettings
from stip_server.engine import Form, Generation, Ids
from stip_server.engines.transformers import TransformersEngine, card_for, split
from tests.server.conformance import Bench, Make, Wanted, benched
from tests.server.conformance_stepwise import drafting

NEVER = frozenset[int]()


def serving(plain: Any, **settings: Any) -> Make:
    @contextlib.asynccontextmanager
    async def make(wanted: Wanted) -> AsyncIterator[tuple[TransformersEngine, Any]]:
        chosen = TransformersSettings(**settings)
        base, head = split(plain.model)
        yield TransformersEngine(base, head, card_for(base, head, chosen), chosen), plain

    return make


async def test_sessions_of_every_kind_share_steps_and_get_the_plain_models_tokens(plain: Any) -> None:
    prompts = [plain.prompt(1 + 5 * i % 43, seed=i) for i in range(18)]
    gate = asyncio.Semaphore(8)
    kinds: list[Callable[[Bench, list[int]], Any]] = [
        lambda bench, prompt: bench.says(Form.HIDDEN, prompt, 12, 7),
        lambda bench, prompt: bench.says(Form.TOP, prompt, 12, 7),
        lambda bench, prompt: bench.says(Form.IDS, prompt, 12, 7),
        lambda bench, prompt: drafting(bench, Form.HIDDEN, prompt, 12, 2),
        lambda bench, prompt: drafting(bench, Form.TOP, prompt, 12, 0),
    ]

    async def one(bench: Bench, name: int) -> list[int]:
        async with gate:
            said: list[int] = await kinds[name % len(kinds)](bench, prompts[name])
            return said

    async with benched(serving(plain, slots=8, prefill_chunk=8)) as bench:
        answers = await asyncio.gather(*(one(bench, name) for name in range(len(prompts))))
        assert max(step.sessions for step in bench.steps) > 3
    assert answers == [plain.greedy(prompt, 12) for prompt in prompts]


async def drawn(bench: Bench, prompt: list[int], counts: list[int], how: dict[str, Any]) -> list[int]:
    """One generation of `sum(counts)` ids, in so many parts, each in a session of its own that is told all before."""
    ids: list[int] = []
    for count in counts:
        session = bench.open(Form.IDS)
        bench.feed_ids(session, 0, [*prompt, *ids])
        at = len(prompt) + len(ids)
        bench.engine.generate(session, Generation(at, count, NEVER, seed=7, step=len(ids), **how))
        ids += await bench.ids(session, at)
        bench.close(session)
    return ids


@pytest.mark.parametrize(
    "how", [{"temperature": 1.0}, {"temperature": 2.0, "top_k": 20}, {"temperature": 0.8, "top_p": 0.9}]
)
async def test_a_sampled_generation_that_goes_on_elsewhere_draws_what_it_would_have_drawn(
    llama: Any, how: dict[str, Any]
) -> None:
    async with benched(serving(llama)) as bench:
        whole, parts, single = await asyncio.gather(
            *(drawn(bench, [5, 6, 7], counts, how) for counts in ([12], [5, 1, 6], [1] * 12))
        )
    assert whole == parts == single
    assert whole != llama.greedy([5, 6, 7], 12)


async def test_every_step_of_a_generation_is_told_at_once_with_its_own_account(llama: Any) -> None:
    async with benched(serving(llama, prefill_chunk=4)) as bench:
        session, events = bench.open(Form.IDS), list[Ids]()
        bench.feed_ids(session, 0, llama.prompt(10, seed=1))
        bench.engine.generate(session, Generation(10, 5, NEVER))
        while not events or not events[-1].done:
            event = await bench.event(session)
            assert isinstance(event, Ids)
            events.append(event)
        assert [len(event.ids) for event in events] == [4] * 5
        assert [step.rows for step in bench.steps] == [4, 4, 2, 1, 1, 1, 1]
        computes = [step.compute for step in bench.steps]
        assert [event.compute for event in events] == pytest.approx([sum(computes[:3]), *computes[3:]])


async def test_nothing_of_a_closed_generation_is_left_for_the_next_session(llama: Any) -> None:
    async with benched(serving(llama, slots=1)) as bench:
        for turns in range(10):
            session = bench.open(Form.IDS)
            bench.feed_ids(session, 0, llama.prompt(30, seed=turns))
            bench.engine.generate(session, Generation(30, 60, NEVER))
            for _ in range(turns):
                await bench.event(session)
            bench.close(session)
            assert await bench.says(Form.HIDDEN, [3, 1, 4], 2) == llama.greedy([3, 1, 4], 2)


def test_one_session_can_always_hold_what_the_card_says(llama: Any) -> None:
    base, head = split(llama.model)
    assert card_for(base, head, TransformersSettings(positions=50)).max_positions == 50
    assert card_for(base, head, TransformersSettings(positions=5000)).max_positions == 96
