"""The gateway between a real enclave-side channel and a scripted replica, over real mTLS sockets."""

from __future__ import annotations

import asyncio
import hashlib
import os
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog.testing
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_gateway.admission import Admission
from stip_gateway.config import GatewaySettings, Limits, ReplicaSettings
from stip_gateway.link import LinkSessions
from stip_gateway.replicas import Replicas
from stip_gateway.service import GatewayService
from stip_protocol import rpc
from stip_protocol.documents import Signed
from stip_protocol.errors import (
    ConfigurationError,
    Draining,
    FrameInvalid,
    InstanceRefused,
    LeaseExpired,
    LeaseForeign,
    LeaseMalformed,
    LeaseSpent,
    ManifestMismatch,
    Overloaded,
    ReplicaLost,
    StipError,
    TensorInvalid,
)
from stip_protocol.lease import Lease
from stip_protocol.runtime.config import load
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import model_pb2, model_pb2_grpc
from stip_stack.pki import Authority, Identity

INSTANCE, EPOCH, WIDTH = "ab" * 16, 3, 8
DIGEST = hashlib.sha256(b"manifest").digest()
SERVICE_KEY = Ed25519PrivateKey.generate()
AUDIENCE = "gateway.test"


def spki_digest(identity: Identity) -> bytes:
    public = x509.load_pem_x509_certificate(identity.certificate).public_key()
    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def lease(link_key: bytes, *, key: Ed25519PrivateKey = SERVICE_KEY, **changes: Any) -> bytes:
    now = int(time.time())
    fields: dict[str, Any] = {
        "handle": os.urandom(16),
        "serial": 0,
        "audience": AUDIENCE,
        "instance": INSTANCE,
        "epoch": EPOCH,
        "manifest_digest": DIGEST,
        "link_key": link_key,
        "not_before": now,
        "expires": now + 600,
        "tokens": 100,
        "audit_head": bytes(32),
    }
    return Signed.sign(Lease(**{**fields, **changes}), key).to_bytes()


def card() -> model_pb2.Card:
    return model_pb2.Card(
        version=1, instance=INSTANCE, epoch=EPOCH, manifest_digest=DIGEST, preset="hardened",
        dtype="float32", width=WIDTH, max_positions=64, max_sessions=4, max_rows=32,
    )  # fmt: skip


def rows(count: int, fill: float = 1.0) -> bytes:
    return struct.pack(f"<{count * WIDTH}f", *([fill] * count * WIDTH))


def opening(session: bytes, signed: bytes) -> model_pb2.Up:
    return model_pb2.Up(open=model_pb2.Open(session=session, lease=signed, output=model_pb2.OUTPUT_HIDDEN))


def feeding(*slices: tuple[bytes, int, int], data: bytes | None = None) -> model_pb2.Up:
    parts = [model_pb2.Slice(session=s, position=p, count=c, last=True) for s, p, c in slices]
    body = b"".join(rows(c, fill=float(i)) for i, (_, _, c) in enumerate(slices)) if data is None else data
    return model_pb2.Up(feed=model_pb2.Feed(slices=parts, rows=body))


