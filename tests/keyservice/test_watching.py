"""Watch streams over real sockets: an enclave hears at once what ends its leases, and nothing of anybody else's."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from stip_keyservice.service import instances, revocations, users
from stip_keyservice.service.config import Limits
from stip_keyservice.service.server import KeyServiceServicer
from stip_keyservice.service.state.schema import audit, spent_nonces
from stip_keyservice.service.streams import Streams
from stip_keyservice.service.watching import Standing, changes
from stip_protocol.documents import Signed
from stip_protocol.errors import Overloaded, Unavailable
from stip_protocol.lease import Lease
from stip_protocol.release import HANDLES_LIMIT, Notice, Watch, sign_watch
from stip_protocol.wire import keyservice_pb2

from .conftest import START, Enclave, MadeInstance, Person, Serve, World, refusal

WAIT_SECONDS = 20
"""A deadline for what should take half a second: the machine may be busy."""


class Stream:
    """One open watch, read as an enclave reads it."""

    def __init__(self, world: World, call: Any, nonce: bytes) -> None:
        self._world, self.call, self._nonce, self._next = world, call, nonce, 0

    async def notice(self) -> Notice:
        """The next notice; its signature, nonce and sequence hold."""
        reply = await asyncio.wait_for(self.call.read(), WAIT_SECONDS)
        assert reply is not grpc.aio.EOF
        found = Signed.from_bytes(reply.notice).open(Notice, self._world.home.service.public_key())
        assert (found.nonce, found.sequence) == (self._nonce, self._next)
        self._next += 1
        return found

    async def ended(self) -> bool:
        """Whether the stream ends here, without an error."""
        reply = await asyncio.wait_for(self.call.read(), WAIT_SECONDS)
        return reply is grpc.aio.EOF and await self.call.code() is grpc.StatusCode.OK


def request(watch: Watch, enclave: Enclave, *, link_key: bytes | None = None) -> keyservice_pb2.WatchRequest:
    return keyservice_pb2.WatchRequest(
        watch=watch.to_bytes(), signature=sign_watch(watch, enclave.link), link_key=link_key or enclave.link_spki
    )


async def asked(world: World, enclave: Enclave, **other: Any) -> Watch:
    fields = {"nonce": (await world.challenge()).nonce, "link_key": hashlib.sha256(enclave.link_spki).digest()}
    return Watch.model_validate(fields | other)


@asynccontextmanager
async def watching(world: World, enclave: Enclave) -> AsyncIterator[Stream]:
    watch = await asked(world, enclave)
    call = world.stub.Watch(request(watch, enclave))
    stream = Stream(world, call, watch.nonce)
    try:
        assert (await stream.notice()).kind == "watching"
        yield stream
    finally:
        call.cancel()


async def refused(call: Any) -> str:
    """The stable code that a stream is refused with before its first notice."""
    return await refusal(call.read())


class Scene:
    """Alice and Bob on a shared instance, each with an enclave of their own that runs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.alice, self.bob = world.person("alice"), world.person("bob")
        self.instance: MadeInstance = world.instance(members=(self.alice, self.bob))
        self.enclave, self.other = world.enclave(), world.enclave()

    async def lease(self, enclave: Enclave, person: Person) -> Lease:
        _, lease = await self.world.bundle(enclave, person, self.instance.id)
        return lease

    def revoke(self, kind: revocations.Kind, subject: str) -> int:
        with self.world.store.write() as db:
            made, _ = revocations.revoke(db, kind, subject, reason="a test", now=START)
        return made.number


@pytest.fixture
def scene(world: World) -> Scene:
    return Scene(world)


