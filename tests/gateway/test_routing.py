"""Which replica a link goes to: one that answers, takes links, and has the least to do."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import structlog.testing

from stip_gateway.config import GatewaySettings
from stip_protocol import rpc
from stip_protocol.errors import (
    ConfigurationError,
    Draining,
    FrameInvalid,
    InstanceRefused,
    ManifestMismatch,
    ReplicaLost,
)
from stip_protocol.runtime.config import load
from stip_protocol.wire import model_pb2, model_pb2_grpc
from tests.gateway.running import Running, failure, read, settled
from tests.gateway.wire import EPOCH, INSTANCE, lease, opening, spki_digest


async def described(running: Running, channel: grpc.aio.Channel, epoch: int = EPOCH) -> list[str]:
    stub: Any = model_pb2_grpc.ModelStub(channel)
    card = await stub.Describe(model_pb2.InstanceRef(instance=INSTANCE, epoch=epoch))
    return list(card.replicas)


async def linked(running: Running, channel: grpc.aio.Channel, **metadata: str) -> Any:
    """A link with one open session."""
    call = running.link(channel, **metadata)
    await call.write(opening(os.urandom(16), lease(spki_digest(running.identity))))
    assert (await read(call)).HasField("opened")
    return call


def links(running: Running) -> list[int]:
    return [len(script.links) for script in running.scripts]


async def test_the_card_names_the_replicas_that_answer(pair: Running) -> None:
    await asyncio.gather(*(pair.route(number).describe(5) for number in range(2)))
    async with pair.channel(pair.identity) as channel:
        assert await described(pair, channel) == ["r0", "r1"]
        pair.routes.lost(pair.route(0))
        assert await described(pair, channel) == ["r1"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await described(pair, channel, epoch=EPOCH + 1)
        assert isinstance(rpc.from_rpc(caught.value), InstanceRefused)


async def test_links_go_in_turns_to_replicas_that_have_equally_little_to_do(pair: Running) -> None:
    async with pair.channel(pair.identity) as channel:
        calls = [pair.link(channel) for _ in range(4)]
        await settled(lambda: links(pair) == [2, 2])
        assert not any(call.done() for call in calls)


async def test_a_link_goes_where_the_fewest_sessions_are_counting_those_of_other_gateways(pair: Running) -> None:
    pair.scripts[0].load = 5
    await asyncio.gather(*(pair.route(number).describe(5) for number in range(2)))
    async with pair.channel(pair.identity) as channel:
        await linked(pair, channel, **{rpc.REPLICA_KEY: "r0"})
        for _ in range(4):
            await linked(pair, channel)
        assert links(pair) == [1, 4], "until r1 has more sessions of ours than r0 of anybody"
        assert pair.route(0).load == (5, 1)


async def test_a_link_may_name_its_replica(pair: Running) -> None:
    async with pair.channel(pair.identity) as channel:
        for _ in range(3):
            await linked(pair, channel, **{rpc.REPLICA_KEY: "r1"})
        assert links(pair) == [0, 3]
        assert isinstance(await failure(pair.link(channel, **{rpc.REPLICA_KEY: "r9"})), InstanceRefused)


async def test_a_replica_that_drains_keeps_its_links_and_gets_no_new_ones(pair: Running) -> None:
    async with pair.channel(pair.identity) as channel:
        call = await linked(pair, channel, **{rpc.REPLICA_KEY: "r0"})
        await pair.scripts[0].links[0].write(model_pb2.Down(drain=model_pb2.Drain(seconds=20)))
        assert (await read(call)).drain.seconds == 20, "the enclave knows as well"
        for _ in range(2):
            await linked(pair, channel)
        assert links(pair) == [1, 2]
        assert await described(pair, channel) == ["r1"]
        assert isinstance(await failure(pair.link(channel, **{rpc.REPLICA_KEY: "r0"})), Draining)
        assert not call.done()
        pair.now[0] = 20
        assert await described(pair, channel) == ["r0", "r1"]


async def test_a_replica_that_repeats_that_it_drains_is_logged_once(pair: Running) -> None:
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            pair.routes.drains(pair.route(0), 20)
        pair.now[0] = 20
        pair.routes.drains(pair.route(0), 20)
    assert [line["event"] for line in lines] == ["replica drains"] * 2, "again once it had been tried again"


async def test_a_replica_that_refuses_a_link_because_it_drains_is_not_asked_again_at_once(pair: Running) -> None:
    pair.scripts[0].refuse = Draining("this replica takes no new links", retry_after=20)
    async with pair.channel(pair.identity) as channel:
        error = await failure(pair.link(channel, **{rpc.REPLICA_KEY: "r0"}))
        assert isinstance(error, Draining)
        assert error.retry_after == 20
        assert await described(pair, channel) == ["r1"]


async def test_where_all_replicas_drain_one_is_told_when_to_come_back(pair: Running) -> None:
    async with pair.channel(pair.identity) as channel:
        for number in range(2):
            await pair.route(number).describe(5)
            pair.routes.drains(pair.route(number), 20)
        error = await failure(pair.link(channel))
        assert isinstance(error, Draining)
        assert error.retry_after == 0.2


async def test_a_replica_that_died_gets_no_link_from_that_moment_and_links_again_when_it_is_back(pair: Running) -> None:
    async with pair.channel(pair.identity) as channel:
        call = await linked(pair, channel, **{rpc.REPLICA_KEY: "r0"})
        port = await pair.kill(0)
        assert isinstance(await failure(call), ReplicaLost)
        assert await described(pair, channel) == ["r1"], "nobody had to ask the dead one first"
        await linked(pair, channel)
        error = await failure(pair.link(channel, **{rpc.REPLICA_KEY: "r0"}))
        assert isinstance(error, ReplicaLost)
        assert error.retry_after == 0.2
        await pair.revive(0, port)
        refreshing = asyncio.create_task(pair.routes.refresh())
        await settled(lambda: pair.route(0).card is not None)
        refreshing.cancel()
        await linked(pair, channel, **{rpc.REPLICA_KEY: "r0"})


async def test_a_lost_replica_is_asked_again_without_waiting_for_the_next_round(running: Running) -> None:
    refreshing = asyncio.create_task(running.routes.refresh())
    await settled(lambda: running.route(0).card is not None)
    running.replica.asked.clear()
    running.routes.lost(running.route(0))
    assert running.route(0).card is None
    await asyncio.wait_for(running.replica.asked.wait(), 3)  # a round takes five seconds
    await settled(lambda: running.route(0).card is not None)
    refreshing.cancel()


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_lost_replica_is_reported_as_such(running: Running, status: grpc.StatusCode) -> None:
    running.replica.break_off = status
    async with running.channel(running.identity) as channel:
        call = running.link(channel)
        await call.write(opening(os.urandom(16), lease(spki_digest(running.identity))))
        assert isinstance(await failure(call), ReplicaLost)
        assert running.route(0).card is None


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
    await running.route(0).describe(5)
    running.replica.thinking = asyncio.Event()
    asking = asyncio.create_task(running.route(0).describe(5))
    async with running.channel(running.identity) as channel:
        await linked(running, channel)
        assert not asking.done()
        running.replica.thinking.set()
        await asking


async def test_callers_who_all_wait_for_one_replica_ask_it_once(running: Running) -> None:
    running.replica.thinking = asyncio.Event()
    async with running.channel(running.identity) as channel:
        first = asyncio.ensure_future(described(running, channel))
        await asyncio.wait_for(running.replica.asked.wait(), 10)
        asking = [asyncio.ensure_future(described(running, channel)) for _ in range(30)]
        with pytest.raises(grpc.aio.AioRpcError):
            await described(running, channel, epoch=EPOCH + 1)  # came after the thirty
        first.cancel()
        running.replica.thinking.set()
        assert await asyncio.wait_for(asyncio.gather(*asking), 10) == [["r0"]] * 30, "whoever came first has left"
        assert running.replica.times_asked == 1


async def test_a_replica_whose_manifest_changes_is_refused_for_good(running: Running) -> None:
    await running.route(0).describe(5)
    running.replica.card.manifest_digest = bytes(32)
    for _ in range(2):
        with pytest.raises(ManifestMismatch):
            await running.route(0).describe(5)
        assert running.route(0).card is None


async def test_an_unknown_instance_or_a_missing_epoch_opens_no_link(running: Running) -> None:
    async with running.channel(running.identity) as channel:
        assert isinstance(await failure(running.link(channel, **{rpc.INSTANCE_KEY: "cd" * 16})), InstanceRefused)
        assert isinstance(await failure(running.link(channel, **{rpc.EPOCH_KEY: "x"})), FrameInvalid)


def test_settings_with_two_replicas_of_one_name_are_refused(tmp_path: Path) -> None:
    row = f'[[replicas]]\nname = "a"\naddress = "h:1"\ninstance = "{INSTANCE}"\nepoch = 0\n'
    names = ("service_key", "link_ca", "certificate", "private_key", "replica_ca", "replica_certificate")
    paths = "".join(f'{name} = "x"\n' for name in (*names, "replica_private_key"))
    (tmp_path / "gateway.toml").write_text(f'audience = "g"\n{paths}{row}{row}')
    with pytest.raises(ConfigurationError, match="same name"):
        load(GatewaySettings, tmp_path / "gateway.toml")