@dataclass
class ScriptedReplica(model_pb2_grpc.ModelServicer):
    """Answers every slice with its own rows' first row, and remembers what it was handed."""

    seen: list[model_pb2.Up] = field(default_factory=list)
    break_off: grpc.StatusCode | None = None
    """How links end from now on."""
    card: model_pb2.Card = field(default_factory=lambda: card())
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it was asked for its card."""
    thinking: asyncio.Event | None = None
    """What it waits for before it answers that."""

    async def Describe(self, request: model_pb2.InstanceRef, context: Any) -> model_pb2.Card:  # noqa: N802
        self.asked.set()
        if self.thinking is not None:
            await self.thinking.wait()
        return self.card

    async def Link(self, requests: AsyncIterator[model_pb2.Up], context: Any) -> AsyncIterator[model_pb2.Down]:  # noqa: N802
        async for up in requests:
            self.seen.append(up)
            if self.break_off is not None:
                await context.abort(self.break_off, "gone")
            if up.HasField("open"):
                yield model_pb2.Down(opened=model_pb2.Opened(session=up.open.session))
            elif up.HasField("feed"):
                size = len(up.feed.rows) // sum(s.count for s in up.feed.slices)
                starts, at = [], 0
                for part in up.feed.slices:
                    starts.append(at * size)
                    at += part.count
                hidden = b"".join(up.feed.rows[start : start + size] for start in starts)
                yield model_pb2.Down(fed=model_pb2.Fed(slices=up.feed.slices, hidden=hidden))


@dataclass
class Running:
    """A gateway and its replica on loopback, and the identities to reach them."""

    service: GatewayService
    replica: ScriptedReplica
    address: str
    operator: Authority
    identity: Identity

    def channel(self, identity: Identity) -> grpc.aio.Channel:
        return rpc.channel(self.address, roots=self.operator.pem, identity=(identity.certificate, identity.private_key))

    def link(self, channel: grpc.aio.Channel, **metadata: str) -> Any:
        fields = {rpc.INSTANCE_KEY: INSTANCE, rpc.EPOCH_KEY: str(EPOCH), **metadata}
        return model_pb2_grpc.ModelStub(channel).Link(metadata=tuple(fields.items()))


LINK_CA = Authority("link CA of the tests")


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    operator = Authority("operator CA of the tests")
    front, back, inner = operator.issue("gateway"), operator.issue("replica"), operator.issue("gateway-client")
    replica = ScriptedReplica()
    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    model_pb2_grpc.add_ModelServicer_to_server(replica, server)
    port = server.add_secure_port(
        "127.0.0.1:0", rpc.server_credentials(back.certificate, back.private_key, client_ca=operator.pem)
    )
    await server.start()
    limits = Limits(sessions_per_link=3, links=2)
    replicas = Replicas(
        [ReplicaSettings(name="r0", address=f"127.0.0.1:{port}", instance=INSTANCE, epoch=EPOCH)],
        roots=operator.pem,
        identity=(inner.certificate, inner.private_key),
        limits=limits,
    )
    admission = Admission(key=SERVICE_KEY.public_key(), audience=AUDIENCE, limit=16)
    service = GatewayService(replicas, admission, limits, Telemetry("gateway", simulated=True))
    gateway = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(lambda error: None)], options=rpc.SERVER_OPTIONS)
    model_pb2_grpc.add_ModelServicer_to_server(service, gateway)
    gateway_port = gateway.add_secure_port(
        "127.0.0.1:0", rpc.server_credentials(front.certificate, front.private_key, client_ca=LINK_CA.pem)
    )
    await gateway.start()
    yield Running(service, replica, f"127.0.0.1:{gateway_port}", operator, LINK_CA.issue("ab12"))
    await gateway.stop(0)
    await server.stop(0)
    await replicas.close()


async def read(call: Any) -> model_pb2.Down:
    down = await asyncio.wait_for(call.read(), 10)
    assert down is not grpc.aio.EOF
    return down


async def failure(call: Any) -> StipError:
    """The error a link ended with."""

    async def to_the_end() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(to_the_end(), 10)
    return rpc.from_rpc(caught.value)


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


async def test_the_card_names_the_replicas_that_answer(running: Running) -> None:
    async with running.channel(running.identity) as channel:
        stub = model_pb2_grpc.ModelStub(channel)
        described = await stub.Describe(model_pb2.InstanceRef(instance=INSTANCE, epoch=EPOCH))
        assert list(described.replicas) == ["r0"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Describe(model_pb2.InstanceRef(instance=INSTANCE, epoch=EPOCH + 1))
        assert isinstance(rpc.from_rpc(caught.value), InstanceRefused)


FOREIGN = Authority("another link CA").issue("cd34")
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


async def test_more_sessions_than_the_limit_are_refused_with_retry(running: Running) -> None:
    mine = spki_digest(running.identity)
    async with running.channel(running.identity) as channel:
        call = running.link(channel)
        for _ in range(3):
            await call.write(opening(os.urandom(16), lease(mine)))
            assert (await read(call)).HasField("opened")
        await call.write(opening(os.urandom(16), lease(mine)))
        assert (await read(call)).closed.code == Overloaded.code
        await call.done_writing()


MALFORMED: dict[str, tuple[Callable[[bytes], model_pb2.Up], type[StipError]]] = {
    "bytes that do not match the counts": (lambda s: feeding((s, 0, 2), data=rows(1)), TensorInvalid),
    "no slice": (lambda s: model_pb2.Up(feed=model_pb2.Feed()), FrameInvalid),
    "a count beyond any frame": (lambda s: feeding((s, 0, 2**31), data=b""), FrameInvalid),
    "an empty envelope": (lambda s: model_pb2.Up(), FrameInvalid),
    "a short session handle": (lambda s: opening(b"x", b""), FrameInvalid),
    "a slice with an endless handle": (lambda s: feeding((s, 0, 1), (s * 9999, 0, 1)), FrameInvalid),
    "a recall with an endless handle": (
        lambda s: model_pb2.Up(recall=model_pb2.Recall(session=s * 9999)),
        FrameInvalid,
    ),
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


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_lost_replica_is_reported_as_such(running: Running, status: grpc.StatusCode) -> None:
    running.replica.break_off = status
    async with running.channel(running.identity) as channel:
        call = running.link(channel)
        await call.write(opening(os.urandom(16), lease(spki_digest(running.identity))))
        assert isinstance(await failure(call), ReplicaLost)


async def settled(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


async def stuffed(running: Running, channel: grpc.aio.Channel) -> Any:
    """A link whose enclave never reads, with an outbox that is full and stays full."""
    call = running.link(channel)

    async def write() -> None:
        while True:
            await call.write(feeding(*((os.urandom(16), 0, 1) for _ in range(256))))

    writing = asyncio.create_task(write())
    await settled(
        lambda: bool(running.service._links) and all(box._room.locked() for box in running.service._links.values())
    )
    # The outbox empties into the transport until that is full too: then nothing moves any more.
    for _ in range(20):
        await asyncio.sleep(0.02)
        await settled(lambda: all(box._room.locked() for box in running.service._links.values()))
    writing.cancel()
    return call


@pytest.fixture
def small_outbox(running: Running) -> Running:
    running.service._limits = running.service._limits.model_copy(update={"outbox": 16})
    return running


async def test_an_enclave_that_leaves_without_reading_leaves_no_link_behind(small_outbox: Running) -> None:
    running = small_outbox
    async with running.channel(running.identity) as channel:
        call = await stuffed(running, channel)
        call.cancel()
        await settled(lambda: not running.service._links)


async def test_draining_waits_for_no_reader_and_bears_links_that_end_meanwhile(small_outbox: Running) -> None:
    running, other = small_outbox, LINK_CA.issue("ef56")
    async with running.channel(running.identity) as mine, running.channel(other) as theirs:
        await stuffed(running, mine)
        call, session = running.link(theirs), os.urandom(16)
        await call.write(opening(session, lease(spki_digest(other))))
        await read(call)
        drained = asyncio.create_task(running.service.drain())
        assert (await read(call)).HasField("drain"), "a neighbour that does not read keeps nobody from knowing"
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


async def test_links_that_wait_for_their_replica_count_towards_the_limit(running: Running) -> None:
    running.replica.thinking = asyncio.Event()
    async with running.channel(running.identity) as channel:
        calls = [running.link(channel) for _ in range(4)]
        await asyncio.wait_for(running.replica.asked.wait(), 10)
        running.replica.thinking.set()
        await settled(lambda: len(running.service._links) == 2)
        ended = [call for call in calls if call.done()]
        for call in calls:
            call.cancel()
        assert len(ended) <= 2


BAD_CARDS: dict[str, model_pb2.Card] = {
    "another wire": model_pb2.Card(version=9, instance=INSTANCE, epoch=EPOCH, dtype="float32", width=1),
    "another epoch": model_pb2.Card(version=1, instance=INSTANCE, epoch=EPOCH + 1, dtype="float32", width=1),
    "an unknown dtype": model_pb2.Card(version=1, instance=INSTANCE, epoch=EPOCH, dtype="float8", width=1),
    "rows of nothing": model_pb2.Card(version=1, instance=INSTANCE, epoch=EPOCH, dtype="float32", width=0),
    "rows beyond any frame": model_pb2.Card(version=1, instance=INSTANCE, epoch=EPOCH, dtype="float32", width=2**31),
}


@pytest.mark.parametrize("name", BAD_CARDS)
async def test_a_replica_with_a_card_that_cannot_be_served_is_none(running: Running, name: str) -> None:
    running.replica.card = BAD_CARDS[name]
    async with running.channel(running.identity) as channel:
        assert isinstance(await failure(running.link(channel)), ReplicaLost)


async def test_a_replica_that_is_being_asked_again_still_takes_links(running: Running) -> None:
    [replica] = running.service._replicas._replicas
    await replica.describe(5)
    running.replica.thinking = asyncio.Event()
    asking = asyncio.create_task(replica.describe(5))
    async with running.channel(running.identity) as channel:
        call, session = running.link(channel), os.urandom(16)
        await call.write(opening(session, lease(spki_digest(running.identity))))
        assert (await read(call)).opened.session == session
        assert not asking.done()
        running.replica.thinking.set()
        await asking
        await call.done_writing()


async def test_a_replica_whose_manifest_changes_is_refused_for_good(running: Running) -> None:
    [replica] = running.service._replicas._replicas
    await replica.describe(5)
    running.replica.card.manifest_digest = bytes(32)
    for _ in range(2):
        with pytest.raises(ManifestMismatch):
            await replica.describe(5)
        assert replica.card is None


async def test_an_unknown_instance_or_a_missing_epoch_opens_no_link(running: Running) -> None:
    async with running.channel(running.identity) as channel:
        assert isinstance(await failure(running.link(channel, **{rpc.INSTANCE_KEY: "cd" * 16})), InstanceRefused)
        assert isinstance(await failure(running.link(channel, **{rpc.EPOCH_KEY: "x"})), FrameInvalid)


async def test_a_link_needs_a_certificate_of_the_link_ca(running: Running) -> None:
    async with running.channel(FOREIGN) as channel:
        assert await failure(running.link(channel))


async def test_draining_refuses_new_sessions_and_waits_for_the_open_one(running: Running) -> None:
    mine = spki_digest(running.identity)
    async with running.channel(running.identity) as channel:
        call, session = running.link(channel), os.urandom(16)
        await call.write(opening(session, lease(mine)))
        await read(call)
        drained = asyncio.create_task(running.service.drain())
        assert (await read(call)).HasField("drain")
        await call.write(opening(os.urandom(16), lease(mine)))
        assert (await read(call)).closed.code == "draining"
        await call.write(feeding((session, 0, 1)))
        assert (await read(call)).HasField("fed")
        assert not drained.done()
        await call.write(model_pb2.Up(close=model_pb2.Close(session=session)))
        assert await asyncio.wait_for(call.read(), 10) is grpc.aio.EOF
        await asyncio.wait_for(drained, 10)


def test_a_session_can_be_followed_through_the_log_by_its_request_id_and_nothing_else() -> None:
    admission = Admission(key=SERVICE_KEY.public_key(), audience=AUDIENCE, limit=2)
    link = LinkSessions(card(), admission, link_key=bytes(32), sessions=2, slices=8)
    session, request_id = os.urandom(16), os.urandom(16).hex()
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


def test_what_a_hostile_replica_says_of_sessions_it_never_had_is_not_kept() -> None:
    admission = Admission(key=SERVICE_KEY.public_key(), audience=AUDIENCE, limit=2)
    link = LinkSessions(card(), admission, link_key=bytes(32), sessions=2, slices=8)
    for _ in range(3):
        link.down(model_pb2.Down(closed=model_pb2.Closed(session=os.urandom(1 << 20))))
    assert not link._ended


def test_rows_that_were_under_way_when_their_session_was_closed_are_passed_over() -> None:
    admission = Admission(key=SERVICE_KEY.public_key(), audience=AUDIENCE, limit=2)
    link = LinkSessions(card(), admission, link_key=bytes(32), sessions=2, slices=8)
    session = os.urandom(16)
    link.up(opening(session, lease(bytes(32))))
    link.up(model_pb2.Up(close=model_pb2.Close(session=session)))
    passed = link.up(feeding((session, 0, 1)))
    assert (passed.answers, passed.onward, passed.rows) == ([], [], 0)


def test_lease_accounts_are_bounded_and_expired_ones_make_room() -> None:
    clock = [1000.0]
    admission = Admission(key=SERVICE_KEY.public_key(), audience=AUDIENCE, limit=2, clock=lambda: clock[0])

    def admit(expires: int) -> None:
        signed = lease(bytes(32), not_before=0, expires=expires)
        admission.open(signed, instance=INSTANCE, epoch=EPOCH, manifest_digest=DIGEST, link_key=bytes(32))

    admit(1100)
    admit(1200)
    with pytest.raises(Overloaded):
        admit(1300)
    clock[0] = 1150
    admit(1300)


def test_a_lease_that_expires_while_a_session_runs_stops_it() -> None:
    clock = [1000.0]
    admission = Admission(key=SERVICE_KEY.public_key(), audience=AUDIENCE, limit=2, clock=lambda: clock[0])
    link = LinkSessions(card(), admission, link_key=bytes(32), sessions=2, slices=8)
    session = os.urandom(16)
    link.up(opening(session, lease(bytes(32), not_before=0, expires=1100)))
    assert link.up(feeding((session, 0, 1))).rows == 1
    clock[0] = 1100
    passed = link.up(feeding((session, 1, 1)))
    assert passed.answers[0].closed.code == LeaseExpired.code
    assert passed.onward[0].close.session == session
    assert link.sessions == 0


def test_settings_with_two_replicas_of_one_name_are_refused(tmp_path: Path) -> None:
    row = f'[[replicas]]\nname = "a"\naddress = "h:1"\ninstance = "{INSTANCE}"\nepoch = 0\n'
    names = ("service_key", "link_ca", "certificate", "private_key", "replica_ca", "replica_certificate")
    paths = "".join(f'{name} = "x"\n' for name in (*names, "replica_private_key"))
    (tmp_path / "gateway.toml").write_text(f'audience = "g"\n{paths}{row}{row}')
    with pytest.raises(ConfigurationError, match="same name"):
        load(GatewaySettings, tmp_path / "gateway.toml")
