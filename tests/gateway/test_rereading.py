"""SIGHUP at the gateway: another routing table, and links that end by draining."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from stip_gateway.config import ReplicaSettings
from stip_gateway.replicas import Replica
from stip_protocol import rpc
from stip_protocol.errors import ConfigurationError, InstanceRefused, ReplicaLost
from stip_protocol.runtime.config import Settings
from stip_protocol.runtime.rereading import on_hangup, require_only
from stip_protocol.wire import model_pb2
from tests.gateway.running import Running, failure, read, settled
from tests.gateway.test_routing import described, linked, links
from tests.gateway.wire import EPOCH, lease, opening, spki_digest


def table(running: Running, *numbers: int) -> list[ReplicaSettings]:
    """The rows of the replicas that the test started, by number."""
    return [running.rows[number] for number in numbers]


async def drained(call: Any) -> None:
    """What comes next is a drain."""
    assert (await read(call)).HasField("drain")


async def test_a_new_replica_joins_and_the_others_keep_their_links(pair: Running) -> None:
    await pair.service.reread(table(pair, 0))
    async with pair.channel(pair.identity) as channel:
        running = await linked(pair, channel)
        assert await described(pair, channel) == ["r0"]
        await pair.service.reread(table(pair, 0, 1))
        await pair.route(1).describe(5)
        assert await described(pair, channel) == ["r0", "r1"]
        await running.write(opening(os.urandom(16), lease(spki_digest(pair.identity))))
        assert (await read(running)).HasField("opened")
        running.cancel()


async def test_a_removed_replica_takes_no_new_link_and_its_links_end_by_draining(pair: Running) -> None:
    async with pair.channel(pair.identity) as channel:
        busy = await linked(pair, channel, **{"stip-replica": "r0"})
        idle = pair.link(channel, **{"stip-replica": "r0"})
        await settled(lambda: links(pair) == [2, 0])
        await pair.service.reread(table(pair, 1))
        # The one without sessions ends at once, the other takes no session any more and goes on.
        await drained(idle)
        assert await asyncio.wait_for(idle.read(), 10) is grpc.aio.EOF
        await drained(busy)
        handle = os.urandom(16)
        await busy.write(opening(handle, lease(spki_digest(pair.identity))))
        refused = (await read(busy)).closed
        assert (refused.session, refused.code) == (handle, "draining")
        again = pair.link(channel, **{"stip-replica": "r0"})
        assert isinstance(await failure(again), InstanceRefused)
        assert links(pair) == [1, 0]
        busy.cancel()
        await settled(lambda: links(pair) == [0, 0] and not pair.service._parting)


async def test_a_link_to_a_removed_replica_ends_with_its_last_session(pair: Running) -> None:
    async with pair.channel(pair.identity) as channel:
        call = pair.link(channel, **{"stip-replica": "r0"})
        handle = os.urandom(16)
        await call.write(opening(handle, lease(spki_digest(pair.identity))))
        assert (await read(call)).HasField("opened")
        await pair.service.reread(table(pair, 1))
        await drained(call)
        await call.write(model_pb2.Up(close=model_pb2.Close(session=handle)))
        assert await asyncio.wait_for(call.read(), 10) is grpc.aio.EOF


async def test_the_same_table_changes_nothing(pair: Running) -> None:
    before = list(pair.routes._replicas)
    await pair.service.reread(table(pair, 0, 1))
    assert pair.routes._replicas == before
    assert not pair.service._parting


async def test_one_name_at_another_address_is_another_replica(pair: Running) -> None:
    moved = table(pair, 0)[0].model_copy(update={"address": table(pair, 1)[0].address})
    async with pair.channel(pair.identity) as channel:
        await pair.service.reread([moved])
        await pair.route(0).describe(5)
        call = await linked(pair, channel, **{"stip-replica": "r0"})
        assert links(pair) == [0, 1]
        call.cancel()
        await settled(lambda: links(pair) == [0, 0])


async def test_another_epoch_of_an_instance_is_linked_beside_the_first(pair: Running) -> None:
    pair.scripts[1].card.epoch = EPOCH + 1
    newer = table(pair, 1)[0].model_copy(update={"epoch": EPOCH + 1})
    await pair.service.reread([*table(pair, 0), newer])
    async with pair.channel(pair.identity) as channel:
        await asyncio.gather(*(pair.route(number).describe(5) for number in range(2)))
        assert await described(pair, channel) == ["r0"]
        assert await described(pair, channel, epoch=EPOCH + 1) == ["r1"]


async def test_a_replica_that_leaves_while_it_is_asked_does_not_end_the_asking_of_the_others(pair: Running) -> None:
    pair.scripts[0].thinking = asyncio.Event()
    refreshing = asyncio.create_task(pair.routes.refresh())
    try:
        await asyncio.wait_for(pair.scripts[0].asked.wait(), 10)
        await pair.service.reread(table(pair, 1))
        await settled(lambda: not pair.service._parting)
        asked = pair.scripts[1].times_asked
        pair.routes._ask_again.set()
        await settled(lambda: refreshing.done() or pair.scripts[1].times_asked > asked)
        assert not refreshing.done()
    finally:
        refreshing.cancel()
        await asyncio.gather(refreshing, return_exceptions=True)


async def test_a_link_that_waits_for_a_replica_that_leaves_is_refused_by_name(pair: Running) -> None:
    """Its channel is closed under it: that is no defect of the gateway."""
    pair.scripts[0].thinking = asyncio.Event()
    pair.route(0).forget()
    pair.scripts[0].asked.clear()
    async with pair.channel(pair.identity) as channel:
        call = pair.link(channel, **{"stip-replica": "r0"})
        await asyncio.wait_for(pair.scripts[0].asked.wait(), 10)
        await pair.service.reread(table(pair, 1))
        assert isinstance(await failure(call), ReplicaLost)
        # As one that was chosen before it left, and is opened after its channel was closed.
        gone = Replica(table(pair, 0)[0], rpc.channel("127.0.0.1:1", roots=pair.operator.pem))
        await gone.close()
        gone.card = pair.scripts[0].card

        async def chosen(*_: object) -> Replica:
            return gone

        pair.routes.choose = chosen  # type: ignore[method-assign]
        assert isinstance(await failure(pair.link(channel)), ReplicaLost)
    assert not pair.service._links


class Part(Settings):
    """The configuration of some part."""

    table: tuple[int, ...] = ()
    folder: Path = Path()
    name: str = ""


def test_a_change_of_anything_but_the_table_is_refused_and_named() -> None:
    require_only("table", Part(table=(1,)), Part(table=(2, 3)))
    with pytest.raises(ConfigurationError, match="a change of folder, name, allowed: a change of table"):
        require_only("table", Part(), Part(table=(2,), folder=Path("x"), name="y"))


async def test_no_fault_of_rereading_ends_the_part_and_a_storm_of_signals_is_one_after_the_other() -> None:
    taken: list[Part] = []
    outcomes: list[Callable[[], Part]] = []
    at_once = 0

    def reread() -> Part:
        nonlocal at_once
        at_once += 1
        assert at_once == 1
        return outcomes.pop(0)() if outcomes else Part(table=(9,))

    async def take(wanted: Part) -> None:
        nonlocal at_once
        await asyncio.sleep(0)
        at_once -= 1
        if wanted.table == (4,):
            raise RuntimeError("a defect")
        taken.append(wanted)

    def broken() -> Part:
        nonlocal at_once
        at_once -= 1
        raise PermissionError("SENTINEL")

    running = asyncio.create_task(on_hangup(Part(), reread, "table", take))
    try:
        await asyncio.sleep(0)
        for outcome, wanted in ((broken, 0), (lambda: Part(table=(4,)), 0), (lambda: Part(table=(2,)), 1)):
            outcomes.append(outcome)
            os.kill(os.getpid(), signal.SIGHUP)
            await settled(lambda: running.done() or not outcomes)
            await settled(lambda: running.done() or (not at_once and len(taken) >= wanted))  # noqa: B023
        for _ in range(200):
            os.kill(os.getpid(), signal.SIGHUP)
        await settled(lambda: running.done() or taken[-1:] == [Part(table=(9,))])
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
