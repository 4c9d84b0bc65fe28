"""What waits to be sent to one enclave: bounded for what a replica says, never closed to the end of the link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from stip_protocol.wire import model_pb2


class Outbox:
    """A queue with room for `limit` messages, read by one iteration that ends with `end`.

    Only `put` waits. Whoever ends a link must never wait for a reader that may have gone.
    """

    def __init__(self, limit: int) -> None:
        self._queue: asyncio.Queue[model_pb2.Down | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(limit)

    async def put(self, message: model_pb2.Down) -> None:
        """Add a message once there is room: its replica is read no further until then."""
        await self._room.acquire()
        self._queue.put_nowait(message)

    def end(self) -> None:
        """End the iteration after what is in here. Idempotent."""
        self._queue.put_nowait(None)

    def announce(self, message: model_pb2.Down) -> None:
        """Add a message without waiting: one a link, in all its life."""
        self._queue.put_nowait(message)

    async def __aiter__(self) -> AsyncIterator[model_pb2.Down]:
        while (message := await self._queue.get()) is not None:
            self._room.release()
            yield message
