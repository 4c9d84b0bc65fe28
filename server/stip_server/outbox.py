"""What waits to be sent on one link, in order and within bounds.

Answers to rows are bounded by what is read from the peer: nothing more is while the outbox is full. Sessions that
decode alone go on without a word from the peer. Their ids are joined for as long as they wait, so that a peer that
does not read costs four bytes an id: next to nothing beside the keys and values of the same position.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from stip_protocol.tensor import FRAME_LIMIT
from stip_protocol.wire import model_pb2 as wire
from stip_server.engine import Ids, Session
from stip_server.messages import fed_frames

MESSAGES = 1024
BYTES = 16 << 20
"""Of messages that wait; beyond either bound nothing more is read from the peer. One message may hold `FRAME_LIMIT`."""


@dataclass(eq=False)
class Parcel:
    """What is sent next: one message, or the ids that sessions were given meanwhile."""

    message: wire.Down | None = None
    size: int = 0
    """Bytes of the message."""
    ids: dict[Session, Ids] = field(default_factory=dict, repr=False)

    def messages(self) -> list[wire.Down]:
        """As they are sent."""
        return list(fed_frames(self.ids.values())) if self.message is None else [self.message]


class Outbox:
    """The messages of one link, for one sender."""

    def __init__(self) -> None:
        self._parcels: asyncio.Queue[Parcel | None] = asyncio.Queue()
        self._bytes = 0
        self._sent = asyncio.Event()
        self._open: Parcel | None = None
        """The last parcel, where it holds ids and is not being sent yet: more of them join it."""

    @property
    def parcels(self) -> int:
        """That wait."""
        return self._parcels.qsize()

    @property
    def full(self) -> bool:
        return self.parcels > MESSAGES or self._bytes > BYTES

    def put(self, message: wire.Down) -> None:
        self._append(Parcel(message, message.ByteSize()))
        self._open = None

    def add(self, ids: Iterable[Ids]) -> None:
        """Ids that sessions were given."""
        for more in ids:
            before = self._open.ids.get(more.session) if self._open else None
            joined = more if before is None else _joined(before, more)
            if self._open is None or joined is None:
                self._open = Parcel()
                self._append(self._open)
            self._open.ids[more.session] = more if joined is None else joined

    def finish(self) -> None:
        """Nothing more is to be sent after what waits."""
        self._parcels.put_nowait(None)

    async def next(self) -> Parcel | None:
        """What to send; None once there is nothing more."""
        parcel = await self._parcels.get()
        if parcel is self._open:
            self._open = None
        return parcel

    def sent(self, parcel: Parcel) -> None:
        """It is on its way."""
        self._bytes -= parcel.size
        self._sent.set()

    async def room(self) -> None:
        """Wait until it is not full. It need not get empty: sessions that decode alone see to that."""
        while self.full:
            self._sent.clear()
            await self._sent.wait()

    def _append(self, parcel: Parcel) -> None:
        self._bytes += parcel.size
        self._parcels.put_nowait(parcel)


def _joined(before: Ids, more: Ids) -> Ids | None:
    """Both as one answer; None where a generation ends between them, or where no frame would hold them."""
    if before.done or len(before.ids) + len(more.ids) > FRAME_LIMIT:
        return None
    ids, compute, queue = before.ids + more.ids, before.compute + more.compute, max(before.queue, more.queue)
    return Ids(before.session, before.position, ids, done=more.done, compute=compute, queue=queue)
