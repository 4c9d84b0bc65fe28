"""The other end of one `Link` stream, as the service sees it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from stip_protocol.wire import model_pb2 as wire

FORGOTTEN = 4096
"""Ended sessions that a peer's rows are still passed over for, before they count as of unknown sessions."""


class Peer:
    """One stream: its sessions, and what waits to be sent. `number` is the first half of its sessions' keys."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sessions: dict[bytes, str] = {}
        """Handle to request id."""
        self.outbox: asyncio.Queue[wire.Down | None] = asyncio.Queue()
        self._ended: OrderedDict[bytes, None] = OrderedDict()

    def send(self, message: wire.Down) -> None:
        self.outbox.put_nowait(message)

    def finish(self) -> None:
        """End the stream once everything before is sent."""
        self.outbox.put_nowait(None)

    def read_to_the_end(self, reader: asyncio.Task[None]) -> None:
        """Called when nothing more comes from the peer: end the stream. Whoever sends raises what `reader` raised."""
        if not reader.cancelled():
            reader.exception()
        self.finish()

    def drop(self, handle: bytes) -> str:
        """Forget a session and remember that it was; its request id."""
        self._ended[handle] = None
        self._ended.move_to_end(handle)
        if len(self._ended) > FORGOTTEN:
            self._ended.popitem(last=False)
        return self.sessions.pop(handle, "")

    def had(self, handle: bytes) -> bool:
        """Whether the session ended."""
        return handle in self._ended

    def admit(self, handle: bytes, request_id: str) -> None:
        self._ended.pop(handle, None)
        self.sessions[handle] = request_id