async def test_a_revoked_user_is_heard_by_their_enclave_alone(scene: Scene) -> None:
    lease, other = await scene.lease(scene.enclave, scene.alice), await scene.lease(scene.other, scene.bob)
    async with watching(scene.world, scene.enclave) as mine, watching(scene.world, scene.other) as theirs:
        scene.revoke("user", scene.world.user(scene.alice).id)
        heard = await mine.notice()
        assert (heard.kind, heard.handles, heard.instance, heard.epoch) == ("revoked", (lease.handle,), None, None)
        scene.revoke("user", scene.world.user(scene.bob).id)
        # the first that Bob's enclave hears is of its own lease: Alice's went by without a word
        assert (await theirs.notice()).handles == (other.handle,)
    assert await refusal(scene.world.renew(scene.enclave, lease, fed=1, wanted=1)) == "lease_revoked"


async def test_one_link_key_hears_only_of_the_leases_that_ended(scene: Scene) -> None:
    hers, his = await scene.lease(scene.enclave, scene.alice), await scene.lease(scene.enclave, scene.bob)
    async with watching(scene.world, scene.enclave) as stream:
        scene.revoke("user", scene.world.user(scene.alice).id)
        assert (await stream.notice()).handles == (hers.handle,)
        with scene.world.store.write() as db:
            users.disable(db, "bob", now=START)
        assert (await stream.notice()).handles == (his.handle,)


async def test_a_revoked_instance_is_named_so_that_its_grant_goes(scene: Scene) -> None:
    lease = await scene.lease(scene.enclave, scene.alice)
    async with watching(scene.world, scene.enclave) as stream:
        scene.revoke("instance", scene.instance.id)
        heard = await stream.notice()
        assert (heard.kind, heard.handles) == ("revoked", (lease.handle,))
        assert (heard.instance, heard.epoch) == (scene.instance.id, None)


async def test_a_revoked_epoch_is_named_with_its_number(scene: Scene) -> None:
    lease = await scene.lease(scene.enclave, scene.alice)
    async with watching(scene.world, scene.enclave) as stream:
        scene.revoke("epoch", revocations.epoch_subject(scene.instance.id, 0))
        heard = await stream.notice()
        assert (heard.handles, heard.instance, heard.epoch) == ((lease.handle,), scene.instance.id, 0)


async def test_a_removed_instance_is_heard_without_a_revocation(scene: Scene) -> None:
    lease = await scene.lease(scene.enclave, scene.alice)
    async with watching(scene.world, scene.enclave) as stream:
        with scene.world.store.write() as db:
            instances.remove(db, scene.world.vault, scene.instance.id, now=START)
        heard = await stream.notice()
        assert (heard.handles, heard.instance, heard.epoch) == ((lease.handle,), scene.instance.id, None)


async def test_what_ended_while_nobody_watched_is_told_to_who_comes_back(scene: Scene) -> None:
    lease = await scene.lease(scene.enclave, scene.alice)
    async with watching(scene.world, scene.enclave):
        pass
    scene.revoke("enclave", scene.enclave.tls_key.hex())
    async with watching(scene.world, scene.enclave) as stream:
        assert (await stream.notice()).handles == (lease.handle,)


async def test_what_another_replica_revoked_is_heard_as_well(serve: Serve) -> None:
    async with serve() as here, serve() as there:
        scene = Scene(here)
        lease = await scene.lease(scene.enclave, scene.alice)
        async with watching(there, scene.enclave) as stream:
            scene.revoke("measurement", scene.enclave.measurement.hex())
            assert (await stream.notice()).handles == (lease.handle,)


async def test_more_leases_than_one_notice_holds_come_in_several(scene: Scene) -> None:
    found = Standing(ended={number.to_bytes(16, "big"): ("0" * 32, 0) for number in range(HANDLES_LIMIT + 1)})
    told = [*changes(Standing(), found)]
    assert [len(change.handles) for change in told] == [HANDLES_LIMIT, 1]
    assert {handle for change in told for handle in change.handles} == found.ended.keys()


places = st.tuples(st.sampled_from(["a" * 32, "b" * 32]), st.none() | st.integers(0, 2))
handles = st.binary(min_size=16, max_size=16)
standings = st.builds(
    Standing,
    ended=st.dictionaries(handles, st.tuples(st.sampled_from(["a" * 32, "b" * 32]), st.integers(0, 2)), max_size=5),
    superseded=st.frozensets(handles, max_size=5),
    closed=st.frozensets(places, max_size=4),
)


