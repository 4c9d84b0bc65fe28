"""Frames of the wrong shape: what ends a link, what ends one session, and what nobody can have asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stip_gateway.frames import cut
from stip_protocol.errors import FrameInvalid, RequestInvalid, StipError, TensorInvalid
from stip_protocol.fields import STOP_IDS
from stip_protocol.tensor import FRAME_LIMIT
from stip_protocol.wire import model_pb2
from tests.gateway.running import LINK_CA, Running, failure, read
from tests.gateway.wire import (
    MAX_OUTPUTS,
    MAX_POSITIONS,
    MAX_ROWS,
    feeding,
    feeding_ids,
    generated,
    generating,
    ids,
    lease,
    link_sessions,
    opened,
    opening,
    rows,
    spki_digest,
)


def slices(*parts: model_pb2.Slice, **data: bytes) -> model_pb2.Up:
    return model_pb2.Up(feed=model_pb2.Feed(slices=parts, **data))


MALFORMED: dict[str, tuple[Callable[[bytes], model_pb2.Up], type[StipError]]] = {
    "bytes that do not match the counts": (lambda s: feeding((s, 0, 2), data=rows(1)), TensorInvalid),
    "no slice": (lambda s: model_pb2.Up(feed=model_pb2.Feed()), FrameInvalid),
    "a count beyond any frame": (lambda s: feeding((s, 0, 2**31), data=b""), FrameInvalid),
    "ids beyond any frame": (lambda s: slices(model_pb2.Slice(session=s, count=2**31), ids=ids(1)), FrameInvalid),
    "more rows than the replica takes in a frame": (
        lambda s: feeding(*[(s, 0, 64)] * (MAX_ROWS // 64 + 1), data=rows(MAX_ROWS + 64)),
        FrameInvalid,
    ),
    "more ids than a frame holds": (
        lambda s: slices(model_pb2.Slice(session=s, count=FRAME_LIMIT // 4 + 1), ids=bytes(FRAME_LIMIT + 4)),
        FrameInvalid,
    ),
    "more slices than a frame has": (lambda s: feeding(*[(s, 0, 1)] * 513), FrameInvalid),
    "rows and ids at once": (
        lambda s: slices(model_pb2.Slice(session=s, count=1), rows=rows(1), ids=ids(1)),
        FrameInvalid,
    ),
    "ids that do not match the counts": (
        lambda s: slices(model_pb2.Slice(session=s, count=2), ids=ids(1)),
        TensorInvalid,
    ),
    "half an id": (lambda s: slices(model_pb2.Slice(session=s, count=1), ids=ids(1)[:2]), TensorInvalid),
    "an empty envelope": (lambda s: model_pb2.Up(), FrameInvalid),
    "a short session handle": (lambda s: opening(b"x", b""), FrameInvalid),
    "a slice with an endless handle": (lambda s: feeding((s, 0, 1), (s * 9999, 0, 1)), FrameInvalid),
    "a recall with an endless handle": (
        lambda s: model_pb2.Up(recall=model_pb2.Recall(session=s * 9999)),
        FrameInvalid,
    ),
    "a generation with an endless handle": (lambda s: generating(s * 9999), FrameInvalid),
    "a halt without a handle": (lambda s: model_pb2.Up(halt=model_pb2.Halt()), FrameInvalid),
    "a close with a short handle": (lambda s: model_pb2.Up(close=model_pb2.Close(session=s[:15])), FrameInvalid),
    "a request id that says something": (
        lambda s: model_pb2.Up(open=model_pb2.Open(session=s, request_id="what is my blood pressure?")),
        FrameInvalid,
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_frame_ends_its_link_and_no_other(running: Running, name: str) -> None:
    make, expected = MALFORMED[name]
    other = LINK_CA.issue("ef56")
    async with running.channel(running.identity) as mine, running.channel(other) as theirs:
        neighbour, session = running.link(theirs), os.urandom(16)
        await neighbour.write(opening(session, lease(spki_digest(other))))
        await read(neighbour)
        call, own = running.link(mine), os.urandom(16)
        await call.write(opening(own, lease(spki_digest(running.identity))))
        await read(call)
        await call.write(make(own))
        assert isinstance(await failure(call), expected)
        await neighbour.write(feeding((session, 0, 1)))
        assert (await read(neighbour)).HasField("fed")
        await neighbour.done_writing()


BAD_SLICES: dict[str, model_pb2.Slice] = {
    "no row": model_pb2.Slice(count=0),
    "more rows than a session holds": model_pb2.Slice(count=MAX_POSITIONS + 1),
    "more outputs than rows": model_pb2.Slice(count=1, outputs=2),
    "more outputs than the card offers": model_pb2.Slice(count=MAX_OUTPUTS + 1, outputs=MAX_OUTPUTS + 1),
    "more taken back than a session holds": model_pb2.Slice(count=1, back=MAX_POSITIONS + 1),
}


@pytest.mark.parametrize("name", BAD_SLICES)
def test_a_slice_that_cannot_be_ends_its_session_on_both_sides_and_its_neighbour_goes_on(name: str) -> None:
    link = link_sessions()
    bad, good = opened(link), opened(link)
    wrong = BAD_SLICES[name]
    wrong.session = bad
    data = rows(wrong.count) + rows(1, 7.0)
    passed = link.up(slices(wrong, model_pb2.Slice(session=good, count=1, outputs=1), rows=data))
    assert [(down.closed.session, down.closed.code) for down in passed.down] == [(bad, FrameInvalid.code)]
    close, fed = passed.up
    assert close.close.session == bad
    assert [part.session for part in fed.feed.slices] == [good]
    assert fed.feed.rows == rows(1, 7.0)
    assert passed.rows == 1
    assert link.sessions == 1


def test_what_may_be_asked_reaches_the_replica_as_it_was() -> None:
    link = link_sessions()
    session = opened(link)
    up = slices(model_pb2.Slice(session=session, position=9, count=6, outputs=4, back=3), rows=rows(6))
    expected = up.SerializeToString()
    assert [onward.SerializeToString() for onward in link.up(up).up] == [expected]


def test_a_replica_that_says_nothing_of_outputs_answers_one_a_slice() -> None:
    link = link_sessions(max_outputs=0)
    session = opened(link)
    assert link.up(slices(model_pb2.Slice(session=session, count=2, outputs=1), rows=rows(2))).rows == 2
    refused = link.up(slices(model_pb2.Slice(session=session, count=2, outputs=2), rows=rows(2)))
    assert refused.refusals == [FrameInvalid.code]


BAD_GENERATIONS: dict[str, dict[str, Any]] = {
    "no id": {"max_ids": 0},
    "more ids than a session holds": {"max_ids": MAX_POSITIONS + 1},
    "half a stop id": {"stop_ids": b"\0\0"},
    "endless stop ids": {"stop_ids": ids(1) * (STOP_IDS + 1)},
}


@pytest.mark.parametrize("name", BAD_GENERATIONS)
def test_a_generation_that_cannot_be_ends_its_session_on_both_sides(name: str) -> None:
    link = link_sessions()
    session = opened(link)
    passed = link.up(generating(session, **BAD_GENERATIONS[name]))
    assert [down.closed.code for down in passed.down] == [FrameInvalid.code]
    assert [up.close.session for up in passed.up] == [session]
    assert link.sessions == 0


def reply(*counts: int, **out: Any) -> model_pb2.Down:
    parts = [model_pb2.Slice(session=bytes(16), count=count) for count in counts]
    return model_pb2.Down(fed=model_pb2.Fed(slices=parts, **out))


BAD_REPLIES: dict[str, model_pb2.Down] = {
    "no slice": reply(hidden=rows(1)),
    "more slices than a frame has": reply(*[1] * 9, hidden=rows(9)),
    "a slice without an output": reply(0, hidden=b""),
    "more outputs than anybody can ask for": reply(MAX_OUTPUTS + 1, hidden=rows(MAX_OUTPUTS + 1)),
    "more top rows than anybody can ask for": reply(MAX_OUTPUTS + 1, top=model_pb2.Top()),
    "ids that do not match the counts": reply(2, ids=model_pb2.Ids(ids=ids(1))),
    "half an id": reply(1, ids=model_pb2.Ids(ids=b"\0\0")),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_reply_that_nobody_can_have_asked_for_is_refused(name: str) -> None:
    with pytest.raises(RequestInvalid):
        link_sessions().down(BAD_REPLIES[name])


async def test_a_replica_that_says_what_cannot_be_loses_its_link(running: Running) -> None:
    async with running.channel(running.identity) as channel:
        call = running.link(channel)
        await call.write(opening(os.urandom(16), lease(spki_digest(running.identity))))
        await read(call)
        await running.replica.links[0].write(generated((os.urandom(16), 0, (1,))))
        await running.replica.links[0].write(reply(MAX_OUTPUTS + 1, hidden=rows(1)))
        error = await failure(call)
        assert error.code == "replica_lost"
        assert "frame_invalid" in error.message


def test_what_a_hostile_replica_says_of_sessions_it_never_had_is_not_kept() -> None:
    link = link_sessions()
    for _ in range(3):
        link.down(model_pb2.Down(closed=model_pb2.Closed(session=os.urandom(1 << 20))))
        link.down(generated((os.urandom(16), 0, (1, 2))))
    assert not link._ended


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6), st.integers(1, 3))
def test_cutting_keeps_the_beginning_of_every_slice_that_is_kept(counts: list[tuple[int, int]], item: int) -> None:
    """Each slice is (count, kept); its bytes are its number."""
    data = b"".join(bytes([number]) * count * item for number, (count, _) in enumerate(counts))
    kept = {number: min(keep, count) for number, (count, keep) in enumerate(counts) if keep}
    left = cut(data, item, [model_pb2.Slice(count=count) for count, _ in counts], kept)
    assert left == b"".join(bytes([number]) * count * item for number, count in kept.items())


def test_ids_of_a_slice_that_is_refused_are_cut_out() -> None:
    link = link_sessions()
    good, stranger = opened(link), os.urandom(16)
    [onward] = link.up(feeding_ids((stranger, 0, (1, 2)), (good, 5, (3, 4, 5)))).up
    assert onward.feed.ids == ids(3, 4, 5)
    assert not onward.feed.rows
    assert [(part.session, part.position, part.count) for part in onward.feed.slices] == [(good, 5, 3)]
