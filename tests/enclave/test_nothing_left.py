"""Whatever clients, replicas and leases do, no transcript changes, and once all have gone nothing is left of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stip_enclave.config import Limits
from stip_enclave.lease import LeaseAccount
from stip_protocol.errors import StipError
from stip_protocol.wire import model_pb2
from tests.enclave.bench import Talk, until

LOOP = [5, 17, 3, 60, 5, 17, 3, 60, 5, 17]
PRESETS = ["hardened", "paper", "throughput"]
ENDED = ["read", "cancelled", "closed"]
OURS = ("Travel.", "LeaseAccount.", "_Waiting.", "Session.", "Seat.")


def tasks() -> list[str]:
    """Tasks that belong to a session, by their coroutine."""
    # The loop's own tasks, which close asynchronous generators, are of objects without a name.
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith(OURS) or name.startswith("Event.wait")]


async def nothing_left(made: Any, accounts: list[LeaseAccount], talks: list[Talk]) -> None:
    """All sessions closed: no task, timer, port, place in a queue, seat on a replica or claim on a lease is left."""
    for account in accounts:
        await account.stop()
    await until(lambda: not tasks())
    await until(lambda: not any(replica.sessions for replica in made.front.replicas))
    for talk in talks:
        assert talk.session._timer is None
        assert not len(talk.session.history)
        assert not hasattr(talk.session, "_decoding")
        assert not hasattr(talk.session, "_encoding")
    for link in made.instance.opened.links._links:
        assert not link._inbox.ports
        assert not link._outbox._behind
        assert link.replays._value == made.limits.replays
        assert not [one for one in link.replays._waiters or () if not one.done()]
    for account in accounts:
        assert not account.in_use
        assert not account._waiting
        assert account._reserved == 0


class Client:
    """One user's session, read as far as it wants; what it was given, turn after turn, is held to the toy."""

    def __init__(self, made: Any, talk: Talk, number: int, sampling: dict[str, Any]) -> None:
        self.talk, self._made, self._sampling = talk, made, sampling
        self._text = [number]

    async def turn(self, end: str, after: int, drafts: int) -> None:
        self._text += LOOP
        begun = LOOP if len(self._text) > len(LOOP) + 1 else self._text
        self.talk.begin(begun, max_tokens=9, drafts=drafts, **self._sampling)
        given: list[int] = []
        if end != "read":
            given = [(await self.talk.frame()).step.id for _ in range(after)]
        if end == "closed":
            self.talk.session.close()
        else:
            if end == "cancelled":
                self.talk.session.cancel()
            given += (await self.talk.rest())[0]
        expected = self._made.toy.generate(self._text, 9, **self._sampling)
        assert given == expected[: len(given)]
        assert end != "read" or given == expected
        self._text += given


