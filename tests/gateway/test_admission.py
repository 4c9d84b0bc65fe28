"""Leases at the door: who may open a session, how far it may go, and what the log says of it."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import structlog.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from stip_gateway.admission import Admission, account_tag
from stip_protocol.errors import (
    LeaseExpired,
    LeaseForeign,
    LeaseMalformed,
    LeaseSpent,
    Overloaded,
    SessionUnknown,
    StipError,
)
from stip_protocol.wire import model_pb2
from tests.gateway.running import FOREIGN, LINK_CA, Running, failure, read
from tests.gateway.wire import (
    AUDIENCE,
    DIGEST,
    EPOCH,
    INSTANCE,
    SERVICE_KEY,
    feeding,
    lease,
    link_sessions,
    opened,
    opening,
    rows,
    spki_digest,
)


async def test_a_leased_session_reaches_the_replica_without_its_lease(running: Running) -> None:
    async with running.channel(running.identity) as channel:
        call, session = running.link(channel), os.urandom(16)
        await call.write(opening(session, lease(spki_digest(running.identity))))
        await call.write(feeding((session, 0, 2)))
        assert (await read(call)).opened.session == session
        fed = (await read(call)).fed
        assert fed.slices[0].session == session
        assert fed.hidden == rows(1, 0.0)
        assert running.replica.seen[0].open.lease == b""
        await call.done_writing()


BAD_LEASES: dict[str, tuple[dict[str, Any], type[StipError]]] = {
    "another audience": ({"audience": "other"}, LeaseForeign),
    "another instance": ({"instance": "cd" * 16}, LeaseForeign),
    "another epoch": ({"epoch": EPOCH + 1}, LeaseForeign),
    "another manifest": ({"manifest_digest": bytes(32)}, LeaseForeign),
    "another link's certificate": ({"link_key": spki_digest(FOREIGN)}, LeaseForeign),
    "another key service": ({"key": Ed25519PrivateKey.generate()}, LeaseForeign),
    "an expired lease": ({"expires": int(time.time()) - 1}, LeaseExpired),
    "a lease from the future": ({"not_before": int(time.time()) + 3600}, LeaseExpired),
}


@pytest.mark.parametrize("name", BAD_LEASES)
async def test_a_bad_lease_is_refused_and_its_neighbour_goes_on(running: Running, name: str) -> None:
    changes, expected = dict(BAD_LEASES[name][0]), BAD_LEASES[name][1]
    mine = spki_digest(running.identity)
    async with running.channel(running.identity) as channel:
        call, good, bad = running.link(channel), os.urandom(16), os.urandom(16)
        await call.write(opening(good, lease(mine)))
        await read(call)
        await call.write(opening(bad, lease(changes.pop("link_key", mine), **changes)))
        closed = (await read(call)).closed
        assert (closed.session, closed.code) == (bad, expected.code)
        await call.write(feeding((bad, 0, 1), (good, 0, 1)))
        fed = (await read(call)).fed
        assert [part.session for part in fed.slices] == [good]
        assert fed.hidden == rows(1, 1.0), "the kept slice must carry its own rows"
        await call.done_writing()


async def test_a_malformed_lease_is_refused(running: Running) -> None:
    async with running.channel(running.identity) as channel:
        call, session = running.link(channel), os.urandom(16)
        await call.write(opening(session, b"not a lease"))
        assert (await read(call)).closed.code == LeaseMalformed.code
        await call.done_writing()


async def test_a_spent_lease_closes_its_session_at_gateway_and_replica_until_it_is_renewed(running: Running) -> None:
    mine, handle = spki_digest(running.identity), os.urandom(16)
    async with running.channel(running.identity) as channel:
        call, first, second = running.link(channel), os.urandom(16), os.urandom(16)
        await call.write(opening(first, lease(mine, handle=handle, tokens=3)))
        await call.write(feeding((first, 0, 3)))
        await read(call), await read(call)
        await call.write(feeding((first, 3, 1)))
        assert (await read(call)).closed.code == LeaseSpent.code
        await call.write(model_pb2.Up(renew=model_pb2.Renew(lease=lease(mine, handle=handle, tokens=5, serial=1))))
        await call.write(opening(second, lease(mine, handle=handle, tokens=3)))
        await call.write(feeding((second, 0, 2)))
        assert (await read(call)).opened.session == second
        assert (await read(call)).fed.slices[0].session == second
        assert any(up.HasField("close") and up.close.session == first for up in running.replica.seen)
        await call.done_writing()


async def test_another_links_session_is_unknown_here(running: Running) -> None:
    other = LINK_CA.issue("ef56")
    async with running.channel(running.identity) as mine, running.channel(other) as theirs:
        call, session = running.link(mine), os.urandom(16)
        await call.write(opening(session, lease(spki_digest(running.identity))))
        await read(call)
        intruder = running.link(theirs)
        await intruder.write(feeding((session, 0, 1)))
        assert (await read(intruder)).closed.code == "session_unknown"
        await call.write(feeding((session, 0, 1)))
        assert (await read(call)).fed.slices[0].session == session
        await call.done_writing()
        await intruder.done_writing()


async def test_a_link_needs_a_certificate_of_the_link_ca(running: Running) -> None:
    async with running.channel(FOREIGN) as channel:
        assert await failure(running.link(channel))


def test_a_replica_sees_sessions_of_one_lease_under_one_name_that_is_not_the_leases() -> None:
    link, handle = link_sessions(sessions=3), os.urandom(16)
    names = []
    for own in (handle, handle, os.urandom(16)):
        up = opening(os.urandom(16), lease(bytes(32), handle=own))
        up.open.account = b"whatever the enclave says"
        [onward] = link.up(up).up
        names.append(onward.open.account)
    assert names[0] == names[1] == account_tag(handle)
    assert names[2] != names[0]
    assert len(names[0]) == 16
    assert handle not in names


def test_the_name_of_an_account_is_the_digest_of_its_handle_in_a_context_of_its_own() -> None:
    assert account_tag(bytes(16)).hex() == "0b606a06597a25099f0414a1e2487df7"


def test_rows_that_were_under_way_when_their_session_was_closed_are_passed_over() -> None:
    link = link_sessions()
    session = opened(link)
    link.up(model_pb2.Up(close=model_pb2.Close(session=session)))
    passed = link.up(feeding((session, 0, 1)))
    assert (passed.down, passed.up, passed.rows) == ([], [], 0)


def test_lease_accounts_are_bounded_and_expired_ones_make_room() -> None:
    clock = [1000.0]
    admission = Admission(key=SERVICE_KEY.public_key(), audience=AUDIENCE, limit=2, clock=lambda: clock[0])

    def admit(expires: int) -> None:
        signed = lease(bytes(32), not_before=0, expires=expires)
        admission.open(signed, instance=INSTANCE, epoch=EPOCH, manifest_digest=DIGEST, link_key=bytes(32))

    admit(1100)
    admit(1200)
    with pytest.raises(Overloaded) as refused:
        admit(1300)
    assert refused.value.retry_after == 100, "when the first of them expires"
    clock[0] = 1150
    admit(1300)


def test_a_lease_that_expires_while_a_session_runs_stops_it() -> None:
    clock = [1000.0]
    link = link_sessions(clock=lambda: clock[0])
    session = opened(link, not_before=0, expires=1100)
    assert link.up(feeding((session, 0, 1))).rows == 1
    clock[0] = 1100
    passed = link.up(feeding((session, 1, 1)))
    assert passed.down[0].closed.code == LeaseExpired.code
    assert passed.up[0].close.session == session
    assert link.sessions == 0


def test_an_enclave_cannot_fill_the_log_with_sessions_that_nobody_opened() -> None:
    link = link_sessions()
    with structlog.testing.capture_logs() as lines:
        passed = link.up(feeding(*((os.urandom(16), 0, 1) for _ in range(8))))
    assert passed.refusals == [SessionUnknown.code] * 8, "they are counted"
    assert [down.closed.code for down in passed.down] == passed.refusals
    assert lines == []


@pytest.mark.parametrize(("said", "logged"), [("overloaded", "overloaded"), ("x" * 9999, "unknown")])
def test_a_replica_cannot_write_into_the_log(said: str, logged: str) -> None:
    link = link_sessions()
    closed = model_pb2.Down(closed=model_pb2.Closed(session=opened(link), code=said))
    with structlog.testing.capture_logs() as lines:
        assert link.down(closed).down == [closed]
    assert [line["code"] for line in lines] == [logged]


def test_a_session_can_be_followed_through_the_log_by_its_request_id_and_nothing_else() -> None:
    link, session, request_id = link_sessions(), os.urandom(16), os.urandom(16).hex()
    with structlog.testing.capture_logs() as lines:
        up = opening(session, lease(bytes(32), tokens=1))
        up.open.request_id = request_id
        link.up(up)
        link.up(feeding((session, 0, 2)))
    assert [(line["event"], line["request_id"]) for line in lines] == [
        ("session opened", request_id),
        ("refused", request_id),
        ("session ended", request_id),
    ]
    assert session.hex() not in repr(lines)
