"""The largest logits on vLLM's pooling runner: the head is the engine's."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from stip_server.engine import Form, Logits, Top
from tests.server.conformance import Check, Wanted, benched, checks

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]
PROMPT = [(5 * i + 1) % 211 for i in range(40)]


@pytest.mark.parametrize("check", checks({Form.TOP}, max_outputs=1), ids=str)
async def test_the_engine_conforms(paper: Any, check: Check) -> None:
    await check.run(paper.make)


async def test_long_sessions_beside_each_other_say_what_the_plain_model_says(paper: Any) -> None:
    prompts = [PROMPT[i : i + 10 + 7 * i] for i in range(4)]
    async with benched(paper.make, Wanted(slots=4, positions=160)) as bench:
        answers = await asyncio.gather(*(bench.says(Form.TOP, prompt, 30, frame=16) for prompt in prompts))
    assert answers == [paper.instance.greedy(prompt, 30) for prompt in prompts]


async def test_a_top_and_its_row_are_those_of_the_plain_model_permuted(paper: Any) -> None:
    with torch.inference_mode():
        plain = paper.instance.plain(torch.tensor([PROMPT])).logits[0, -1]
    expected = plain[torch.from_numpy(paper.instance.true.copy())].numpy()
    async with benched(paper.make) as bench:
        session = bench.open(Form.TOP)
        bench.feed(session, 0, PROMPT)
        top = (await bench.output(session)).out
        bench.engine.recall(session, len(PROMPT) - 1)
        row = (await bench.output(session)).out
    assert isinstance(top, Top)
    assert isinstance(row, Logits)
    np.testing.assert_allclose(np.frombuffer(row.rows, np.float32), expected, atol=1e-4)
    assert np.frombuffer(top.indices, "<u4").tolist() == np.argsort(-expected, kind="stable")[: top.count].tolist()
    np.testing.assert_allclose(np.frombuffer(top.values, np.float32), -np.sort(-expected)[: top.count], atol=1e-4)
    total = float(torch.logsumexp(plain, 0))
    assert np.frombuffer(top.log_sum_exp, np.float32)[0] == pytest.approx(total, abs=1e-4)
