"""The transformers engine where steps fail within the model, as they do where memory runs out or a device is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stip_protocol.errors import Unavailable
from stip_server.engine import Form, Generation
from stip_server.engines.transformers.engine import FAILED_STEPS
from tests.server.conformance import Bench, Wanted, benched
from tests.server.test_engine_alone import NEVER, serving

SECRET = "a secret in a library's message"


class Failure:
    """Makes every step of a model raise, while `now` is set."""

    def __init__(self, plain: Any) -> None:
        self.now = False

        def step(module: Any, args: Any) -> None:  # a method would be copied with the model, and this with it
            if self.now:
                raise RuntimeError(SECRET)

        plain.model.base_model.register_forward_pre_hook(step)


async def test_a_step_that_fails_ends_the_sessions_in_it_and_the_engine_goes_on(
    make_plain: Any, run_direct: Any
) -> None:
    plain = make_plain("llama")
    failure = Failure(plain)
    async with run_direct(plain) as direct:
        bystander = direct.open(1)
        victim = direct.open(2)
        for session in (bystander, victim):
            direct.feed(session, [1, 2, 3])
            ids = [plain.pick((await direct.next(session)).out)]
        failure.now = True
        direct.feed(victim, [1])
        with pytest.raises(Unavailable) as refused:
            await direct.next(victim)
        assert SECRET not in str(refused.value)
        failure.now = False
        direct.feed(bystander, ids)
        ids.append(plain.pick((await direct.next(bystander)).out))
        assert ids == plain.greedy([1, 2, 3], 2)


async def test_a_generation_that_fails_ends_alone(make_plain: Any) -> None:
    plain = make_plain("llama")
    failure = Failure(plain)
    async with benched(serving(plain)) as bench:
        bystander, victim = bench.open(Form.HIDDEN), bench.open(Form.IDS)
        bench.feed(bystander, 0, [1, 2, 3])
        ids = [await bench.pick(bystander, 2)]
        bench.feed_ids(victim, 0, [1, 2, 3])
        failure.now = True
        bench.engine.generate(victim, Generation(3, 8, NEVER))
        with pytest.raises(Unavailable):
            await bench.event(victim)
        failure.now = False
        bench.feed(bystander, 3, ids)
        ids.append(await bench.pick(bystander, 3))
        assert ids == plain.greedy([1, 2, 3], 2)


async def test_an_engine_whose_steps_all_fail_gives_up(make_plain: Any) -> None:
    plain = make_plain("llama")
    failure = Failure(plain)
    engine: Any
    async with serving(plain)(Wanted()) as (engine, _):
        bench = Bench(engine, plain)
        pump = asyncio.create_task(bench.pump())
        for _ in range(2):
            failure.now = False
            assert await bench.says(Form.HIDDEN, [1, 2], 2) == plain.greedy([1, 2], 2)
            failure.now = True
            for _ in range(FAILED_STEPS - 1):
                session = bench.open(Form.HIDDEN)
                bench.feed(session, 0, [1, 2])
                assert await bench.ends(session) == "unavailable"
        bench.feed(bench.open(Form.HIDDEN), 0, [1, 2])
        with pytest.raises(RuntimeError, match=SECRET):
            await pump
        await engine.stop()