@given(told=standings, found=standings)
def test_notices_tell_exactly_what_was_not_told_before(told: Standing, found: Standing) -> None:
    notices = [change.notice(bytes(32), number) for number, change in enumerate(changes(told, found), 1)]
    ended = [handle for notice in notices if notice.kind == "revoked" for handle in notice.handles]
    assert sorted(ended) == sorted(found.ended.keys() - told.ended.keys())
    superseded = [handle for notice in notices if notice.kind == "superseded" for handle in notice.handles]
    assert sorted(superseded) == sorted(found.superseded - told.superseded)
    named = {(notice.instance, notice.epoch) for notice in notices if notice.instance is not None}
    assert found.closed - told.closed <= named <= found.closed
    assert not [*changes(found, found)]


async def test_a_watch_is_refused_with(scene: Scene) -> None:
    world, stub = scene.world, scene.world.stub
    await scene.lease(scene.enclave, scene.alice)
    watch = await asked(world, scene.enclave)
    forged = keyservice_pb2.WatchRequest(
        watch=watch.to_bytes(), signature=sign_watch(watch, scene.other.link), link_key=scene.enclave.link_spki
    )
    assert await refused(stub.Watch(forged)) == "signature_invalid"
    # its own key under another's name
    assert await refused(stub.Watch(request(watch, scene.other))) == "signature_invalid"
    stranger = world.enclave()
    assert await refused(stub.Watch(request(await asked(world, stranger), stranger))) == "lease_foreign"
    for nonce in (bytes(32), secrets.token_bytes(32)):
        assert await refused(stub.Watch(request(await asked(world, scene.enclave, nonce=nonce), scene.enclave))) == (
            "nonce_refused"
        )
    late = await asked(world, scene.enclave)
    world.clock.now += 60
    assert await refused(stub.Watch(request(late, scene.enclave))) == "nonce_refused"
    assert await refused(stub.Watch(request(watch, scene.enclave, link_key=bytes(91)))) == "request_invalid"
    assert await refused(stub.Watch(keyservice_pb2.WatchRequest(watch=bytes(2000)))) == "frame_invalid"
    garbled = keyservice_pb2.WatchRequest(watch=b"\xa0", signature=b"", link_key=scene.enclave.link_spki)
    assert await refused(stub.Watch(garbled)) == "signature_invalid"


async def test_strangers_who_ask_to_watch_write_nothing(scene: Scene) -> None:
    stranger = scene.world.enclave()

    def written() -> tuple[int, int]:
        with scene.world.store.read() as db:
            return len(db.execute(select(spent_nonces)).all()), len(db.execute(select(audit)).all())

    before = written()
    watch = request(await asked(scene.world, stranger), stranger)
    for _ in range(3):
        assert await refused(scene.world.stub.Watch(watch)) == "lease_foreign"
    assert written() == before


async def test_what_was_lifted_and_is_revoked_again_is_told_again(scene: Scene) -> None:
    first = await scene.lease(scene.enclave, scene.alice)
    async with watching(scene.world, scene.enclave) as stream:
        number = scene.revoke("instance", scene.instance.id)
        heard = await stream.notice()
        assert (heard.handles, heard.instance) == ((first.handle,), scene.instance.id)
        with scene.world.store.write() as db:
            revocations.lift(db, number, now=START)
        second = await scene.lease(scene.enclave, scene.bob)
        scene.revoke("instance", scene.instance.id)
        heard = await stream.notice()
        assert (heard.handles, heard.instance) == ((second.handle,), scene.instance.id)


