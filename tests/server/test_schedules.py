"""Random lives of many sessions in one engine: each is held to the plain model on its own rows alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from stip_protocol.errors import Unavailable
from stip_server.engine import Form, Generation, Hidden, Ids, Logits, Output, Session, Top
from tests.server.conformance import Bench, benched
from tests.server.conftest import Plain
from tests.server.models import POSITIONS, VOCABULARY, tiny
from tests.server.stepping import table_of
from tests.server.test_engine_alone import serving

FAMILIES = ["gpt2", "llama", "gemma2", "qwen2, some layers slide", "gemma3_text"]
LIVES, SLOTS = 16, 5
NEAR = {"gemma2": 1e-5}
"""transformers takes Gemma 2's softmax in float32 whatever the dtype; everything else agrees within 1e-9."""


@dataclass
class Chance:
    """Makes steps fail now and then, as a library would: from within the model."""

    draw: random.Random
    failures: int = 0
    armed: bool = False

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        if self.armed and self.draw.random() < 0.03:
            self.failures += 1
            raise RuntimeError("a step that fails")


@dataclass
class Life:
    """One session from its opening to its end, and what it was told."""

    bench: Bench
    plain: Plain
    draw: random.Random
    near: float
    ids: list[int] = field(default_factory=list)
    answered: int = 0

    async def live(self) -> None:
        form = self.draw.choice(list(Form))
        session = self.bench.open(form)
        turn: Callable[[Session], Awaitable[bool]] = self.generates if form is Form.IDS else self.feeds
        for _ in range(self.draw.randint(2, 9)):
            if not await turn(session):
                break
        self.bench.close(session)

    def more(self, back: int) -> list[int]:
        """New ids behind those that stay; none where the session is full."""
        del self.ids[len(self.ids) - back :]
        most = self.draw.choice([1, 1, 8, 30])
        return [self.draw.randrange(VOCABULARY) for _ in range(min(self.draw.randint(1, most), self.room))]

    @property
    def room(self) -> int:
        return POSITIONS - len(self.ids)

    async def feeds(self, session: Session) -> bool:
        """Rows in one or several slices, some of the last answer's rows taken back first. Whether it goes on."""
        back = self.draw.randint(0, max(0, self.answered - 1))
        new = self.more(back)
        if not new:
            return False
        outputs = self.draw.randint(1, min(len(new), self.bench.card.max_outputs))
        cut = self.draw.randint(0, len(new) - outputs)
        for piece, wanted in ((new[:cut], 0), (new[cut:], outputs)):
            if piece:
                self.bench.feed(session, len(self.ids), piece, wanted, back)
                self.ids, back = self.ids + piece, 0
                await self.pause()
        if self.draw.random() < 0.08:
            return False  # closed while its rows wait, or while their step runs
        answer = await self.bench.event(session)
        assert isinstance(answer, Output)
        self.answered = outputs
        self.holds(answer, outputs)
        for at in self.draw.sample(range(outputs), self.draw.randint(0, outputs)):
            if isinstance(answer.out, Top):
                self.bench.engine.recall(session, answer.position + at)
                self.holds(await self.bench.event(session), 1, answer.position + at)
        return True

    async def generates(self, session: Session) -> bool:
        """Ids in and a generation, which is halted now and then; some of the last one's ids are taken back first."""
        back = self.draw.randint(0, self.answered)
        new = self.more(back)
        if len(new) >= self.room:
            return False
        self.bench.feed_ids(session, len(self.ids), new, back)
        self.ids += new
        await self.pause()
        at, count = len(self.ids), self.draw.randint(1, min(12, self.room))
        self.bench.engine.generate(session, Generation(at, count, frozenset()))
        halting, done = self.draw.random() < 0.4, False
        while not done:
            if halting and self.draw.random() < 0.4:
                await self.pause()
                self.bench.engine.halt(session)
            event = await self.bench.event(session)
            assert isinstance(event, Ids)
            assert event.position == len(self.ids)
            self.ids += np.frombuffer(event.ids, "<u4").tolist()
            done = event.done
        self.answered = len(self.ids) - at
        assert self.answered == count or halting
        logits = self.logits()
        for place in range(at, len(self.ids)):
            row = logits[place - 1]
            assert float(row.max() - row[self.ids[place]]) < self.near
        return True

    async def pause(self) -> None:
        """Let the engine go on for a while, or not."""
        for _ in range(self.draw.choice([0, 0, 1, 5])):
            await asyncio.sleep(0)

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        out: torch.Tensor = self.plain.model(torch.tensor([self.ids])).logits[0]
        return out

    @torch.inference_mode()
    def holds(self, answer: Output | Ids, outputs: int, position: int | None = None) -> None:
        """The answer is what the plain model says of these ids."""
        assert isinstance(answer, Output)
        first = len(self.ids) - outputs if position is None else position
        assert (answer.position, answer.count) == (first, outputs)
        rows = slice(first, first + outputs)
        near: Any = {"rtol": 0, "atol": self.near}
        match answer.out:
            case Hidden(data):
                plain = self.plain.model.base_model(torch.tensor([self.ids])).last_hidden_state[0, rows]
                torch.testing.assert_close(numbers(data).view(outputs, -1), plain, **near)
            case Logits(data):
                torch.testing.assert_close(numbers(data).view(outputs, -1), self.logits()[rows], **near)
            case Top(count, indices, values, sums):
                plain = self.logits()[rows]
                chosen = torch.from_numpy(np.frombuffer(indices, "<u4").astype(np.int64)).view(outputs, count)
                torch.testing.assert_close(numbers(values).view(outputs, -1), plain.gather(1, chosen), **near)
                torch.testing.assert_close(plain.gather(1, chosen), plain.topk(count).values, **near)
                whole = torch.frombuffer(bytearray(sums), dtype=torch.float32)
                torch.testing.assert_close(whole, torch.logsumexp(plain, -1).float(), rtol=0, atol=1e-5)


def numbers(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float64)


@pytest.mark.parametrize("graphs", [False, True], ids=["as they come", "in buckets"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_whatever_sessions_do_beside_each_other_each_gets_what_the_plain_model_says(
    family: str, graphs: bool
) -> None:
    seeds, gate, broken = random.Random(f"{family} {graphs}"), asyncio.Semaphore(SLOTS), 0
    served, model = (Plain(one, table_of(one)) for one in (tiny(family, torch.float64), tiny(family, torch.float64)))
    chance = Chance(random.Random(seeds.random()))
    served.model.base_model.register_forward_pre_hook(chance, with_kwargs=True)

    async def live(bench: Bench, life: Life) -> None:
        nonlocal broken
        async with gate:
            try:
                await life.live()
            except Unavailable:
                broken += 1

    make = serving(served, slots=SLOTS, prefill_chunk=seeds.choice([1, 5, 16]), graphs=graphs)
    async with benched(make) as bench:
        chance.armed = True
        near = NEAR.get(family, 1e-9)
        lives = [Life(bench, model, random.Random(seeds.random()), near) for _ in range(LIVES)]
        await asyncio.gather(*(live(bench, life) for life in lives))
        assert max(step.sessions for step in bench.steps) > 1
    assert bool(chance.failures) is bool(broken)