@given(
    preset=st.sampled_from(PRESETS),
    breaks=st.sets(st.integers(3, 200), max_size=6),
    drains=st.sets(st.integers(3, 200), max_size=1),
    ends=st.lists(st.tuples(st.sampled_from(ENDED), st.integers(0, 8), st.integers(0, 4)), min_size=4, max_size=12),
    tokens=st.integers(12, 90),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_turns_cancels_leaves_losses_and_small_leases_leave_nothing(
    bench: Any,
    preset: str,
    breaks: set[int],
    drains: set[int],
    ends: list[tuple[str, int, int]],
    tokens: int,
    seed: int,
) -> None:
    made = await bench(
        preset=preset, replicas=("one", "two", "three"), limits=Limits(replays=2, steps_ahead=4), max_positions=256
    )
    made.renewing.grows = tokens
    account = made.account(tokens=tokens, chunk=tokens, heartbeat_tokens=8)
    messages = 0

    def broken_by(replica: Any) -> Callable[[Any], bool]:
        def count(up: Any) -> bool:
            nonlocal messages
            messages += 1
            if messages in drains:
                replica.drain()
            return messages in breaks

        return count

    clients = [
        Client(made, await made.session(account), number, {"temperature": 1.1, "seed": seed}) for number in range(4)
    ]
    for replica in made.front.replicas:
        replica.broken_by = broken_by(replica)

    async def run(number: int) -> None:
        for end, after, drafts in ends[number::4]:
            await clients[number].turn(end, after, drafts)
            if end == "closed":
                return

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(run(number))
    for client in clients:
        client.talk.session.close()
    await nothing_left(made, [account], [client.talk for client in clients])


@pytest.mark.parametrize("preset", PRESETS)
async def test_sessions_whose_replicas_are_all_gone_leave_nothing(bench: Any, preset: str) -> None:
    made = await bench(preset=preset, replicas=("one", "two"), limits=Limits(failover_seconds=0.3, replays=1))
    account = made.account()
    talks = [await made.session(account) for _ in range(6)]
    for talk in talks:
        talk.begin(LOOP, max_tokens=40)
    for replica in made.front.replicas:
        replica.kill()
    made.front.dead = True
    assert {await talk.failure() for talk in talks} == {"replica_lost"}
    await nothing_left(made, [account], talks)


@pytest.mark.parametrize("preset", PRESETS)
async def test_sessions_that_leave_while_they_wait_for_others_to_replay_leave_nothing(bench: Any, preset: str) -> None:
    made = await bench(preset=preset, replicas=("one", "two"), limits=Limits(replays=1))
    account = made.account()
    talks = [await made.session(account) for _ in range(6)]
    for replica in made.front.replicas:
        replica.pace = asyncio.Semaphore(0)
    for talk in talks:
        talk.begin(LOOP, max_tokens=40)
    gone, kept = made.front.replicas
    kept.tamper = lambda down: [] if down.HasField("fed") else [down]
    opened = len(kept.opened)
    gone.kill()
    await until(lambda: len(kept.opened) > opened)
    for talk in talks:
        talk.session.close()
    await nothing_left(made, [account], talks)


@pytest.mark.parametrize("preset", PRESETS)
async def test_sessions_that_leave_while_their_next_seat_is_warmed_leave_nothing(bench: Any, preset: str) -> None:
    made = await bench(preset=preset, replicas=("one", "two"))
    account = made.account()
    for replica in made.front.replicas:
        replica.pace = asyncio.Semaphore(1)
    talk = await made.session(account)
    talk.begin(LOOP, max_tokens=40)
    await talk.frame()
    old = made.seated()
    new = next(replica for replica in made.front.replicas if replica is not old)
    new.hold = asyncio.Event()
    old.drain()
    await asyncio.wait_for(new.fed.wait(), 10)
    talk.session.close()
    new.hold.set()
    for replica in made.front.replicas:
        replica.hurry()
    await nothing_left(made, [account], [talk])


@pytest.mark.parametrize("preset", PRESETS)
async def test_replicas_that_say_again_and_again_that_they_drain_cost_no_more_than_a_bound(
    bench: Any, preset: str
) -> None:
    made = await bench(
        preset=preset, replicas=("one", "two", "three"), limits=Limits(replayed_rows=100), max_positions=256
    )
    account = made.account()
    talk = await made.session(account)
    for replica in made.front.replicas:
        replica.tamper = lambda down: [model_pb2.Down(drain=model_pb2.Drain(seconds=5)), down]
    text: list[int] = []
    failed = False
    while not failed and len(text) < 230:
        text += LOOP
        talk.begin(LOOP, max_tokens=8)
        tokens: list[int] = []
        while not (frame := await talk.frame()).step.kind and not (failed := frame.HasField("failed")):
            tokens.append(frame.step.id)
        assert tokens == made.toy.generate(text, 8)[: len(tokens)]
        text += tokens
    assert not failed or frame.failed.code == "replica_lost"
    assert len(text) > 3 * len(LOOP)
    assert account._fed <= 17 * (len(text) + 8) + 100
    talk.session.close()
    await nothing_left(made, [account], [talk])


async def test_a_turn_that_comes_after_the_session_failed_takes_no_seat(bench: Any) -> None:
    made = await bench()
    account = made.account()
    talk = await made.session(account)
    talk.session.failed(StipError("so it is"))
    talk.begin(LOOP)
    assert talk.session.turn is None
    assert len(made.replica.opened) == 1
    await nothing_left(made, [account], [talk])
