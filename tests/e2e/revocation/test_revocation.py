"""What an operator of the key service revokes reaches running sessions: at once over the control stream, and where a
host cuts that, within `heartbeat_tokens`. Sessions on another instance notice nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import stip
from stip_protocol import telemetry
from stip_protocol.errors import LeaseRevoked, StipError
from stip_stack.latency import gauge
from stip_stack.trials import Answer, Job, Served

if TYPE_CHECKING:
    from tests.e2e.conftest import Revoking

HEARTBEAT_TOKENS = 48
"""`lease.heartbeat_tokens` of this stack's policy."""
WAIT_SECONDS = 60.0
UNTIL_REVOKED = 10
"""Tokens that are heard before something is revoked: a turn runs."""


def stream_is(revoking: Revoking, state: int) -> bool:
    """Whether the enclave says that its control stream is open (1) or not."""
    metrics = revoking.system.stack.processes["enclave"].metrics
    return gauge(metrics, telemetry.CONTROL_STREAM) == state


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not await asyncio.to_thread(true):  # noqa: ASYNC110 - what is waited for is another process
            await asyncio.sleep(0.02)


@dataclass
class Listener:
    """A session of which nobody knows how long it goes on."""

    served: Served
    session: stip.AsyncSession
    connection: stip.AsyncConnection
    job: Job
    ids: list[int] = field(default_factory=list)
    failure: StipError | None = None
    moment: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """One long turn, until it is refused."""
        try:
            async for chunk in self.session.generate(self.job.ids, max_tokens=self.job.max_tokens, stop_ids=()):
                assert chunk.id is not None
                self.ids.append(chunk.id)
                self.moment.set()
        except StipError as failure:
            self.failure = failure
            self.moment.set()

    async def heard(self, tokens: int) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while len(self.ids) < tokens and self.failure is None:
                self.moment.clear()
                await self.moment.wait()

    def require_revoked(self) -> None:
        """It ended, and what came before is the plain model's."""
        assert isinstance(self.failure, LeaseRevoked), self.failure
        self.served.require_plain(self.job, Answer(self.ids, None))


@asynccontextmanager
async def listening(served: Served, profile: Path, seed: int) -> AsyncIterator[tuple[Listener, asyncio.Task[None]]]:
    """A session in the middle of a turn."""
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        listener = Listener(served, session, connection, Job(served.prompt(seed, 5), max_tokens=8000))
        running = asyncio.create_task(listener.run())
        try:
            await listener.heard(UNTIL_REVOKED)
            yield listener, running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@asynccontextmanager
async def resting(served: Served, profile: Path) -> AsyncIterator[stip.AsyncSession]:
    """A session under a lease of its own that makes no token, and so no heartbeat."""
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        async for _ in session.generate(served.prompt(1, 3), max_tokens=2, stop_ids=()):
            pass
        yield session


@asynccontextmanager
async def neighbour(served: Served) -> AsyncIterator[None]:
    """A session on another instance, whose answer is the plain model's from end to end."""
    job = Job(served.prompt(77, 9), max_tokens=200)
    async with await stip.aconnect(served.profile) as connection, await connection.session() as session:
        running = asyncio.create_task(job.run(session))
        try:
            yield
        finally:
            served.require_plain(job, await running)


@dataclass(frozen=True)
class Case:
    """Something to revoke: what the command says, and whether it closes the instance."""

    kind: str
    subject: Callable[[Listener, str], str]
    closes: bool = False


CASES = [
    Case("user", lambda listener, user: user),
    Case("instance", lambda listener, user: listener.served.published.manifest.instance, closes=True),
    Case("epoch", lambda listener, user: f"{listener.served.published.manifest.instance}/0", closes=True),
]
ENCLAVE = Case("enclave", lambda listener, user: listener.connection.verification.enclave_key.hex())


async def revoke(revoking: Revoking, case: Case, subject: str) -> int:
    """Returns the revocation's number."""
    told = await asyncio.to_thread(
        revoking.system.stack.keyservice, "revoke", case.kind, subject, "--reason", "a test", "--json"
    )
    found = json.loads(told)
    return int(found["revocation"] if isinstance(found.get("revocation"), int) else found["number"])


async def lift(revoking: Revoking, number: int) -> None:
    await asyncio.to_thread(revoking.system.stack.keyservice, "revocations", "lift", str(number))


