"""The service against peers that flood, stall and disappear, and under an engine that dies."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from stip_protocol.errors import FrameInvalid
from stip_protocol.wire import model_pb2 as wire
from stip_server.engine import Form, Ids
from stip_server.messages import SLICES, UINT32, fed_frames, slices_of
from stip_server.outbox import MESSAGES
from stip_server.peer import FORGOTTEN
from tests.server.scripted import ScriptedEngine, ScriptedModel


class Dying(ScriptedModel):
    """A model whose steps fail from one moment on, in a way that no engine expects."""

    dead = False

    def states(self, *args: Any, **kwargs: Any) -> list[bytes]:
        if self.dead:
            raise RuntimeError("something that a library says")
        return super().states(*args, **kwargs)


async def died(serve_engine: Any, model: Dying) -> None:
    """The life of a service whose engine dies: it ends with what the engine raised."""
    async with serve_engine(ScriptedEngine(model), model) as service:
        links = [await service.link() for _ in range(2)]
        sessions = [(enclave, os.urandom(16)) for enclave in links for _ in range(3)]
        for enclave, session in sessions:
            await enclave.open(session)
            assert isinstance(await enclave.next(session), wire.Opened)
        model.dead = True
        await links[0].feed(sessions[0][1], 0, [1, 2, 3])
        for enclave, session in sessions:
            assert (await enclave.next(session)).code == "unavailable"
        late = os.urandom(16)
        await links[1].open(late)
        assert (await links[1].next(late)).code == "draining"
        await service.service.drain()
        for enclave in links:
            await enclave._reader


async def test_sessions_and_links_of_an_engine_that_dies_are_told_and_nobody_waits_for_them(serve_engine: Any) -> None:
    with pytest.raises(RuntimeError, match="that a library says"):
        await died(serve_engine, Dying())


async def test_what_sessions_decode_alone_for_a_peer_that_does_not_read_is_kept_in_few_messages(
    serve_engine: Any,
) -> None:
    engine = ScriptedEngine(slots=4, max_positions=6000, forms=(Form.IDS,))
    count, handles = 5000, [os.urandom(16) for _ in range(4)]
    async with serve_engine(engine, engine.model) as service:
        call = service.stub().Link(metadata=(("stip-instance", engine.card.instance), ("stip-epoch", "0")))
        for handle in handles:
            await call.write(wire.Up(open=wire.Open(session=handle, output=wire.OUTPUT_IDS, max_positions=6000)))
            piece = wire.Slice(session=handle, position=0, count=1)
            await call.write(wire.Up(feed=wire.Feed(slices=[piece], ids=bytes([5, 0, 0, 0]))))
            await call.write(wire.Up(generate=wire.Generate(session=handle, position=1, max_ids=count)))
        while service.metric("stip_step_sessions_sum") < 4 * count:  # noqa: ASYNC110 - the service's own count
            await asyncio.sleep(0.01)
        (peer,) = service.service._links.values()
        waiting = peer.outbox.parcels
        got: dict[bytes, int] = dict.fromkeys(handles, 0)
        frames = 0
        while min(got.values()) < count:
            down = await call.read()
            for piece in down.fed.slices:
                assert piece.position == 1 + got[piece.session]
                got[piece.session] += piece.count
            frames += 1
        assert waiting <= 2
        assert frames < count  # what waited came together
        call.cancel()


async def test_a_flood_of_messages_about_sessions_that_ended_or_never_were_is_bounded(serve_engine: Any) -> None:
    engine = ScriptedEngine(forms=(Form.HIDDEN,), slots=2)
    async with serve_engine(engine, engine.model) as service:
        enclave, handles = await service.link(), [os.urandom(16) for _ in range(FORGOTTEN + 200)]
        for handle in handles:
            await enclave.send(close=wire.Close(session=handle))
            await enclave.send(halt=wire.Halt(session=handle))
        for handle in handles:
            assert (await enclave.next(handle)).code == "session_unknown"
        (peer,) = service.service._links.values()
        assert len(peer._ended) <= FORGOTTEN
        assert peer.outbox.parcels <= MESSAGES
        await enclave.open(handles[0])
        assert isinstance(await enclave.next(handles[0]), wire.Opened)


def test_a_frame_names_no_more_sessions_than_an_engine_can_have() -> None:
    card = ScriptedEngine().card
    pieces = [wire.Slice(session=os.urandom(16), count=1) for _ in range(SLICES + 1)]
    rows = bytes(4 * card.width * len(pieces))
    assert len(slices_of(wire.Feed(slices=pieces[1:], rows=rows[4 * card.width :]), 1, card)) == SLICES
    with pytest.raises(FrameInvalid, match="slices: got 4097"):
        slices_of(wire.Feed(slices=pieces, rows=rows), 1, card)


def test_an_answer_that_took_longer_than_the_wire_can_say_is_sent_all_the_same() -> None:
    (frame,) = fed_frames([Ids((1, os.urandom(16)), 0, b"", done=True, compute=1e5, queue=1e5)])
    assert (frame.fed.compute_us, frame.fed.queue_us) == (UINT32, UINT32)
