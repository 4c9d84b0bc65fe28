"""Turns of one session: what is fed, what is told, and when it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from stip_enclave import lease
from stip_enclave.config import Limits
from stip_enclave.turns import TurnRequest
from stip_protocol.errors import FrameInvalid, PositionRefused, RequestInvalid, StipError, Unavailable
from stip_protocol.wire import enclave_pb2

PROMPT = [5, 17, 3]


def fed_positions(made: Any) -> list[int]:
    return [part.position + at for feed in made.replica.feeds for part in feed.slices for at in range(part.count)]


async def test_turns_continue_one_sequence_and_feed_the_last_token_first(bench: Any) -> None:
    made = await bench()
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=4)
    tokens, kind = await talk.rest()
    assert (tokens, kind) == (made.toy.generate(PROMPT, 4), 2)
    talk.begin([40, 41], max_tokens=2)
    assert await talk.rest() == (made.toy.generate([*PROMPT, *tokens, 40, 41], 2), 2)
    assert fed_positions(made) == list(range(3 + 4 + 2 + 1))
    rows = b"".join(feed.rows for feed in made.replica.feeds)
    sequence = [*PROMPT, *tokens, 40, 41]
    assert rows[: len(sequence) * 48] == made.toy.embedding[sequence].tobytes()


async def test_a_turn_without_ids_goes_on_where_the_last_one_stopped(bench: Any) -> None:
    made = await bench()
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=3)
    first, _ = await talk.rest()
    talk.begin([], max_tokens=3)
    assert first + (await talk.rest())[0] == made.toy.generate(PROMPT, 6)


async def test_a_stop_id_ends_the_turn_and_is_no_part_of_the_sequence(bench: Any) -> None:
    made = await bench()
    expected = made.toy.generate(PROMPT, 8)
    stop = expected[3]
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=8, stop_ids=(stop, 100))
    first = expected.index(stop)
    assert await talk.rest() == (expected[:first], 1)
    talk.begin([stop], max_tokens=1)
    assert (await talk.rest())[0] == made.toy.generate([*PROMPT, *expected[:first], stop], 1)
    assert fed_positions(made) == list(range(3 + first + 1))


async def test_a_full_session_stops_at_its_last_position(bench: Any) -> None:
    made = await bench()
    talk = await made.session(max_positions=7)
    talk.begin(PROMPT, max_tokens=50)
    assert await talk.rest() == (made.toy.generate(PROMPT, 4), 4)
    with pytest.raises(PositionRefused):
        talk.begin([1])


async def test_a_prompt_that_fills_every_position_leaves_no_room_for_a_token(bench: Any) -> None:
    made = await bench()
    talk = await made.session(max_positions=3)
    talk.begin(PROMPT)
    assert await talk.rest() == ([], 4)


async def test_steps_say_the_position_of_the_row_that_follows(bench: Any) -> None:
    made = await bench()
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=2)
    frames = [await talk.frame() for _ in range(3)]
    assert [frame.step.position for frame in frames] == [4, 5, 5]
    assert len({frame.step.ByteSize() for frame in frames}) == 1


async def test_a_cancelled_turn_drops_the_output_under_way_and_the_session_goes_on(bench: Any) -> None:
    made = await bench()
    talk = await made.session()
    made.replica.hold = asyncio.Event()
    talk.begin(PROMPT)
    await asyncio.wait_for(made.replica.fed.wait(), 10)
    talk.session.cancel()
    assert await talk.rest() == ([], 3)
    talk.begin([40], max_tokens=3)  # before the output under way has come
    made.replica.hold.set()
    assert await talk.rest() == (made.toy.generate([*PROMPT, 40], 3), 2)
    assert fed_positions(made)[:4] == [0, 1, 2, 3]


async def test_a_turn_cancelled_while_its_lease_is_renewed_does_not_fall_with_the_renewal(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RETRY_SECONDS", ())
    made = await bench()
    account = made.account(heartbeat_tokens=2)
    made.renewing.gate, made.renewing.refusals = asyncio.Event(), [Unavailable("away")]
    waiting, cancelled = await made.session(account), await made.session(account)
    for talk in (waiting, cancelled):
        talk.begin(PROMPT, max_tokens=4)
    given = [(await talk.frame()).step.id for talk in (waiting, cancelled)]  # the bound is reached: both want more
    cancelled.session.cancel()
    assert await cancelled.rest() == ([], 3)
    made.renewing.gate.set()
    assert await waiting.failure() == "unavailable"
    cancelled.begin([40], max_tokens=3)
    assert await cancelled.rest() == (made.toy.generate([*PROMPT, given[1], 40], 3), 2)


async def test_cancelling_nothing_is_nothing(bench: Any) -> None:
    made = await bench()
    talk = await made.session()
    talk.session.cancel()
    talk.begin(PROMPT, max_tokens=1)
    assert (await talk.rest())[1] == 2


async def test_a_slow_client_pauses_its_own_session_alone(bench: Any) -> None:
    made = await bench(limits=Limits(steps_ahead=4))
    slow, quick = await made.session(), await made.session()
    slow.begin(PROMPT, max_tokens=20)
    quick.begin(PROMPT, max_tokens=20)
    assert await quick.rest() == (made.toy.generate(PROMPT, 20), 2)
    assert slow.session.frames.qsize() <= 4
    assert await slow.rest() == (made.toy.generate(PROMPT, 20), 2)


async def test_a_session_without_turns_ends(bench: Any) -> None:
    made = await bench(limits=Limits(idle_seconds=0.05))
    talk = await made.session()
    assert await talk.failure() == "deadline_exceeded"


async def test_a_client_that_reads_no_more_loses_its_session(bench: Any) -> None:
    made = await bench(limits=Limits(idle_seconds=0.05, steps_ahead=3))
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=30)
    await asyncio.wait_for(made.replica.closed.wait(), 10)
    assert await talk.failure() == "deadline_exceeded"


async def test_two_turns_at_once_are_refused(bench: Any) -> None:
    made = await bench()
    talk = await made.session()
    talk.begin(PROMPT)
    with pytest.raises(FrameInvalid):
        talk.begin(PROMPT)


async def test_turns_without_end_that_nobody_reads_are_refused(bench: Any) -> None:
    made = await bench(limits=Limits(steps_ahead=3))
    talk = await made.session()

    def flood() -> None:
        for _ in range(100):
            talk.begin([1])
            talk.session.cancel()

    with pytest.raises(FrameInvalid, match="unread"):
        flood()
    assert talk.session.frames.qsize() <= 4


async def test_more_positions_than_there_are_are_refused(bench: Any) -> None:
    made = await bench()
    with pytest.raises(PositionRefused):
        await made.session(max_positions=65)


@pytest.mark.parametrize(("ids", "error"), [([], RequestInvalid), ([101], RequestInvalid), ([1] * 65, PositionRefused)])
async def test_ids_that_cannot_be_fed_are_refused(bench: Any, ids: list[int], error: type[StipError]) -> None:
    made = await bench()
    talk = await made.session()
    with pytest.raises(error):
        talk.begin(ids)


def turn(**fields: Any) -> enclave_pb2.Turn:
    sampling = {"max_tokens": 1} | fields.pop("sampling", {})
    return enclave_pb2.Turn(**({"ids": bytes(8)} | fields), sampling=enclave_pb2.Sampling(**sampling))


BAD_TURNS: dict[str, tuple[enclave_pb2.Turn, type[StipError], str]] = {
    "half an id": (turn(ids=bytes(7)), FrameInvalid, "turn ids"),
    "too many ids": (turn(ids=bytes(44)), FrameInvalid, "turn ids"),
    "half a stop id": (turn(sampling={"stop_ids": bytes(3)}), FrameInvalid, "stop_ids"),
    "too many stop ids": (turn(sampling={"stop_ids": bytes(12)}), FrameInvalid, "stop_ids"),
    "no tokens": (turn(sampling={"max_tokens": 0}), RequestInvalid, "max_tokens"),
    "a temperature that is none": (turn(sampling={"temperature": float("nan")}), RequestInvalid, "temperature"),
    "a negative temperature": (turn(sampling={"temperature": -1.0}), RequestInvalid, "temperature"),
    "a top_p above one": (turn(sampling={"top_p": 1.5}), RequestInvalid, "top_p"),
}


@pytest.mark.parametrize("bad", BAD_TURNS)
def test_a_turn_that_cannot_be_is_refused_by_name(bad: str) -> None:
    message, error, field = BAD_TURNS[bad]
    with pytest.raises(error, match=field):
        TurnRequest.read(message, Limits(ids_per_turn=10, stop_ids=2))


def test_a_turns_repr_holds_no_id() -> None:
    ids = np.array([77123, 77124], "<u4").tobytes()
    request = TurnRequest.read(turn(ids=ids, sampling={"stop_ids": ids}), Limits())
    assert "7712" not in repr(request)
