"""What waits for a peer: in order, whole, and bounded where the peer does not read."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol.tensor import FRAME_LIMIT
from stip_protocol.wire import model_pb2 as wire
from stip_server.engine import Ids
from stip_server.outbox import BYTES, MESSAGES, Outbox

HANDLES = [bytes([n]) * 16 for n in range(3)]


def ids(handle: bytes, position: int, values: list[int], *, done: bool = False) -> Ids:
    data = b"".join(value.to_bytes(4, "little") for value in values)
    return Ids((1, handle), position, data, done=done, compute=0.5, queue=0.25 * position)


def closed(handle: bytes, size: int = 0) -> wire.Down:
    return wire.Down(closed=wire.Closed(session=handle, message="x" * size))


async def emptied(outbox: Outbox) -> list[wire.Down]:
    """All that waits, sent."""
    outbox.finish()
    sent: list[wire.Down] = []
    while (parcel := await outbox.next()) is not None:
        sent += parcel.messages()
        outbox.sent(parcel)
    return sent


def told(messages: list[wire.Down], handle: bytes) -> list[tuple[int, list[int], bool] | str]:
    """What a peer hears of one session, ids that follow each other joined up to each end of a generation."""
    heard: list[tuple[int, list[int], bool] | str] = []
    for down in messages:
        if down.WhichOneof("body") == "closed":
            if down.closed.session == handle:
                heard.append("closed")
            continue
        start, data = 0, down.fed.ids.ids
        for piece in down.fed.slices:
            stop = start + 4 * piece.count
            if piece.session == handle:
                values = [int.from_bytes(data[at : at + 4], "little") for at in range(start, stop, 4)]
                last = heard[-1] if heard else "closed"
                if isinstance(last, tuple) and not last[2]:
                    assert piece.position == last[0] + len(last[1])
                    heard[-1] = (last[0], last[1] + values, piece.done)
                else:
                    heard.append((piece.position, values, piece.done))
            start = stop
    return heard


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["ids", "ids", "done", "close", "send"])), max_size=60))
async def test_each_session_is_told_the_same_whether_its_peer_reads_at_once_or_at_the_end(
    events: list[tuple[int, str]],
) -> None:
    prompt, late, positions = list[wire.Down](), Outbox(), [0, 0, 0]
    for n, (which, event) in enumerate(events):
        at_once, handle = Outbox(), HANDLES[which]
        for outbox in (at_once, late):
            if event == "close":
                outbox.put(closed(handle))
            else:
                outbox.add([ids(handle, positions[which], [n], done=event == "done")])
        positions[which] = 0 if event == "close" else positions[which] + 1
        prompt += await emptied(at_once)
    messages = await emptied(late)
    for handle in HANDLES:
        assert told(messages, handle) == told(prompt, handle)


async def test_a_peer_that_does_not_read_keeps_one_frame_of_ids_waiting() -> None:
    outbox = Outbox()
    for step in range(5000):
        outbox.add([ids(handle, step, [step, step + 1]) for handle in HANDLES])
    (down,) = await emptied(outbox)
    assert [(piece.position, piece.count) for piece in down.fed.slices] == [(0, 10_000)] * 3
    assert down.fed.compute_us == 5000 * 500_000
    assert down.fed.queue_us == 4999 * 250_000


async def test_ids_that_wait_are_cut_into_frames_that_may_be_sent() -> None:
    outbox, most = Outbox(), FRAME_LIMIT // 4
    for step in range(3):
        outbox.add([ids(HANDLES[0], step * most, [step] * most)])
    assert [len(down.fed.ids.ids) for down in await emptied(outbox)] == [FRAME_LIMIT] * 3


@pytest.mark.parametrize(("count", "size"), [(MESSAGES + 1, 0), (BYTES // FRAME_LIMIT + 1, FRAME_LIMIT)])
async def test_an_outbox_is_full_by_messages_or_by_bytes_and_has_room_again_before_it_is_empty(
    count: int, size: int
) -> None:
    outbox = Outbox()
    await outbox.room()
    for _ in range(count):
        outbox.put(closed(HANDLES[0], size))
    room = asyncio.create_task(outbox.room())
    await asyncio.sleep(0)
    assert not room.done()
    for step in range(2):
        parcel = await outbox.next()
        assert parcel is not None
        outbox.add([ids(HANDLES[1], step, [step])])  # whoever decodes alone goes on
        outbox.sent(parcel)
    await room
    assert not outbox.full
    assert outbox.parcels
