"""The arm under test: client, enclave, gateway and server, each a process, over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from benchmarks.samples import Samples
from stip.connection import AsyncConnection
from stip.session import AsyncSession

Reading = tuple[int, float]
"""Count and sum of a histogram."""


class Streams:
    """Sessions of one verified connection, begun together."""

    def __init__(self, connection: AsyncConnection, head: Callable[[], Reading] | None) -> None:
        """`head` reads the enclave's account of its head, where it has one."""
        self._connection, self._head = connection, head

    async def run(self, prompts: list[list[int]], tokens: int) -> Samples:
        """As `benchmarks.direct.Order` says. Sessions are open before the clock starts."""
        async with contextlib.AsyncExitStack() as stack:
            sessions = [
                await stack.enter_async_context(await self._connection.session(max_positions=len(prompt) + tokens))
                for prompt in prompts
            ]
            run = _Run(sessions, prompts, tokens)
            before = asyncio.create_task(self._reading(run.decoding))
            await asyncio.gather(*(run.stream(number) for number in range(len(prompts))))
            run.decoding.set()
            count, seconds = await before
        ends, until = await self._reading(run.decoding)
        head = (until - seconds) / (ends - count) if ends > count else None
        return Samples(run.times, run.ids, head)

    async def _reading(self, decoding: asyncio.Event) -> Reading:
        """The head's account once every stream decodes: prompts are not what it is about."""
        await decoding.wait()
        return (0, 0.0) if self._head is None else await asyncio.to_thread(self._head)


class _Run:
    def __init__(self, sessions: list[AsyncSession], prompts: list[list[int]], tokens: int) -> None:
        self._sessions, self._prompts, self._tokens = sessions, prompts, tokens
        self.times: list[list[float]] = [[] for _ in prompts]
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.decoding = asyncio.Event()
        """Every stream has its first token."""
        self._waiting = len(prompts)
        self._over = False
        self._begun = time.perf_counter()

    async def stream(self, number: int) -> None:
        times, ids = self.times[number], self.ids[number]
        answer = self._sessions[number].generate(self._prompts[number], max_tokens=self._tokens, stop_ids=())
        async with contextlib.aclosing(answer) as chunks:
            async for chunk in chunks:
                if chunk.id is None or self._over:
                    break
                times.append(time.perf_counter() - self._begun)
                ids.append(chunk.id)
                if len(times) == 1:
                    self._first()
        self._over = True

    def _first(self) -> None:
        self._waiting -= 1
        if not self._waiting:
            self.decoding.set()
