"""The arm under test: client, enclave, gateway and server, each a process, over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.samples import Order, Samples
from stip.connection import AsyncConnection
from stip.session import AsyncSession

Reading = tuple[int, float]
"""Count and sum of a histogram."""


class Streams:
    """Sessions of one verified connection, begun together."""

    def __init__(
        self,
        connection: AsyncConnection,
        head: Callable[[], Reading] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        """`head` reads the enclave's account of its head, where it has one; `sampling` is of `session.generate`."""
        self._connection, self._head, self._sampling = connection, head, dict(sampling or {})

    async def __call__(self, order: Order) -> Samples:
        """One run. Sessions are open before the clock starts."""
        async with contextlib.AsyncExitStack() as stack:
            sessions = [
                await stack.enter_async_context(
                    await self._connection.session(max_positions=len(prompt) + len(again) + order.tokens + 2)
                )
                for prompt, again in zip(order.prompts, order.seconds, strict=True)
            ]
            first = await self._turn(sessions, order.prompts, 1)
            count, seconds = await self._reading()
            second = await self._turn(sessions, order.seconds, order.tokens)
            ends, until = await self._reading()
        ids = [[*one, *two] for one, two in zip(first.ids, second.ids, strict=True)]
        head = (until - seconds) / (ends - count) if ends > count else None
        return Samples([times[0] for times in first.times], second.times, ids, head)

    async def _turn(self, sessions: list[AsyncSession], prompts: list[list[int]], tokens: int) -> _Turn:
        turn = _Turn(sessions, prompts, tokens, self._sampling)
        await asyncio.gather(*(turn.stream(number) for number in range(len(prompts))))
        return turn

    async def _reading(self) -> Reading:
        return (0, 0.0) if self._head is None else await asyncio.to_thread(self._head)


class _Turn:
    def __init__(
        self, sessions: list[AsyncSession], prompts: list[list[int]], tokens: int, sampling: dict[str, Any]
    ) -> None:
        self._sessions, self._prompts, self._tokens, self._sampling = sessions, prompts, tokens, sampling
        self.times: list[list[float]] = [[] for _ in prompts]
        self.ids: list[list[int]] = [[] for _ in prompts]
        self._over = False
        self._begun = time.perf_counter()

    async def stream(self, number: int) -> None:
        times, ids = self.times[number], self.ids[number]
        answer = self._sessions[number].generate(
            self._prompts[number], max_tokens=self._tokens, stop_ids=(), **self._sampling
        )
        async with contextlib.aclosing(answer) as chunks:
            async for chunk in chunks:
                if chunk.id is None or self._over:
                    break
                times.append(time.perf_counter() - self._begun)
                ids.append(chunk.id)
        # A turn of one token ends with the last stream's; another with the first stream that has all.
        self._over = self._over or self._tokens > 1
