"""An instance gets new keys while it is used: sixteen sessions finish on the old epoch, new ones land on the next, and
the old one is closed. Nothing is restarted, and nobody is refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import stip
from stip_stack.trials import Answer, Job, Served

if TYPE_CHECKING:
    from tests.e2e.conftest import System

STREAMS = 16
WAIT_SECONDS = 120.0
TOKENS = 12
"""Of the turn before the change, and of the one after."""
FAMILY = Path(__file__).parents[3] / "stack" / "demo_model"


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not true():  # noqa: ASYNC110 - what is waited for is another process
            await asyncio.sleep(0.05)


def epoch_of(session: stip.AsyncSession) -> int:
    return session._stream.opened.epoch


def said(system: System, part: str, event: str, **fields: object) -> int:
    """How often a part has logged an event with these fields."""
    lines = (json.loads(line) for line in system.log(part).splitlines() if line.startswith("{"))
    return sum(line.get("event") == event and fields.items() <= line.items() for line in lines)


class Stream:
    """A session that goes on over the rotation: a turn before, one during it, and one after."""

    def __init__(self, served: Served, number: int) -> None:
        self._served = served
        self._job = served.mixed(STREAMS, seed=500)[number]
        self._session: stip.AsyncSession | None = None
        self._before: list[int] = []

    async def open(self, connection: stip.AsyncConnection) -> None:
        self._session = await connection.session()

    @property
    def session(self) -> stip.AsyncSession:
        assert self._session is not None
        return self._session

    async def turn(self, seed: int) -> None:
        """One turn, which must be the plain model's."""
        prompt = self._job.ids if not self._before else self._served.prompt(seed, 4)
        job = Job(prompt, max_tokens=TOKENS, before=self._before)
        answer: Answer = await job.run(self.session)
        self._served.require_plain(job, answer)
        assert len(answer.ids) == TOKENS or answer.finish is stip.FinishReason.STOP
        self._before = job.before + job.ids + answer.ids


async def turns(streams: list[Stream], seed: int) -> None:
    async with asyncio.TaskGroup() as group:
        for number, stream in enumerate(streams):
            group.create_task(stream.turn(seed + number))


async def test_a_configuration_that_changes_more_or_names_a_bad_directory_is_refused_and_the_rest_goes_on(
    rotating: System, tmp_path: Path
) -> None:
    workspace, enclave = rotating.stack.workspace, rotating.stack.processes["enclave"]
    before = (workspace.path / "enclave.toml").read_text()
    try:
        for bad in (
            before.replace('dns_name = "enclave.stip"', 'dns_name = "other.stip"'),
            before + f'\n[[instances]]\ndirectory = "{tmp_path}"\n',
            before + f'\n[[instances]]\ndirectory = "{rotating["demo"].published.folder}/../demo"\n',
            "no TOML [",
        ):
            (workspace.path / "enclave.toml").write_text(bad)
            assert not await asyncio.to_thread(enclave.reread)
    finally:
        (workspace.path / "enclave.toml").write_text(before)
    assert await asyncio.to_thread(enclave.reread)
    served = rotating["demo"]
    async with await stip.aconnect(served.profile) as connection, await connection.session() as session:
        job = Job(served.prompt(1, 5), max_tokens=4)
        served.require_plain(job, await job.run(session))


async def test_sixteen_sessions_go_on_while_their_instance_gets_new_keys(rotating: System) -> None:
    stack, served = rotating.stack, rotating["demo"]
    instance = served.published.manifest.instance
    streams = [Stream(served, number) for number in range(STREAMS)]
    async with await stip.aconnect(served.profile) as connection:
        await asyncio.gather(*(stream.open(connection) for stream in streams))
        await turns(streams, 1000)
        assert {epoch_of(stream.session) for stream in streams} == {0}

        # Protected and joined while all of them generate.
        during = asyncio.create_task(turns(streams, 2000))
        arguments = "--instance", instance, "--epoch", "1"
        next_epoch = await asyncio.to_thread(stack.protect, FAMILY, "hardened", *arguments, name="next")
        assert (next_epoch.manifest.instance, next_epoch.manifest.epoch) == (instance, 1)
        await asyncio.to_thread(stack.join, next_epoch)
        await during

        # It stands by: nobody is sent there before it is released.
        async with await connection.session() as early:
            assert epoch_of(early) == 0
        await asyncio.to_thread(stack.keyservice, "epochs", "activate", instance, "1")
        await until(lambda: said(rotating, "enclave", "leases superseded") > 0)
        async with await connection.session() as late:
            assert epoch_of(late) == 1
            job = Job(served.prompt(9, 7), max_tokens=TOKENS)
            served.require_plain(job, await job.run(late))
            # Beside it, those of the old epoch take another turn.
            await turns(streams, 3000)
        assert {epoch_of(stream.session) for stream in streams} == {0}
        for stream in streams:
            await stream.session.close()

        # Their lease has time left: ending it early is said with `--now`.
        await asyncio.to_thread(stack.keyservice, "epochs", "retire", instance, "0", "--now")
        await until(lambda: said(rotating, "enclave", "instance closed", instance=instance, epoch=0) > 0)
        await asyncio.to_thread(stack.part, "server-0-0")
        async with await connection.session() as after:
            assert epoch_of(after) == 1
            job = Job(served.prompt(10, 7), max_tokens=TOKENS)
            served.require_plain(job, await job.run(after))
    assert said(rotating, "enclave", "session failed") == 0
    assert said(rotating, "enclave", "session refused") == 0
