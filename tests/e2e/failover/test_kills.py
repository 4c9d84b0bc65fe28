"""A replica is killed at any moment: its sessions go on elsewhere, and nothing is lost, repeated or sampled anew."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

import stip
from stip_stack.processes import Process
from stip_stack.trials import Answer, Job, Served
from tests.e2e.conftest import System

SEED = 7_000
STREAMS = 16
TOKENS = (20, 90)
"""Of one turn."""
APART = (1, 60)
"""Tokens, over all streams, from one kill to the next."""


class Streams:
    """Sixteen sessions at a time on one instance, for as long as they are wanted: whenever one leaves, one joins."""

    def __init__(self, served: Served, generator: random.Random) -> None:
        self.done: list[tuple[Job, Answer]] = []
        self.heard = 0
        self._served, self._generator = served, generator
        self._wanted = True
        self._moment = asyncio.Event()

    async def run(self) -> None:
        """Raises what a session raises: none may fail."""
        jobs = self._jobs()
        async with await stip.aconnect(self._served.profile) as connection, asyncio.TaskGroup() as group:
            for _ in range(STREAMS):
                group.create_task(self._stream(connection, jobs))

    async def reach(self, heard: int) -> None:
        """Wait until so many tokens have come, over all streams."""
        while self.heard < heard:
            self._moment.clear()
            await self._moment.wait()

    def leave(self) -> None:
        """Let the running turns finish."""
        self._wanted = False

    async def _stream(self, connection: stip.AsyncConnection, jobs: Iterator[Job]) -> None:
        while self._wanted:
            job = next(jobs)
            async with await connection.session() as session:
                answer = await job.run(session, heard=self._token)
                self.done.append((job, answer))
                # A second turn goes on over a cache that may have moved in the meantime.
                again = replace(next(jobs), before=job.ids + answer.ids)
                self.done.append((again, await again.run(session, heard=self._token)))

    def _jobs(self) -> Iterator[Job]:
        for number in itertools.count():
            for job in self._served.mixed(8, seed=SEED + 8 * number):
                tokens = self._generator.randint(*TOKENS)
                until = self._generator.randint(1, tokens) if self._generator.random() < 0.2 else None
                yield replace(job, max_tokens=tokens, until=until)

    def _token(self) -> None:
        self.heard += 1
        self._moment.set()


async def _killing(system: System, served: Served, *, kills: int) -> Streams:
    """Sessions that run while one replica after the other is killed, and comes back."""
    generator = random.Random(SEED)
    streams = Streams(served, generator)
    replicas = system.servers(served.name)
    running = asyncio.create_task(streams.run())
    returning: dict[str, asyncio.Task[None]] = {}
    for _ in range(kills):
        moment = asyncio.create_task(streams.reach(streams.heard + generator.randint(*APART)))
        await asyncio.wait({moment, running}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
        name = generator.choice(replicas)
        if name in returning:
            await returning[name]
        away = [task for task in returning.values() if not task.done()]
        if len(away) == len(replicas) - 1:  # somebody must be there to go on with
            await asyncio.wait(away, return_when=asyncio.FIRST_COMPLETED)
        system.stack.processes[name].kill()
        returning[name] = asyncio.create_task(_listening(system.stack.begin_again(name)))
    await asyncio.gather(*returning.values())
    streams.leave()
    await running
    return streams


async def _listening(process: Process) -> None:
    # The process itself was started by this thread: it ends with the thread that starts it.
    await asyncio.to_thread(process.wait_until_listening)


async def _require_plain(served: Served, streams: Streams) -> None:
    for job, answer in streams.done:
        served.require_plain(job, answer)
    assert len(streams.done) > STREAMS


async def test_sessions_outlive_two_kills_of_their_replicas(replicated: Served, failover: System) -> None:
    streams = await _killing(failover, replicated, kills=2)
    await _require_plain(replicated, streams)


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_sixteen_sessions_outlive_fifty_kills_at_random_moments(replicated: Served, failover: System) -> None:
    streams = await _killing(failover, replicated, kills=50)
    await _require_plain(replicated, streams)