def closed(revoking: Revoking) -> int:
    """How often the enclave has forgotten an instance."""
    return revoking.system.log("enclave").count('"instance closed"')


async def ends_at_once(revoking: Revoking, case: Case) -> None:
    victim, stack = revoking.system["victim"], revoking.system.stack
    user, profile = "user", victim.profile
    if case.kind == "user":  # the neighbour is somebody else
        user = "at-once"
        profile = await asyncio.to_thread(stack.enrol, user, victim.published, budget=100_000)
    before = closed(revoking)
    async with (
        resting(victim, profile) as idle,
        listening(victim, profile, 3) as (listener, running),
    ):
        await until(lambda: stream_is(revoking, 1))
        number = await revoke(revoking, case, case.subject(listener, user))
        await asyncio.wait_for(running, WAIT_SECONDS)
        listener.require_revoked()
        # One that makes no tokens sends no heartbeat: it hears over the stream alone.
        await until(lambda: idle._stream.failure is not None)
        with pytest.raises(LeaseRevoked):
            async for _ in idle.generate(victim.prompt(5, 2), max_tokens=4):
                pass
        with pytest.raises(StipError) as refused:
            await listener.connection.session()
        assert refused.value.code in ("user_refused", "instance_refused", "enclave_revoked")
        if case.closes:
            await until(lambda: closed(revoking) > before)
        await lift(revoking, number)
    # What was ended stays so; a new release opens what was closed.
    async with listening(victim, victim.profile, 6) as (again, running):
        assert again.failure is None


USER_AND_LONG = [CASES[0], *(pytest.param(case, marks=pytest.mark.long) for case in CASES[1:])]


@pytest.mark.parametrize("case", USER_AND_LONG, ids=lambda case: case.kind)
async def test_over_the_control_stream_a_revocation_ends_running_and_resting_sessions_at_once(
    revoking: Revoking, case: Case
) -> None:
    async with neighbour(revoking.system["steady"]):
        await ends_at_once(revoking, case)


@pytest.mark.parametrize("case", USER_AND_LONG, ids=lambda case: case.kind)
async def test_with_everything_cut_a_session_ends_within_the_heartbeat(revoking: Revoking, case: Case) -> None:
    """And the tokens until then are counted."""
    victim = revoking.system["victim"]
    async with listening(victim, victim.profile, 7) as (listener, running):
        revoking.between.cut()
        try:
            number = await revoke(revoking, case, case.subject(listener, "user"))
            heard = len(listener.ids)
            await asyncio.wait_for(running, WAIT_SECONDS)
        finally:
            revoking.between.mend()
        await lift(revoking, number)
    assert listener.failure is not None
    assert listener.failure.code == "unavailable"
    assert len(listener.ids) - heard <= HEARTBEAT_TOKENS
    victim.require_plain(listener.job, Answer(listener.ids, None))


@pytest.mark.long
async def test_a_revocation_that_was_delayed_is_heard_once_the_way_is_free_again(revoking: Revoking) -> None:
    victim = revoking.system["victim"]
    async with resting(victim, victim.profile) as idle:
        await until(lambda: stream_is(revoking, 1))
        revoking.between.cut()
        try:
            number = await revoke(revoking, CASES[0], "user")
            await until(lambda: stream_is(revoking, 0))
            assert idle._stream.failure is None  # a host that cuts the stream can keep this from it
        finally:
            revoking.between.mend()
        await until(lambda: idle._stream.failure is not None)
        assert isinstance(idle._stream.failure, LeaseRevoked)
    await lift(revoking, number)


@pytest.mark.long
async def test_the_stream_comes_back_by_itself(revoking: Revoking) -> None:
    victim = revoking.system["victim"]
    async with listening(victim, victim.profile, 8):
        await until(lambda: stream_is(revoking, 1))
        revoking.between.cut()
        await until(lambda: stream_is(revoking, 0))
        revoking.between.mend()
        await until(lambda: stream_is(revoking, 1))
    assert '"control stream lost"' in revoking.system.log("enclave")


async def test_a_revoked_enclave_serves_nobody(revoking: Revoking) -> None:
    """The last: every session of the enclave ends, whatever its instance."""
    await ends_at_once(revoking, ENCLAVE)
