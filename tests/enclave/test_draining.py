"""A replica that drains: its sessions move to another one between two tokens, while they go on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stip_protocol.errors import BudgetSpent
from stip_protocol.wire import model_pb2
from tests.enclave.bench import until

PROMPT = [5, 17, 3, 60, 61, 62, 63]
BOTH = ("one", "two")
PRESETS = ["hardened", "paper", "throughput"]
SAMPLED = {"temperature": 1.2, "seed": 9, "top_k": 20}


async def quiet(replica: Any) -> None:
    """Wait until nobody sits on a replica any more."""
    for _ in range(2000):
        if not replica.sessions:
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


async def running(made: Any, **options: Any) -> tuple[Any, list[int]]:
    """A session in the middle of a turn of 40 tokens, paced so that it has more to come."""
    for replica in made.front.replicas:
        replica.pace = asyncio.Semaphore(2)
    talk = await made.session(**options)
    talk.begin(PROMPT, max_tokens=40, **SAMPLED)
    return talk, [(await talk.frame()).step.id for _ in range(3)]


def unpaced(made: Any) -> None:
    for replica in made.front.replicas:
        replica.hurry()


@pytest.mark.parametrize("preset", PRESETS)
async def test_a_running_session_moves_and_nobody_sees_it(bench: Any, preset: str) -> None:
    made = await bench(preset=preset, replicas=BOTH)
    talk, given = await running(made)
    old = made.seated()
    new = next(replica for replica in made.front.replicas if replica is not old)
    old.drain()
    unpaced(made)
    tokens, kind = await talk.rest()
    assert (given + tokens, kind) == (made.toy.generate(PROMPT, 40, **SAMPLED), 2)
    await quiet(old)
    talk.begin([40], max_tokens=2)
    assert (await talk.rest())[0] == made.toy.generate([*PROMPT, *given, *tokens, 40], 2)
    assert [len(replica.opened) for replica in (old, new)] == [1, 1]


async def test_the_old_seat_decodes_while_the_new_one_is_warmed(bench: Any) -> None:
    made = await bench(replicas=BOTH)
    talk, given = await running(made)
    old = made.seated()
    new = next(replica for replica in made.front.replicas if replica is not old)
    new.hold = asyncio.Event()
    old.drain()
    await asyncio.wait_for(new.fed.wait(), 10)
    given += [(await talk.frame()).step.id for _ in range(10)]
    assert sum(feed.slices[0].count for feed in old.feeds) > len(PROMPT) + 10
    new.hold.set()
    tokens, _ = await talk.rest()
    assert given + tokens == made.toy.generate(PROMPT, 40, **SAMPLED)


@pytest.mark.parametrize("preset", PRESETS)
async def test_a_warm_seat_that_is_lost_is_taken_elsewhere(bench: Any, preset: str) -> None:
    made = await bench(preset=preset, replicas=("one", "two", "three"))
    talk, given = await running(made)
    old = made.seated()
    first, second = (replica for replica in made.front.replicas if replica is not old)

    def broken_by(up: model_pb2.Up) -> bool:
        if up.HasField("feed") and not (first.dead or second.dead):
            (first if first.sessions else second).dead = True
            return True
        return False

    first.broken_by = second.broken_by = broken_by
    old.drain()
    unpaced(made)
    tokens, kind = await talk.rest()
    assert (given + tokens, kind) == (made.toy.generate(PROMPT, 40, **SAMPLED), 2)


@pytest.mark.parametrize("preset", PRESETS)
async def test_a_seat_that_is_lost_while_the_next_one_is_warmed_is_left_for_it(bench: Any, preset: str) -> None:
    made = await bench(preset=preset, replicas=BOTH)
    talk, given = await running(made)
    old = made.seated()
    new = next(replica for replica in made.front.replicas if replica is not old)
    new.hold = asyncio.Event()
    old.drain()
    await asyncio.wait_for(new.fed.wait(), 10)
    old.kill()
    new.hold.set()
    unpaced(made)
    tokens, kind = await talk.rest()
    assert (given + tokens, kind) == (made.toy.generate(PROMPT, 40, **SAMPLED), 2)
    assert len(new.opened) == 1


async def test_a_session_between_turns_leaves_and_replays_later(bench: Any) -> None:
    made = await bench(replicas=BOTH)
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=3)
    tokens, _ = await talk.rest()
    old = made.seated()
    old.drain()
    await quiet(old)
    talk.begin([40], max_tokens=3)
    assert (await talk.rest())[0] == made.toy.generate([*PROMPT, *tokens, 40], 3)
    assert made.seated() is not old


@pytest.mark.parametrize("preset", PRESETS)
async def test_with_nowhere_to_go_turns_run_to_their_end_and_then_the_sessions_leave(bench: Any, preset: str) -> None:
    made = await bench(preset=preset, replicas=BOTH)
    talk, given = await running(made)
    seat = made.seated()
    for replica in made.front.replicas:
        replica.drain()
    unpaced(made)
    tokens, kind = await talk.rest()
    assert (given + tokens, kind) == (made.toy.generate(PROMPT, 40, **SAMPLED), 2)
    await quiet(seat)
    talk.begin([40], max_tokens=2)
    for replica in made.front.replicas:
        replica.draining = False  # as one that was restarted
    assert (await talk.rest())[0] == made.toy.generate([*PROMPT, *given, *tokens, 40], 2)


async def test_a_session_between_turns_does_not_keep_the_only_replica(bench: Any) -> None:
    made = await bench()
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=3)
    tokens, _ = await talk.rest()
    made.replica.drain()
    await quiet(made.replica)
    talk.begin([40], max_tokens=3)
    made.replica.draining = False
    assert (await talk.rest())[0] == made.toy.generate([*PROMPT, *tokens, 40], 3)


@pytest.mark.parametrize("preset", PRESETS)
async def test_a_turn_cancelled_on_a_draining_replica_leaves_it(bench: Any, preset: str) -> None:
    made = await bench(preset=preset)
    talk, given = await running(made)
    made.replica.drain()
    talk.session.cancel()
    given += (await talk.rest())[0]
    await quiet(made.replica)
    talk.begin([40], max_tokens=3)
    made.replica.draining, made.replica.pace = False, None
    assert (await talk.rest())[0] == made.toy.generate([*PROMPT, *given, 40], 3)


async def test_a_turn_that_ends_after_its_next_seat_is_warm_leaves_the_old_one(bench: Any) -> None:
    made = await bench(preset="throughput", replicas=BOTH)
    talk, _ = await running(made)
    old = made.seated()
    new = next(replica for replica in made.front.replicas if replica is not old)
    halted = asyncio.Event()

    def noted(up: model_pb2.Up) -> bool:
        if up.HasField("halt"):
            halted.set()
        return False

    old.broken_by = noted
    new.hurry()
    old.drain()
    await asyncio.wait_for(halted.wait(), 10)  # the next seat is warm, and the generation has yet to fall silent
    talk.session.cancel()
    old.hurry()
    await quiet(old)
    assert len(new.sessions) == 1


async def test_a_turn_that_ends_while_no_seat_can_be_warmed_leaves_the_old_one(bench: Any) -> None:
    made = await bench(replicas=BOTH)
    made.renewing.gate, made.renewing.refusals = asyncio.Event(), [BudgetSpent("no more")]
    account = made.account(tokens=12)
    talk = await made.session(account)
    talk.begin(PROMPT, max_tokens=40)
    old = made.seated()
    old.drain()
    await until(lambda: len(account._waiting) == 2)  # the turn, and the seat that is to be warmed
    talk.session.cancel()
    made.renewing.gate.set()  # the seat that is to be warmed hears that there are no more rows for it
    await quiet(old)


@pytest.mark.parametrize("preset", PRESETS)
async def test_a_wrong_answer_to_a_seat_that_is_warmed_ends_the_session(bench: Any, preset: str) -> None:
    made = await bench(preset=preset, replicas=("one", "two", "three"))
    talk, _ = await running(made)
    old = made.seated()

    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        if down.HasField("fed"):
            down.fed.slices[0].position += 1
        return [down]

    for replica in made.front.replicas:
        if replica is not old:
            replica.tamper = tamper
            replica.hurry()
    old.drain()
    assert await talk.failure() == "position_refused"


async def test_a_session_of_one_row_moves_too(bench: Any) -> None:
    made = await bench(replicas=BOTH)
    talk = await made.session()
    old = made.seated()
    old.hold = asyncio.Event()
    talk.begin([9], max_tokens=12)
    await asyncio.wait_for(old.fed.wait(), 10)
    old.drain()
    old.hold.set()
    assert await talk.rest() == (made.toy.generate([9], 12), 2)
    await quiet(old)


async def test_new_sessions_go_where_nobody_drains(bench: Any) -> None:
    made = await bench(replicas=BOTH)
    await made.session()
    old = made.seated()
    old.drain()
    await quiet(old)
    for _ in range(3):
        await made.session()
    assert (len(old.sessions), len(made.seated().sessions)) == (0, 3)