async def test_a_captured_watch_opens_no_second_stream(scene: Scene) -> None:
    await scene.lease(scene.enclave, scene.alice)
    watch = request(await asked(scene.world, scene.enclave), scene.enclave)
    first = scene.world.stub.Watch(watch)
    await first.read()
    assert await refused(scene.world.stub.Watch(watch)) == "nonce_refused"
    first.cancel()


async def test_the_oldest_stream_of_a_link_key_ends_where_one_too_many_comes(scene: Scene) -> None:
    lease = await scene.lease(scene.enclave, scene.alice)
    async with (
        watching(scene.world, scene.enclave) as first,
        watching(scene.world, scene.enclave) as second,
        watching(scene.world, scene.enclave) as third,
    ):
        assert await first.ended()
        scene.revoke("user", scene.world.user(scene.alice).id)
        for stream in (second, third):
            assert (await stream.notice()).handles == (lease.handle,)


async def test_draining_ends_a_stream_without_an_error_and_refuses_the_next(scene: Scene) -> None:
    await scene.lease(scene.enclave, scene.alice)
    servicer: KeyServiceServicer = scene.world.servicer
    async with watching(scene.world, scene.enclave) as stream:
        watch = request(await asked(scene.world, scene.enclave), scene.enclave)
        await servicer.streams.close()
        assert await stream.ended()
        assert await refused(scene.world.stub.Watch(watch)) == "draining"


async def test_a_stream_that_does_not_read_keeps_the_last_look_alone() -> None:
    looks, enough, loop = 0, asyncio.Event(), asyncio.get_running_loop()

    def look(link_keys: Collection[bytes]) -> dict[bytes, Standing]:
        nonlocal looks
        looks += 1
        if looks == 4:
            loop.call_soon_threadsafe(enough.set)
        return {key: Standing(superseded=frozenset({looks.to_bytes(16, "big")})) for key in link_keys}

    streams = Streams(look, Limits())
    async with aclosing(streams.changes(bytes(32))) as changes:
        assert (await anext(changes))[1].kind == "watching"
        await asyncio.wait_for(enough.wait(), WAIT_SECONDS)
        sequence, change = await anext(changes)
        assert sequence == 1
        assert [int.from_bytes(handle, "big") for handle in change.handles] >= [3]
    await streams.close()


async def test_a_process_has_no_more_streams_than_its_limit_and_counts_them() -> None:
    seen: list[int] = []
    streams = Streams(lambda link_keys: {}, Limits(watches=2), observe=seen.append)
    async with aclosing(streams.changes(b"a")) as first, aclosing(streams.changes(b"b")) as second:
        await anext(first)
        await anext(second)
        with pytest.raises(Overloaded):
            await anext(streams.changes(b"c"))
    assert seen == [1, 2, 1, 0]
    async with aclosing(streams.changes(b"c")) as third:
        await anext(third)
    await streams.close()


async def test_one_link_key_cannot_fill_the_process_with_streams_that_it_does_not_read() -> None:
    streams = Streams(lambda link_keys: {}, Limits(watches_per_key=2))
    lingering = [streams.changes(b"a") for _ in range(4)]
    for stream in lingering:  # the first two are ended by the others, and linger until they are read
        await anext(stream)
    with pytest.raises(Overloaded):
        await anext(streams.changes(b"a"))
    for ended in lingering[:2]:
        with pytest.raises(StopAsyncIteration):
            await anext(ended)
    await streams.close()
    for ended in lingering[2:]:
        with pytest.raises(StopAsyncIteration):
            await anext(ended)


async def test_streams_stay_open_while_the_state_cannot_be_read() -> None:
    failures = 2

    def look(link_keys: Collection[bytes]) -> dict[bytes, Standing]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise Unavailable("state: the database is busy or cannot be written")
        return {key: Standing(ended={bytes(16): ("0" * 32, 0)}) for key in link_keys}

    streams = Streams(look, Limits())
    async with aclosing(streams.changes(bytes(32))) as changes:
        assert [(await anext(changes))[1].kind, (await anext(changes))[1].kind] == ["watching", "revoked"]
    await streams.close()
