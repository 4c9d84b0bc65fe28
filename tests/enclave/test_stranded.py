"""Sessions without a seat: what their clients, their leases and their patience do meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from stip_enclave.config import Limits
from stip_protocol.wire import model_pb2
from tests.enclave.bench import stranding, until

PROMPT = [5, 17, 3, 60, 61, 62, 63]
BOTH = ("one", "two")


async def stranded(bench: Any, preset: str) -> tuple[Any, Any, list[int]]:
    """A session whose only replica has gone in the middle of a turn; the steps it has given."""
    made = await bench(preset=preset)
    made.replica.pace = asyncio.Semaphore(1)
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=40)
    given = [(await talk.frame()).step.id for _ in range(3)]
    made.replica.kill()
    await stranding(talk)
    while not talk.session.frames.empty():
        given.append((await talk.frame()).step.id)
    return made, talk, given


def revived(made: Any) -> None:
    made.replica.dead, made.replica.pace = False, None


@pytest.mark.parametrize("preset", ["hardened", "throughput"])
async def test_a_turn_cancelled_on_the_way_stays_cancelled(bench: Any, preset: str) -> None:
    made, talk, given = await stranded(bench, preset)
    talk.session.cancel()
    assert await talk.rest() == ([], 3)
    talk.begin([40], max_tokens=3)
    revived(made)
    assert await talk.rest() == (made.toy.generate([*PROMPT, *given, 40], 3), 2)


@pytest.mark.parametrize("preset", ["hardened", "throughput"])
async def test_a_session_closed_on_the_way_takes_no_seat(bench: Any, preset: str) -> None:
    made, talk, _ = await stranded(bench, preset)
    opened = len(made.replica.opened)
    talk.session.close()
    revived(made)
    other = await made.session()
    other.begin(PROMPT, max_tokens=2)
    assert await other.rest() == (made.toy.generate(PROMPT, 2), 2)
    assert len(made.replica.opened) == opened + 1


async def test_replayed_rows_count_against_the_lease(bench: Any) -> None:
    made = await bench()
    account = made.account()
    talk = await made.session(account)
    talk.begin(PROMPT, max_tokens=3)
    await talk.rest()
    before = account._fed
    made.replica.break_links()
    await stranding(talk)
    talk.begin([40], max_tokens=1)
    await talk.rest()
    assert (before, account._fed - before) == (len(PROMPT) + 2, len(PROMPT) + 3 + 1)


async def test_a_replay_waits_for_the_lease_that_it_needs(bench: Any) -> None:
    made = await bench(replicas=BOTH)
    talk = await made.session(made.account(tokens=12, chunk=4))
    made.renewing.grows = 4
    talk.begin(PROMPT, max_tokens=20)
    await talk.frame()
    made.seated().kill()
    tokens, kind = await talk.rest()
    assert (tokens, kind) == (made.toy.generate(PROMPT, 20)[1:], 2)


@pytest.mark.parametrize("preset", ["hardened", "paper"])
async def test_links_that_break_again_and_again_cost_a_session_no_more_than_a_bound(bench: Any, preset: str) -> None:
    made = await bench(preset=preset, replicas=BOTH, limits=Limits(replayed_rows=100), max_positions=1000)
    account = made.account()
    talk = await made.session(account)
    for replica in made.front.replicas:
        replica.broken_by = flapping(replica)
    talk.begin(PROMPT, max_tokens=900)
    given = 0
    while not (frame := await talk.frame()).HasField("failed"):
        given += 1
    assert frame.failed.code == "replica_lost"
    assert given > 3
    assert account._fed <= 17 * (len(PROMPT) + given) + 100


def flapping(replica: Any) -> Callable[[model_pb2.Up], bool]:
    """Every link breaks behind each answer that came of it."""
    fed = 0

    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        nonlocal fed
        fed += down.HasField("fed")
        return [down]

    def broken_by(up: model_pb2.Up) -> bool:
        nonlocal fed
        broken, fed = fed > 0, 0
        return broken

    replica.tamper = tamper
    return broken_by


async def test_a_turn_has_all_its_time_however_long_the_session_rested_before(bench: Any) -> None:
    made = await bench(limits=Limits(failover_seconds=0.4))
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=3)
    tokens, _ = await talk.rest()
    made.replica.kill()
    await stranding(talk)
    rested = asyncio.get_running_loop().time() + 0.5
    await until(lambda: asyncio.get_running_loop().time() > rested)
    talk.begin([40], max_tokens=3)
    described = made.front.described
    await until(lambda: made.front.described > described)
    made.replica.dead = False
    assert (await talk.rest())[0] == made.toy.generate([*PROMPT, *tokens, 40], 3)
