"""Hidden states row by row on vLLM's pooling runner, of an instance under dense keys."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from stip_protocol.errors import TensorInvalid
from stip_server.engine import Form, Hidden, Slice
from stip_server.engines.vllm.head import Answers
from stip_server.engines.vllm.requests import last_state
from stip_server.engines.vllm.sequence import Rows
from tests.server.conformance import Check, Wanted, benched, checks
from tests.vllm.conftest import POSITIONS

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]
PROMPT = [(7 * i + 3) % 211 for i in range(70)]


@pytest.mark.parametrize("check", checks({Form.HIDDEN}, max_outputs=1), ids=str)
async def test_the_engine_conforms(hardened: Any, check: Check) -> None:
    await check.run(hardened.make)


async def test_long_sessions_beside_each_other_say_what_the_plain_model_says(hardened: Any) -> None:
    prompts = [PROMPT[i : i + 20 + 11 * i] for i in range(4)]
    async with benched(hardened.make, Wanted(slots=4, positions=160)) as bench:
        answers = await asyncio.gather(*(bench.says(Form.HIDDEN, prompt, 40, frame=16) for prompt in prompts))
    assert answers == [hardened.instance.greedy(prompt, 40) for prompt in prompts]


@pytest.mark.parametrize("prompt", [POSITIONS - 2, POSITIONS])
async def test_a_session_is_filled_to_its_last_position(hardened: Any, prompt: int) -> None:
    ids = np.resize(PROMPT, prompt).tolist()
    count = POSITIONS - prompt + 1  # the answer to the last row is an id that is fed nowhere
    async with benched(hardened.make, Wanted(positions=POSITIONS)) as bench:
        assert await bench.says(Form.HIDDEN, ids, count, frame=50) == hardened.instance.greedy(ids, count)


def rows_of(instance: Any, card: Any, ids: list[int]) -> Rows:
    rows = Rows(card)
    rows.add(Slice((0, b""), 0, len(ids), 1, instance.rows(ids)))
    return rows


async def cached(llm: Any, rows: Rows, salt: str) -> tuple[int, torch.Tensor]:
    """(positions that vLLM found in its prefix cache, the last hidden state)."""
    counts: list[int] = []
    encode = llm.encode

    async def counting(*arguments: Any) -> Any:
        async for output in encode(*arguments):
            counts.append(output.num_cached_tokens)
            yield output

    class Counting:
        """The same vLLM, and what it says of its cache."""

    seen = Counting()
    seen.encode = counting  # type: ignore[attr-defined]
    state = await last_state(seen, "cached", rows, salt)
    return counts[-1], state


async def test_a_later_step_finds_its_whole_blocks_again_under_its_salt_alone(hardened: Any) -> None:
    llm, card = hardened.loaded.llm, hardened.loaded.card
    rows = rows_of(hardened.instance, card, PROMPT)
    first, state = await cached(llm, rows, "one")
    again, same = await cached(llm, rows, "one")
    other, equal = await cached(llm, rows, "two")
    assert (first, again, other) == (0, 64, 0)
    torch.testing.assert_close(state, same, atol=1e-5, rtol=0)
    torch.testing.assert_close(state, equal, atol=1e-5, rtol=0)


async def test_rows_that_differ_in_one_value_share_no_block_from_there_on(hardened: Any) -> None:
    llm, card = hardened.loaded.llm, hardened.loaded.card
    await cached(llm, rows_of(hardened.instance, card, PROMPT), "three")
    changed = rows_of(hardened.instance, card, PROMPT)
    changed.tensor()[40, 5] += 1e-3
    assert (await cached(llm, changed, "three"))[0] == 32


async def test_a_state_that_is_not_finite_is_refused_and_no_other_of_its_batch(hardened: Any) -> None:
    card = hardened.loaded.card
    answers = Answers(card, None, None, 1)
    states = [torch.full((card.width,), value) for value in (1.0, float("nan"), float("inf"), 2.0)]
    results = await asyncio.gather(*(answers.answer(Form.HIDDEN, state) for state in states))
    answers.stop()
    assert [type(result.error) for result in results] == [type(None), TensorInvalid, TensorInvalid, type(None)]
    assert results[3].out == Hidden(states[3].numpy().tobytes())


def test_rows_take_no_more_room_than_the_longest_session(hardened: Any) -> None:
    rows, card = Rows(hardened.loaded.card), hardened.loaded.card
    for position in range(POSITIONS):
        rows.add(Slice((0, b""), position, 1, 1, hardened.instance.rows([position])))
        assert rows.tensor().untyped_storage().nbytes() <= POSITIONS * card.width * 4
