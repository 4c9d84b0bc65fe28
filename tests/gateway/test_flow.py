"""Limits, back-pressure and endings: nothing piles up, nobody waits for someone who has gone, a drain loses nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest

from stip_gateway.config import Limits
from stip_gateway.relay import Notes, Relay
from stip_protocol import rpc
from stip_protocol.errors import Draining, Overloaded, from_code
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import model_pb2
from tests.gateway.running import LINK_CA, Running, failure, read, settled
from tests.gateway.wire import EPOCH, INSTANCE, feeding, lease, link_sessions, opening, rows, spki_digest


async def test_more_sessions_than_the_limit_are_refused_with_a_time_to_retry(running: Running) -> None:
    mine = spki_digest(running.identity)
    async with running.channel(running.identity) as channel:
        call = running.link(channel)
        for _ in range(3):
            await call.write(opening(os.urandom(16), lease(mine)))
            assert (await read(call)).HasField("opened")
        await call.write(opening(os.urandom(16), b"a lease that nobody looks at any more"))
        closed = (await read(call)).closed
        assert (closed.code, closed.retry_after_ms) == (Overloaded.code, 2500)
        await call.done_writing()


async def test_more_links_than_the_limit_are_refused_with_a_time_to_retry_and_no_replica_is_asked(
    running: Running,
) -> None:
    async with running.channel(running.identity) as channel:
        calls = [running.link(channel) for _ in range(2)]
        await settled(lambda: len(running.replica.links) == 2)
        running.routes.lost(running.route(0))
        running.replica.asked.clear()
        error = await failure(running.link(channel))
        assert isinstance(error, Overloaded)
        assert error.retry_after == 2.5
        assert not running.replica.asked.is_set()
        assert not any(call.done() for call in calls)


async def test_one_enclave_cannot_take_all_links(pair: Running) -> None:
    most, other = Limits().links_per_enclave, LINK_CA.issue("ef56")
    async with pair.channel(pair.identity) as mine, pair.channel(other) as theirs:
        calls = [pair.link(mine) for _ in range(most)]
        await settled(lambda: len(pair.service._links) == most)
        error = await failure(pair.link(mine))
        assert isinstance(error, Overloaded)
        assert error.retry_after == Limits().retry_seconds
        neighbour, session = pair.link(theirs), os.urandom(16)
        await neighbour.write(opening(session, lease(spki_digest(other))))
        assert (await read(neighbour)).HasField("opened")
        calls[0].cancel()
        await settled(lambda: len(pair.service._links) == most)
        again = pair.link(mine)
        await settled(lambda: len(pair.service._links) == most + 1)
        assert not again.done()


async def test_what_a_replica_says_of_retrying_reaches_the_enclave(running: Running) -> None:
    async with running.channel(running.identity) as channel:
        call, session = running.link(channel), os.urandom(16)
        await call.write(opening(session, lease(spki_digest(running.identity))))
        await read(call)
        closed = model_pb2.Closed(session=session, code=Overloaded.code, message="full", retry_after_ms=1700)
        await running.replica.links[0].write(model_pb2.Down(closed=closed))
        assert (await read(call)).closed.retry_after_ms == 1700
        await settled(lambda: running.route(0).sessions == 0)
        running.replica.refuse = from_code(Overloaded.code, "full", 0.3)
        error = await failure(running.link(channel))
        assert isinstance(error, Overloaded)
        assert error.retry_after == 0.3


async def test_links_that_wait_for_their_replica_count_towards_the_limit(running: Running) -> None:
    running.replica.thinking = asyncio.Event()
    async with running.channel(running.identity) as channel:
        calls = [running.link(channel) for _ in range(4)]
        await asyncio.wait_for(running.replica.asked.wait(), 10)
        running.replica.thinking.set()
        await settled(lambda: sum(call.done() for call in calls) == 2)
        for call in calls:
            if call.done():
                assert isinstance(await failure(call), Overloaded)
        assert len(running.service._links) == 2


async def stuck(call: Any, make: Callable[[], model_pb2.Up]) -> asyncio.Task[None]:
    """Write until the other side takes no more; the write that waits."""
    while True:
        writing: asyncio.Task[None] = asyncio.ensure_future(call.write(make()))
        if not (await asyncio.wait({writing}, timeout=1))[0]:
            return writing
        await writing


def strangers() -> model_pb2.Up:
    """A frame with 256 answers: none of its sessions is open."""
    return feeding(*((os.urandom(16), 0, 1) for _ in range(256)))


async def test_an_enclave_that_does_not_read_its_answers_is_read_no_further_until_it_does(running: Running) -> None:
    async with running.narrow_channel(running.identity) as channel:
        call, session = running.link(channel), os.urandom(16)
        await call.write(opening(session, lease(spki_digest(running.identity), tokens=10**9)))
        frame = feeding(*([(session, 0, 1)] * 256), data=rows(256))
        writing = await stuck(call, lambda: frame)
        while not writing.done():
            await read(call)
        call.cancel()


async def test_a_replica_that_does_not_read_stops_its_enclave_until_it_does(running: Running) -> None:
    running.replica.reading = asyncio.Event()
    async with running.narrow_channel(running.identity) as channel:
        call, session = running.link(channel), os.urandom(16)
        await call.write(opening(session, lease(spki_digest(running.identity), tokens=10**9)))
        up = feeding((session, 0, 64), data=rows(64))
        up.feed.slices[0].outputs = 0
        writing = await stuck(call, lambda: up)
        assert running.replica.seen == []
        running.replica.reading.set()
        async with asyncio.timeout(10):
            await writing
        call.cancel()


async def test_an_enclave_that_leaves_without_reading_leaves_no_link_behind(running: Running) -> None:
    async with running.narrow_channel(running.identity) as channel:
        call = running.link(channel)
        await stuck(call, strangers)
        call.cancel()
        await settled(lambda: not running.service._links)
        await settled(lambda: not running.replica.links)


async def test_draining_waits_for_no_reader_and_bears_links_that_end_meanwhile(running: Running) -> None:
    other = LINK_CA.issue("ef56")
    async with running.narrow_channel(running.identity) as mine, running.channel(other) as theirs:
        await stuck(running.link(mine), strangers)
        call, session = running.link(theirs), os.urandom(16)
        await call.write(opening(session, lease(spki_digest(other))))
        await read(call)
        drained = asyncio.create_task(running.service.drain())
        assert (await read(call)).drain.seconds == 7, "a neighbour that does not read keeps nobody from knowing"
        call.cancel()
        await asyncio.wait_for(drained, 10)


async def test_a_link_that_waits_for_its_replica_while_a_drain_begins_is_refused(running: Running) -> None:
    running.replica.thinking = asyncio.Event()
    async with running.channel(running.identity) as channel:
        call = running.link(channel)
        await asyncio.wait_for(running.replica.asked.wait(), 10)
        await asyncio.wait_for(running.service.drain(), 10)
        running.replica.thinking.set()
        assert isinstance(await failure(call), Draining)


async def test_draining_refuses_new_sessions_and_waits_for_the_open_one(running: Running) -> None:
    mine = spki_digest(running.identity)
    async with running.channel(running.identity) as channel:
        call, session = running.link(channel), os.urandom(16)
        await call.write(opening(session, lease(mine)))
        await read(call)
        drained = asyncio.create_task(running.service.drain())
        assert (await read(call)).drain.seconds == 7
        await call.write(opening(os.urandom(16), lease(mine)))
        assert (await read(call)).closed.code == "draining"
        await call.write(feeding((session, 0, 1)))
        assert (await read(call)).HasField("fed")
        assert not drained.done()
        await call.write(model_pb2.Up(close=model_pb2.Close(session=session)))
        assert await asyncio.wait_for(call.read(), 10) is grpc.aio.EOF
        await asyncio.wait_for(drained, 10)


class SlowToLeave:
    """The enclave's side of a link: half-closed once a reply is on its way, and slow to give that reply up."""

    def __init__(self) -> None:
        self.taking, self.leaving = asyncio.Event(), asyncio.Event()

    async def read(self) -> Any:
        await self.taking.wait()
        return grpc.aio.EOF

    async def write(self, _: model_pb2.Down) -> None:
        self.taking.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.leaving.set()
            await asyncio.Event().wait()


