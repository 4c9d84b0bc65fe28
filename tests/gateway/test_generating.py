"""Sessions whose replica decodes alone: ids up, ids down, and a lease that pays for both."""

from __future__ import annotations

import os

import pytest

from stip_protocol.errors import LeaseExpired, LeaseSpent, SessionUnknown
from stip_protocol.wire import model_pb2
from tests.gateway.running import Running, read, settled
from tests.gateway.wire import (
    feeding_ids,
    generated,
    generating,
    ids,
    lease,
    link_sessions,
    opened,
    opening,
    spki_digest,
)


def halting(session: bytes) -> model_pb2.Up:
    return model_pb2.Up(halt=model_pb2.Halt(session=session))


def test_ids_fed_and_ids_generated_are_debited_from_the_lease() -> None:
    link = link_sessions()
    session = opened(link, tokens=10)
    assert link.up(feeding_ids((session, 0, (1, 2, 3)))).rows == 3
    assert link.up(generating(session)).rows == 0
    assert link.down(generated((session, 3, (4, 5)))).rows == 2
    assert link.down(generated((session, 5, (6, 7, 8, 9, 10)), done=True)).rows == 5
    assert link.up(feeding_ids((session, 10, (11,)))).refusals == [LeaseSpent.code]


@pytest.mark.parametrize("make", [generating, halting])
def test_a_generation_and_a_halt_reach_the_replica_as_they_were(make: object) -> None:
    assert callable(make)
    link = link_sessions()
    up = make(opened(link))
    expected = up.SerializeToString()
    assert [onward.SerializeToString() for onward in link.up(up).up] == [expected]


@pytest.mark.parametrize("make", [generating, halting])
def test_a_generation_and_a_halt_of_a_strangers_session_are_refused_and_of_an_ended_one_passed_over(
    make: object,
) -> None:
    assert callable(make)
    link = link_sessions()
    passed = link.up(make(os.urandom(16)))
    assert [down.closed.code for down in passed.down] == [SessionUnknown.code]
    assert not passed.up
    session = opened(link)
    link.up(model_pb2.Up(close=model_pb2.Close(session=session)))
    passed = link.up(make(session))
    assert (passed.up, passed.down) == ([], [])


def test_replies_of_ids_that_are_paid_for_are_handed_on_as_they_are() -> None:
    link = link_sessions()
    first, second = opened(link), opened(link)
    reply = generated((first, 3, (1, 2)), (second, 0, ()), done=True)
    expected = reply.SerializeToString()
    assert [down.SerializeToString() for down in link.down(reply).down] == [expected]


def test_a_lease_that_is_spent_by_generated_ids_hands_on_what_it_pays_for_and_ends_its_session_on_both_sides() -> None:
    link = link_sessions()
    spent, good = opened(link, tokens=2), opened(link)
    passed = link.down(generated((spent, 0, (1, 2, 3)), (good, 7, (4, 5)), done=True))
    fed, closed = passed.down
    assert fed.fed.ids.ids == ids(1, 2, 4, 5)
    assert [(p.session, p.position, p.count, p.done) for p in fed.fed.slices] == [
        (spent, 0, 2, False),
        (good, 7, 2, True),
    ]
    assert (fed.fed.compute_us, fed.load) == (5, 1)
    assert (closed.closed.session, closed.closed.code) == (spent, LeaseSpent.code)
    assert [up.close.session for up in passed.up] == [spent]
    assert (passed.rows, passed.refusals, link.sessions) == (4, [LeaseSpent.code], 1)


def test_nothing_of_a_frame_is_handed_on_that_nothing_is_left_to_pay_for() -> None:
    link = link_sessions()
    session = opened(link, tokens=1)
    link.up(feeding_ids((session, 0, (1,))))
    passed = link.down(generated((session, 1, (2, 3))))
    assert [down.WhichOneof("body") for down in passed.down] == ["closed"]


def test_ids_that_come_after_their_lease_expired_are_not_handed_on() -> None:
    clock = [1000.0]
    link = link_sessions(clock=lambda: clock[0])
    session = opened(link, not_before=0, expires=1100)
    clock[0] = 1100
    passed = link.down(generated((session, 0, (1,))))
    assert [down.closed.code for down in passed.down] == [LeaseExpired.code]
    assert [up.close.session for up in passed.up] == [session]
    assert passed.rows == 0


def test_ids_of_a_session_that_has_ended_are_neither_handed_on_nor_debited() -> None:
    link, handle = link_sessions(), os.urandom(16)
    ended, running = opened(link, handle=handle, tokens=5), opened(link, handle=handle, tokens=5)
    link.up(model_pb2.Up(close=model_pb2.Close(session=ended)))
    [down] = link.down(generated((ended, 0, (1, 2, 3)), (running, 0, (4,)))).down
    assert [(part.session, part.count) for part in down.fed.slices] == [(running, 1)]
    assert down.fed.ids.ids == ids(4)
    assert link.down(generated((running, 1, (5, 6, 7, 8)))).refusals == [], "four of five were left"
    assert link.down(generated((ended, 3, (9,)))).down == []


@pytest.mark.parametrize(("tokens", "at", "code"), [(1, 1000, LeaseSpent.code), (9, 1100, LeaseExpired.code)])
def test_a_generation_that_no_lease_can_pay_an_id_of_is_not_begun(tokens: int, at: int, code: str) -> None:
    clock = [1000.0]
    link = link_sessions(clock=lambda: clock[0])
    session = opened(link, tokens=tokens, not_before=0, expires=1100)
    link.up(feeding_ids((session, 0, (1,))))
    clock[0] = at
    passed = link.up(generating(session))
    assert [down.closed.code for down in passed.down] == [code]
    assert [up.WhichOneof("body") for up in passed.up] == ["close"]


async def test_a_session_that_generates_beyond_its_lease_ends_at_enclave_and_replica(running: Running) -> None:
    mine = spki_digest(running.identity)
    async with running.channel(running.identity) as channel:
        call, session = running.link(channel), os.urandom(16)
        await call.write(opening(session, lease(mine, tokens=3)))
        await call.write(feeding_ids((session, 0, (1,))))
        await call.write(generating(session))
        assert (await read(call)).opened.session == session
        await settled(lambda: len(running.replica.seen) == 3)
        await running.replica.links[0].write(generated((session, 1, (2, 3, 4))))
        assert (await read(call)).fed.ids.ids == ids(2, 3)
        assert (await read(call)).closed.code == LeaseSpent.code
        await settled(lambda: running.replica.seen[-1].close.session == session)
        await call.done_writing()
