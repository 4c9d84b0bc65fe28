"""One side of a link as those see it who have something to say there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import grpc.aio

M = TypeVar("M")


class Sender(Generic[M]):
    """Sends one message at a time, in the order of asking.

    There is no queue besides gRPC's own flow control: whoever sends waits until the peer has room, and reads nothing
    more from the other side meanwhile.
    """

    def __init__(self, write: Callable[[M], Awaitable[None]]) -> None:
        self._write = write
        self._turn = asyncio.Lock()
        self._posted: set[asyncio.Task[None]] = set()

    async def send(self, message: M) -> None:
        """Send, and return when the peer has room for it. Raises what gRPC does where the stream has ended."""
        async with self._turn:
            await self._write(message)

    def post(self, message: M) -> None:
        """Send without waiting. For what comes once a session or once a link: nothing else bounds what waits here."""
        task = asyncio.create_task(self._attempt(message))
        self._posted.add(task)
        task.add_done_callback(self._posted.discard)

    def stop(self) -> None:
        """Drop what was posted and has not left."""
        for task in self._posted:
            task.cancel()

    async def _attempt(self, message: M) -> None:
        # A stream that has ended is for the pumps of its link to report.
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
            await self.send(message)