async def test_an_enclave_that_leaves_while_its_link_is_being_ended_leaves_none_at_the_replica(
    running: Running,
) -> None:
    metadata, nobody = ((rpc.INSTANCE_KEY, INSTANCE), (rpc.EPOCH_KEY, str(EPOCH))), Telemetry("gateway", simulated=True)
    notes = Notes(nobody.stage("admit"), nobody.stage("forward"), lambda *_: None, lambda _: None)
    context = SlowToLeave()
    link = asyncio.create_task(
        Relay(link_sessions(), context, running.route(0).stub.Link(metadata=metadata), notes).run()
    )
    await settled(lambda: len(running.replica.links) == 1)
    await running.replica.links[0].write(model_pb2.Down(drain=model_pb2.Drain(seconds=1)))
    await asyncio.wait_for(context.leaving.wait(), 10)
    link.cancel()
    with pytest.raises(asyncio.CancelledError):
        await link
    await settled(lambda: not running.replica.links)


async def test_links_that_are_left_abruptly_leave_nothing_behind(pair: Running) -> None:
    mine = spki_digest(pair.identity)

    async def abandoned(number: int) -> None:
        async with pair.channel(pair.identity) as channel:
            call, session = pair.link(channel), os.urandom(16)
            await call.write(opening(session, lease(mine)))
            if number % 2:
                await read(call)
            writing: asyncio.Task[None] = asyncio.ensure_future(call.write(feeding((session, 0, 1))))
            if number % 3:  # half-closed, and gone before that has been answered
                await writing
                await call.done_writing()
            call.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    for start in range(0, 90, 6):
        await asyncio.gather(*(abandoned(start + number) for number in range(6)))
    await settled(lambda: not pair.service._links)
    await settled(lambda: not any(script.links for script in pair.scripts))
    assert [pair.route(number).load for number in range(2)] == [(0, 0), (0, 0)]
    assert (pair.service._sessions, pair.service._quiet.is_set(), dict(pair.service._enclaves)) == (0, True, {})
    left = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
    assert not any(name.startswith(("Relay.", "Sender.", "GatewayService.")) for name in left)


async def test_a_link_that_ends_leaves_no_session_counted(running: Running) -> None:
    async with running.channel(running.identity) as channel:
        call = running.link(channel)
        for _ in range(2):
            await call.write(opening(os.urandom(16), lease(spki_digest(running.identity))))
            await read(call)
        assert running.route(0).load == (2, 1)
        call.cancel()
        await settled(lambda: running.route(0).load == (0, 0))
        assert running.service._sessions == 0
        await asyncio.wait_for(running.service.drain(), 10)
