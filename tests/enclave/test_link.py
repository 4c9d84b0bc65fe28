"""One link, many sessions, and a replica that lies: each lie ends the session it concerns, and no other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stip_enclave.config import Limits
from stip_protocol.errors import DeadlineExceeded, Draining, ManifestMismatch, VersionUnsupported
from stip_protocol.wire import model_pb2

PROMPT, OTHER = [5, 17, 3], [90, 2]
Fed = Callable[[model_pb2.Fed, int], None]


def row_of(fed: model_pb2.Fed, victim: bytes) -> int | None:
    return next((row for row, part in enumerate(fed.slices) if part.session == victim), None)


def edited_row(fed: model_pb2.Fed, row: int, value: float) -> None:
    hidden = np.frombuffer(fed.hidden, np.float32).reshape(len(fed.slices), -1).copy()
    hidden[row, 1] = value
    fed.hidden = hidden.tobytes()


def moved(fed: model_pb2.Fed, row: int) -> None:
    fed.slices[row].position += 1


def counted(fed: model_pb2.Fed, row: int) -> None:
    fed.slices[row].count = 2


def repeated(fed: model_pb2.Fed, row: int) -> None:
    size = len(fed.hidden) // len(fed.slices)
    fed.hidden = fed.hidden + fed.hidden[row * size : (row + 1) * size]
    fed.slices.append(fed.slices[row])


def strange(fed: model_pb2.Fed, row: int) -> None:
    fed.slices[row].session = bytes(16)


LIES: dict[str, tuple[Fed, str]] = {
    "finite values that overflow the head": (lambda fed, row: edited_row(fed, row, 3e38), "tensor_invalid"),
    "a NaN": (lambda fed, row: edited_row(fed, row, float("nan")), "tensor_invalid"),
    "an infinity": (lambda fed, row: edited_row(fed, row, float("-inf")), "tensor_invalid"),
    "another position": (moved, "position_refused"),
    "another count": (counted, "frame_invalid"),
    "a slice twice": (repeated, "frame_invalid"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_about_one_session_ends_that_session_alone(bench: Any, lie: str) -> None:
    made = await bench()
    bend, code = LIES[lie]
    victim, neighbour = await made.session(), await made.session()

    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        if down.HasField("fed") and (row := row_of(down.fed, made.replica.opened[0])) is not None:
            bend(down.fed, row)
        return [down]

    victim.begin(PROMPT)
    neighbour.begin(OTHER, max_tokens=5)
    made.replica.tamper = tamper
    assert await victim.failure() == code
    assert await neighbour.rest() == (made.toy.generate(OTHER, 5), 2)
    closes = [up.close.session for up in made.replica.seen if up.HasField("close")]
    assert closes == [made.replica.opened[0]]


async def test_short_bytes_end_the_sessions_of_their_frame_alone(bench: Any) -> None:
    made = await bench()
    victim, neighbour = await made.session(), await made.session()

    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        if down.HasField("fed") and row_of(down.fed, made.replica.opened[0]) is not None:
            down.fed.hidden = down.fed.hidden[:-4]
        return [down]

    made.replica.tamper = tamper
    victim.begin(PROMPT)
    assert await victim.failure() == "tensor_invalid"
    neighbour.begin(OTHER, max_tokens=5)
    assert await neighbour.rest() == (made.toy.generate(OTHER, 5), 2)


async def test_a_reply_under_another_sessions_handle_is_a_reply_that_nobody_asked_for(bench: Any) -> None:
    made = await bench()
    asking, idle, neighbour = [await made.session() for _ in range(3)]
    first, second, _ = made.replica.opened

    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        if down.HasField("fed") and (row := row_of(down.fed, first)) is not None:
            down.fed.slices[row].session = second
        return [down]

    made.replica.tamper = tamper
    asking.begin(PROMPT)
    assert await idle.failure() == "frame_invalid"
    neighbour.begin(OTHER, max_tokens=5)
    assert await neighbour.rest() == (made.toy.generate(OTHER, 5), 2)
    assert asking.session.frames.empty()


async def test_a_reply_for_no_session_is_counted_and_passed_over(bench: Any) -> None:
    made = await bench()
    talk = await made.session()

    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        if not down.HasField("fed"):
            return [down]
        extra = model_pb2.Down()
        extra.CopyFrom(down)
        strange(extra.fed, 0)
        return [extra, down]

    made.replica.tamper = tamper
    talk.begin(PROMPT, max_tokens=4)
    assert await talk.rest() == (made.toy.generate(PROMPT, 4), 2)
    assert 'stip_refusals_total{code="session_unknown"} 4.0' in exported(made)


def exported(made: Any) -> str:
    from prometheus_client import generate_latest

    return generate_latest(made.telemetry.registry).decode()


async def test_an_output_of_another_form_is_refused(bench: Any) -> None:
    made = await bench()
    talk = await made.session()

    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        if down.HasField("fed"):
            down.fed.logits = down.fed.hidden
        return [down]

    made.replica.tamper = tamper
    talk.begin(PROMPT)
    assert await talk.failure() == "frame_invalid"


def bent(change: Callable[[model_pb2.Top], None]) -> Any:
    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        if down.HasField("fed") and down.fed.HasField("top"):
            change(down.fed.top)
        return [down]

    return tamper


def with_values(top: model_pb2.Top, values: Callable[[np.ndarray], None]) -> None:
    array = np.frombuffer(top.values, np.float32).copy()
    values(array)
    top.values = array.tobytes()


def with_indices(top: model_pb2.Top, first: int, second: int) -> None:
    array = np.frombuffer(top.indices, "<u4").copy()
    array[:2] = first, second
    top.indices = array.tobytes()


TOP_LIES: dict[str, Callable[[model_pb2.Top], None]] = {
    "a NaN": lambda top: with_values(top, lambda array: array.__setitem__(3, np.nan)),
    "values that rise": lambda top: with_values(top, lambda array: array.__setitem__(3, 1e9)),
    "an id outside the vocabulary": lambda top: with_indices(top, 101, 0),
    "an id twice": lambda top: with_indices(top, 7, 7),
    "an infinite log-sum-exp": lambda top: setattr(top, "log_sum_exp", np.float32(np.inf).tobytes()),
    "short indices": lambda top: setattr(top, "indices", top.indices[:-4]),
    "short values": lambda top: setattr(top, "values", top.values[:-4]),
    "no log-sum-exp": lambda top: setattr(top, "log_sum_exp", b""),
    "another count": lambda top: setattr(top, "count", 63),
}


@pytest.mark.parametrize("lie", TOP_LIES)
async def test_a_bent_top_is_refused(bench: Any, lie: str) -> None:
    made = await bench(preset="paper")
    talk = await made.session()
    made.replica.tamper = bent(TOP_LIES[lie])
    talk.begin(PROMPT)
    assert await talk.failure() == "tensor_invalid"


async def test_permuted_logits_become_true_ids_and_the_row_is_fetched_when_needed(bench: Any) -> None:
    made = await bench(preset="paper")
    for sampling in ({}, {"temperature": 0.5, "top_k": 8, "seed": 3}, {"temperature": 2.0, "seed": 4}):
        talk = await made.session()
        talk.begin(PROMPT, max_tokens=6, **sampling)
        assert await talk.rest() == (made.toy.generate(PROMPT, 6, **sampling), 2)
    assert sum(up.HasField("recall") for up in made.replica.seen) == 6


async def test_a_prompt_leaves_in_frames_that_the_card_allows_and_rows_of_others_go_first(bench: Any) -> None:
    made = await bench()
    long, short = await made.session(), await made.session()
    long.begin(list(range(23)), max_tokens=3)
    short.begin([9], max_tokens=3)
    expected = made.toy.generate(list(range(23)), 3), 2
    assert await long.rest() == expected
    assert await short.rest() == (made.toy.generate([9], 3), 2)
    feeds = made.replica.feeds
    assert all(sum(part.count for part in feed.slices) <= 5 for feed in feeds)
    handle, other = made.replica.opened
    assert feeds[0].slices[0].session == other
    pieces = [part for feed in feeds for part in feed.slices if part.session == handle and part.position < 23]
    assert sum(part.count for part in pieces) == 23
    assert [part.outputs for part in pieces] == [0] * (len(pieces) - 1) + [1]


async def test_sessions_that_are_ready_together_share_a_frame(bench: Any) -> None:
    made = await bench()
    talks = [await made.session() for _ in range(4)]
    for talk in talks:
        talk.begin([8], max_tokens=3)
    for talk in talks:
        await talk.rest()
    assert [len(feed.slices) for feed in made.replica.feeds] == [4, 4, 4]


async def test_a_closed_session_takes_its_code_from_the_other_side(bench: Any) -> None:
    made = await bench()
    victim, neighbour = await made.session(), await made.session()

    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        if down.HasField("fed") and row_of(down.fed, made.replica.opened[0]) is not None:
            closed = model_pb2.Closed(session=made.replica.opened[0], code="lease_spent", message="no rows left")
            return [model_pb2.Down(closed=closed)]
        return [down]

    made.replica.tamper = tamper
    victim.begin(PROMPT)
    assert await victim.failure() == "lease_spent"
    neighbour.begin(OTHER, max_tokens=2)
    assert await neighbour.rest() == (made.toy.generate(OTHER, 2), 2)


async def test_a_refused_opening_says_why(bench: Any) -> None:
    made = await bench()
    made.replica.tamper = lambda down: [
        model_pb2.Down(closed=model_pb2.Closed(session=down.opened.session, code="draining", message="going"))
    ]
    with pytest.raises(Draining):
        await made.session()


async def test_an_opening_that_is_not_answered_ends_in_time(bench: Any) -> None:
    made = await bench(limits=Limits(open_seconds=0.1))
    made.replica.tamper = lambda down: []
    with pytest.raises(DeadlineExceeded):
        await made.session()


CARDS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "another version": ({"version": 2}, VersionUnsupported),
    "another instance": ({"instance": "0" * 32}, ManifestMismatch),
    "another epoch": ({"epoch": 3}, ManifestMismatch),
    "another manifest": ({"manifest_digest": bytes(32)}, ManifestMismatch),
    "another preset": ({"preset": "paper"}, ManifestMismatch),
    "another dtype": ({"dtype": "bfloat16"}, ManifestMismatch),
    "another width": ({"width": 13}, ManifestMismatch),
    "a head": ({"vocabulary": 101}, ManifestMismatch),
    "no rows": ({"max_rows": 0}, ManifestMismatch),
    "another output": ({"outputs": [model_pb2.OUTPUT_TOP]}, ManifestMismatch),
}


@pytest.mark.parametrize("card", CARDS)
async def test_a_card_that_does_not_fit_the_manifest_is_refused(bench: Any, card: str) -> None:
    made = await bench()
    changes, error = CARDS[card]
    del made.replica.card.outputs[:]
    made.replica.card.MergeFrom(model_pb2.Card(outputs=changes.pop("outputs", [model_pb2.OUTPUT_HIDDEN])))
    for name, value in changes.items():
        setattr(made.replica.card, name, value)
    with pytest.raises(error):
        await made.session()


async def test_a_late_answer_to_a_session_that_left_is_passed_over(bench: Any) -> None:
    made = await bench()
    leaving, staying = await made.session(), await made.session()
    made.replica.hold = asyncio.Event()
    leaving.begin(PROMPT)
    staying.begin(OTHER, max_tokens=3)
    await asyncio.wait_for(made.replica.fed.wait(), 10)
    leaving.session.close()
    made.replica.hold.set()
    assert await staying.rest() == (made.toy.generate(OTHER, 3), 2)
    assert "session_unknown" not in exported(made)
