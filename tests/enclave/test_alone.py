"""Where the server decodes alone: what leaves is permuted, what comes is checked, and what may be is handed on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stip_enclave.config import Limits
from stip_protocol.errors import RequestInvalid, UserRefused
from stip_protocol.wire import model_pb2
from tests.enclave.bench import until

PROMPT = [5, 17, 3, 60, 61, 62, 63]
SAMPLED = {"temperature": 1.2, "seed": 9}


@pytest.fixture
def alone(bench: Any) -> Callable[..., Any]:
    return lambda **options: bench(preset="throughput", **options)


def generations(made: Any) -> list[model_pb2.Generate]:
    return [up.generate for up in made.replica.seen if up.HasField("generate")]


def kept_back(made: Any) -> list[int]:
    return [part.back for feed in made.replica.feeds for part in feed.slices]


async def test_ids_leave_permuted_and_come_back_true(alone: Any) -> None:
    made = await alone()
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=8, **SAMPLED)
    assert await talk.rest() == (made.toy.generate(PROMPT, 8, **SAMPLED), 2)
    sent = np.concatenate([np.frombuffer(feed.ids, "<u4") for feed in made.replica.feeds])
    assert made.toy.order()[sent].tolist() == PROMPT
    assert all(not feed.rows for feed in made.replica.feeds)


async def test_a_turn_is_one_generation_and_the_next_goes_on_behind_it(alone: Any) -> None:
    made = await alone()
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=5)
    tokens, _ = await talk.rest()
    talk.begin([], max_tokens=4)
    assert tokens + (await talk.rest())[0] == made.toy.generate(PROMPT, 9)
    talk.begin([40], max_tokens=2)
    assert (await talk.rest())[0] == made.toy.generate([*PROMPT, *made.toy.generate(PROMPT, 9), 40], 2)
    assert [(one.position, one.max_ids) for one in generations(made)] == [(7, 5), (12, 4), (17, 2)]
    assert not any(kept_back(made))


async def test_a_stop_id_ends_the_turn_and_is_sent_permuted(alone: Any) -> None:
    made = await alone()
    expected = made.toy.generate(PROMPT, 8)
    first = expected.index(expected[4])
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=8, stop_ids=(expected[4],))
    assert await talk.rest() == (expected[:first], 1)
    (stop,) = np.frombuffer(generations(made)[0].stop_ids, "<u4")
    assert made.toy.order()[stop] == expected[4]
    with pytest.raises(RequestInvalid, match="nothing is left"):
        talk.begin([])


async def test_a_full_session_stops_at_its_last_position(alone: Any) -> None:
    made = await alone()
    talk = await made.session(max_positions=11)
    talk.begin(PROMPT, max_tokens=50)
    assert await talk.rest() == (made.toy.generate(PROMPT, 4), 4)


async def test_a_cancelled_generation_is_halted_and_what_it_added_is_taken_back(alone: Any) -> None:
    made = await alone(limits=Limits(steps_ahead=4))
    made.replica.pace = asyncio.Semaphore(3)
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=40)
    given = [(await talk.frame()).step.id for _ in range(2)]
    talk.session.cancel()
    tokens, kind = await talk.rest()
    given += tokens
    assert (given, kind) == (made.toy.generate(PROMPT, 40)[: len(given)], 3)
    talk.begin([40], max_tokens=3)
    made.replica.hurry()
    assert await talk.rest() == (made.toy.generate([*PROMPT, *given, 40], 3), 2)
    assert any(up.HasField("halt") for up in made.replica.seen)


async def test_a_turn_without_ids_after_a_cancelled_one_goes_on_from_what_was_given(alone: Any) -> None:
    made = await alone(limits=Limits(steps_ahead=2))
    made.replica.pace = asyncio.Semaphore(3)
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=40)
    given = [(await talk.frame()).step.id]
    talk.session.cancel()
    given += (await talk.rest())[0]
    talk.begin([], max_tokens=3)
    made.replica.hurry()
    assert await talk.rest() == (made.toy.generate([*PROMPT, *given], 3), 2)
    assert max(kept_back(made)) > 0
    assert len(made.replica.opened) == 1


async def test_a_turn_cancelled_before_its_first_token_leaves_nothing_to_go_on_from(alone: Any) -> None:
    made = await alone()
    made.replica.pace = asyncio.Semaphore(0)
    talk = await made.session()
    talk.begin(PROMPT)
    talk.session.cancel()
    assert await talk.rest() == ([], 3)
    with pytest.raises(RequestInvalid, match="nothing is left"):
        talk.begin([])


async def test_a_client_that_does_not_read_is_handed_no_more_than_its_share(alone: Any) -> None:
    made = await alone(limits=Limits(steps_ahead=4))
    slow, quick = await made.session(), await made.session()
    slow.begin(PROMPT, max_tokens=30)
    quick.begin(PROMPT, max_tokens=30)
    assert await quick.rest() == (made.toy.generate(PROMPT, 30), 2)
    assert slow.session.frames.qsize() <= 5
    assert await slow.rest() == (made.toy.generate(PROMPT, 30), 2)


async def test_no_more_is_handed_on_than_since_the_last_heartbeat_is_allowed(alone: Any) -> None:
    made = await alone()
    made.renewing.gate = asyncio.Event()
    talk = await made.session(made.account(heartbeat_tokens=8))
    talk.begin(PROMPT, max_tokens=30)
    given = [(await talk.frame()).step.id for _ in range(8)]
    await until(lambda: len(talk.session._decoding._held) == 22)
    assert talk.session.frames.empty()
    made.renewing.gate.set()
    tokens, kind = await talk.rest()
    assert (given + tokens, kind) == (made.toy.generate(PROMPT, 30), 2)


async def test_a_user_who_is_refused_gets_nothing_of_what_waits_and_the_session_is_closed(alone: Any) -> None:
    made = await alone()
    made.renewing.refusals = [UserRefused("removed")]
    talk = await made.session(made.account(heartbeat_tokens=8))
    talk.begin(PROMPT, max_tokens=30)
    given = 0
    while not (frame := await talk.frame()).HasField("failed"):
        given += 1
    assert frame.failed.code == "user_refused"
    assert given <= 8
    await asyncio.wait_for(made.replica.closed.wait(), 10)


async def test_no_more_ids_are_asked_for_than_the_lease_has_rows_for(alone: Any) -> None:
    made = await alone(max_positions=400)
    account = made.account(tokens=40, chunk=40)
    made.renewing.grows = 40
    talk = await made.session(account)
    talk.begin(PROMPT, max_tokens=120)
    assert await talk.rest() == (made.toy.generate(PROMPT, 120), 2)
    asked = generations(made)
    assert [one.step for one in asked] == np.cumsum([0, *(one.max_ids for one in asked[:-1])]).tolist()
    assert len(asked) > 2
    assert (account._fed, account._reserved) == (len(PROMPT) + 120, 0)


async def test_sessions_of_one_lease_share_what_it_has(alone: Any) -> None:
    made = await alone(max_positions=400)
    account = made.account(tokens=200, chunk=200)
    made.renewing.grows = 200
    talks = [await made.session(account) for _ in range(6)]
    for talk in talks:
        talk.begin(PROMPT, max_tokens=150)
    for talk in talks:
        assert await talk.rest() == (made.toy.generate(PROMPT, 150), 2)
    assert account._reserved == 0
    assert len(made.renewing.heartbeats) < 60


# -- a server that lies -------------------------------------------------------------------------------------------


def ids_changed(fed: model_pb2.Fed, change: Callable[[np.ndarray], np.ndarray]) -> None:
    fed.ids.ids = change(np.frombuffer(fed.ids.ids, "<u4").copy()).astype("<u4").tobytes()


def more(fed: model_pb2.Fed) -> None:
    fed.slices[0].count += 40
    ids_changed(fed, lambda ids: np.concatenate([ids, np.zeros(40)]))


def none(fed: model_pb2.Fed) -> None:
    fed.slices[0].count, fed.slices[0].done = 0, False
    ids_changed(fed, lambda ids: ids[:0])


LIES: dict[str, tuple[Callable[[model_pb2.Fed], None], str]] = {
    "an id outside the vocabulary": (lambda fed: ids_changed(fed, lambda ids: ids + 101), "tensor_invalid"),
    "short bytes": (lambda fed: setattr(fed.ids, "ids", fed.ids.ids[:-4]), "tensor_invalid"),
    "another position": (lambda fed: setattr(fed.slices[0], "position", 9), "position_refused"),
    "more than was asked": (more, "frame_invalid"),
    "none, and not done": (
        none,
        "frame_invalid",
    ),
    "another form": (lambda fed: setattr(fed, "hidden", b"1234"), "frame_invalid"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_about_one_session_ends_that_session_alone(alone: Any, lie: str) -> None:
    made = await alone()
    bend, code = LIES[lie]
    victim, neighbour = await made.session(), await made.session()

    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        if down.HasField("fed") and down.fed.slices[0].session == made.replica.opened[0]:
            bend(down.fed)
        return [down]

    made.replica.tamper = tamper
    victim.begin(PROMPT)
    neighbour.begin(PROMPT[1:], max_tokens=5)
    assert await victim.failure() == code
    assert await neighbour.rest() == (made.toy.generate(PROMPT[1:], 5), 2)


async def test_a_stop_id_that_is_sent_all_the_same_is_refused(alone: Any) -> None:
    made = await alone()
    talk = await made.session()
    stop = int(np.argsort(made.toy.order())[77])
    made.replica.tamper = lambda down: (
        (down.HasField("fed") and ids_changed(down.fed, lambda ids: np.full_like(ids, stop))) or [down]
    )
    talk.begin(PROMPT, stop_ids=(77,))
    assert await talk.failure() == "frame_invalid"


async def test_ids_that_nobody_asked_for_are_refused(alone: Any) -> None:
    made = await alone()
    talk = await made.session()
    ids = model_pb2.Fed(slices=[model_pb2.Slice(session=made.replica.opened[0], position=0, count=1)])
    ids.ids.ids = bytes(4)
    made.replica.say(model_pb2.Down(fed=ids))
    assert await talk.failure() == "frame_invalid"


async def test_ids_that_come_late_to_a_session_that_left_are_passed_over(alone: Any) -> None:
    made = await alone()
    leaving, staying = await made.session(), await made.session()
    made.replica.hold = asyncio.Event()
    leaving.begin(PROMPT)
    staying.begin(PROMPT, max_tokens=9)
    await until(lambda: len(generations(made)) == 2)
    leaving.session.close()
    made.replica.hold.set()
    assert await staying.rest() == (made.toy.generate(PROMPT, 9), 2)


async def test_a_gateway_whose_count_is_ahead_after_a_loss_does_not_end_the_session(alone: Any) -> None:
    made = await alone(replicas=("one", "two"))
    talk = await made.session()
    lost = made.seated()
    lost.pace = asyncio.Semaphore(3)
    talk.begin(PROMPT, max_tokens=12)
    await talk.frame()
    (other,) = (replica for replica in made.front.replicas if replica is not lost)
    told: list[int] = []

    def spent(down: model_pb2.Down) -> list[model_pb2.Down]:
        if not down.HasField("fed") or told:
            return [down]
        told.append(1)
        closed = model_pb2.Closed(session=down.fed.slices[0].session, code="lease_spent", message="no rows left")
        return [model_pb2.Down(closed=closed)]

    other.tamper = spent
    lost.kill()
    first = made.toy.generate(PROMPT, 12)
    lost.dead = False
    assert await talk.rest() == (first[1:], 2)
    assert told


async def test_a_gateway_that_says_again_and_again_that_a_lease_is_spent_ends_the_session(alone: Any) -> None:
    made = await alone(limits=Limits(failover_seconds=0.5))
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=12)

    def spent(down: model_pb2.Down) -> list[model_pb2.Down]:
        if not down.HasField("fed"):
            return [down]
        closed = model_pb2.Closed(session=down.fed.slices[0].session, code="lease_spent", message="no rows left")
        return [model_pb2.Down(closed=closed)]

    made.replica.tamper = spent
    assert await talk.failure() in ("replica_lost", "lease_spent")
