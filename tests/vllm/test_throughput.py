"""Decoding alone on an unmodified vLLM: permuted ids in, permuted ids out."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from stip_protocol.errors import Overloaded
from stip_server.engine import Form, Generation, Ids, Slice
from stip_server.messages import fed_frames
from tests.server.conformance import Bench, Check, Wanted, benched, checks
from tests.vllm.conftest import POSITIONS, SETTINGS, VOCABULARY

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]
PROMPT = [(5 * i + 1) % 211 for i in range(40)]
NEVER = frozenset[int]()


@pytest.mark.parametrize("check", checks({Form.IDS}, max_outputs=1), ids=str)
async def test_the_engine_conforms(throughput: Any, check: Check) -> None:
    await check.run(throughput.make)


async def test_true_ids_permuted_in_and_out_are_those_of_the_plain_model(throughput: Any) -> None:
    instance = throughput.instance
    prompts = [PROMPT[i : i + 10 + 5 * i] for i in range(6)]
    async with benched(throughput.make, Wanted(slots=6, positions=160)) as bench:
        said = await asyncio.gather(
            *(bench.says(Form.IDS, instance.permuted[prompt].tolist(), 60) for prompt in prompts)
        )
    assert [instance.true[ids].tolist() for ids in said] == [instance.said(prompt, 60) for prompt in prompts]


async def drawn(bench: Bench, seed: int, step: int = 0, count: int = 24) -> list[int]:
    session = bench.open(Form.IDS)
    bench.feed_ids(session, 0, PROMPT)
    generation = Generation(len(PROMPT), count, NEVER, temperature=1.5, seed=seed, step=step)
    bench.engine.generate(session, generation)
    ids = await bench.ids(session, len(PROMPT))
    bench.close(session)
    return ids


async def test_draws_follow_from_seed_and_step_whoever_else_is_served(throughput: Any) -> None:
    async with benched(throughput.make, Wanted(slots=8)) as bench:
        alone = await drawn(bench, 2**64 - 1)
        crowd = await asyncio.gather(drawn(bench, 2**64 - 1), *(drawn(bench, seed) for seed in range(5)))
        later = await drawn(bench, 2**64 - 1, step=1)
    assert crowd[0] == alone
    assert len({tuple(ids) for ids in (*crowd, later)}) == 7


async def test_the_models_own_end_of_sequence_is_an_id_like_any_other(throughput: Any) -> None:
    """The plain model's configuration names one, the protected one's none; only the stop ids of a generation end it."""
    assert throughput.loaded.llm.model_config.hf_config.eos_token_id is None
    async with benched(throughput.make, Wanted(positions=192)) as bench:
        for prompt in ([5, 9], [9, 5, 100], PROMPT):
            session = bench.open(Form.IDS)
            bench.feed_ids(session, 0, prompt)
            bench.engine.generate(session, Generation(len(prompt), 120, NEVER))
            assert len(await bench.ids(session, len(prompt))) == 120
            bench.close(session)


async def test_stop_ids_outside_the_vocabulary_stop_nothing(throughput: Any) -> None:
    async with benched(throughput.make) as bench:
        session = bench.open(Form.IDS)
        bench.feed_ids(session, 0, PROMPT)
        bench.engine.generate(session, Generation(len(PROMPT), 5, frozenset({211, 2**32 - 1})))
        assert await bench.ids(session, len(PROMPT)) == bench.model.greedy(PROMPT, 5)


async def test_a_turn_computes_only_what_is_new_under_its_own_salt(throughput: Any) -> None:
    llm = throughput.loaded.llm
    history = np.resize(PROMPT, 70).tolist()

    async def found(salt: str) -> int:
        from vllm import SamplingParams

        prompt = {"type": "token", "prompt_token_ids": history, "cache_salt": salt}
        async for output in llm.generate(prompt, SamplingParams(max_tokens=1, detokenize=False), salt):
            count: int = output.num_cached_tokens
        return count

    assert [await found(salt) for salt in ("one", "one", "two")] == [0, 64, 0]


async def generated(bench: Bench, prompt: list[int], generation: Generation) -> list[int]:
    """What a session of its own says."""
    session = bench.open(Form.IDS)
    bench.feed_ids(session, 0, prompt)
    bench.engine.generate(session, generation)
    ids = await bench.ids(session, len(prompt))
    bench.close(session)
    return ids


@pytest.mark.parametrize("prompt", [40, POSITIONS - 1])
async def test_a_session_is_filled_to_its_last_position(throughput: Any, prompt: int) -> None:
    ids = np.resize(PROMPT, prompt).tolist()
    async with benched(throughput.make, Wanted(positions=POSITIONS)) as bench:
        said = await generated(bench, ids, Generation(prompt, POSITIONS - prompt, NEVER))
    assert said == throughput.instance.greedy(ids, POSITIONS - prompt)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 1e-30},
        {"temperature": 2.0, "top_k": 1, "top_p": 1.0, "seed": 2**64 - 1, "step": 2**32 - 1},
        {"top_k": 2**32 - 1, "top_p": 0.5},
    ],
    ids=str,
)
async def test_sampling_that_leaves_one_choice_is_greedy(throughput: Any, sampling: Any) -> None:
    async with benched(throughput.make) as bench:
        said = await generated(bench, PROMPT, Generation(len(PROMPT), 8, NEVER, **sampling))
    assert said == throughput.instance.greedy(PROMPT, 8)


async def test_bounds_of_sampling_that_bound_nothing_change_no_draw(throughput: Any) -> None:
    free = Generation(len(PROMPT), 8, NEVER, temperature=1.5, seed=3)
    async with benched(throughput.make) as bench:
        said = await generated(bench, PROMPT, free)
        for change in ({"top_k": 2**32 - 1}, {"top_k": VOCABULARY}, {"top_p": 1.0}):
            assert await generated(bench, PROMPT, dataclasses.replace(free, **change)) == said


async def test_a_temperature_below_the_least_of_vllm_counts_as_that(throughput: Any) -> None:
    least = Generation(len(PROMPT), 8, NEVER, temperature=0.01, seed=3)
    async with benched(throughput.make) as bench:
        said = await generated(bench, PROMPT, least)
        assert await generated(bench, PROMPT, dataclasses.replace(least, temperature=5e-324)) == said


async def test_a_temperature_that_vllm_does_not_offer_is_refused_by_name(throughput: Any) -> None:
    """`unavailable` would have the enclave try the same elsewhere."""
    async with benched(throughput.make) as bench:
        session = bench.open(Form.IDS)
        bench.feed_ids(session, 0, PROMPT)
        bench.engine.generate(session, Generation(len(PROMPT), 8, NEVER, temperature=2.5))
        assert await bench.ends(session) == "request_invalid"


async def test_an_engine_that_stops_leaves_vllm_nothing_to_do(throughput: Any) -> None:
    async with benched(throughput.make, Wanted(positions=POSITIONS)) as bench:
        sessions = [bench.open(Form.IDS) for _ in range(4)]
        for session in sessions:
            bench.feed_ids(session, 0, PROMPT)
            bench.engine.generate(session, Generation(len(PROMPT), 150, NEVER))
        await bench.event(sessions[0])
        await bench.engine.stop()
        assert not throughput.loaded.llm.output_processor.has_unfinished_requests()


async def test_streams_that_decode_together_share_a_frame(throughput: Any) -> None:
    """A frame has one account of compute: were it each stream's own, every step would take a frame a stream."""
    streams, ids = 4, 100
    async with throughput.make(Wanted(positions=POSITIONS)) as (engine, _):
        for number in range(streams):
            session = (1, number.to_bytes(16, "big"))
            engine.open(session, max_positions=POSITIONS, output=Form.IDS)
            engine.feed([Slice(session, 0, len(PROMPT), 0, np.array(PROMPT, "<u4").tobytes())])
            engine.generate(session, Generation(len(PROMPT), ids, NEVER))
        whole, running = [], streams
        async for events in engine.steps():
            answers = [event for event in events if isinstance(event, Ids)]
            whole += [len(list(fed_frames(answers)))] if len(answers) == streams else []
            running -= sum(event.done for event in answers)
            if not running:
                break
        await engine.stop()
    assert len(whole) > ids // 2
    assert sum(whole) < len(whole) + streams  # all but the first ids, which began apart


async def test_who_would_not_fit_into_vllms_cache_is_turned_away(throughput: Any) -> None:
    """vLLM would let it in, and compute everybody's rows anew in turns."""
    position = 2 * 2 * 2 * 32 * 4  # keys and values of 2 layers, 2 heads of 32 float32 each
    bound = SETTINGS.memory_gb * 2**30 / position
    assert 0.95 * bound < throughput.loaded.positions <= bound
    narrow = dataclasses.replace(throughput, loaded=dataclasses.replace(throughput.loaded, positions=100))
    async with benched(narrow.make, Wanted(slots=4, positions=64)) as bench:
        bench.open(Form.IDS)
        with pytest.raises(Overloaded):
            bench.open(Form.IDS)
        bench.open(Form.IDS, positions=36)
