"""One link at work: what the enclave sends goes to the replica, and what the replica sends goes to the enclave.

Each direction is one task that reads a message, and reads the next when the other side has taken it. So a slow enclave
stops the reading of its replica, a slow replica that of its enclave, and nothing waits here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio
import structlog
from prometheus_client import Histogram

from stip_gateway.link import LinkSessions, Passed
from stip_gateway.sender import Sender
from stip_protocol import rpc
from stip_protocol.errors import ReplicaLost, RequestInvalid, StipError
from stip_protocol.wire import model_pb2


@dataclass(frozen=True, slots=True)
class Notes:
    """Who is told what of a link."""

    admit: Histogram
    """Seconds of an opening, lease verification included."""
    forward: Histogram
    """Seconds of any other message, received to handed on."""
    passed: Callable[[Relay, Passed], None]
    """What each message turned into, once that has left."""
    reported: Callable[[model_pb2.Down], None]
    """Every message of the replica, before it is handed on."""


class Relay:
    """The two streams of one link. `context` is the enclave's call here, `call` is ours to the replica."""

    def __init__(self, link: LinkSessions, context: Any, call: Any, notes: Notes) -> None:
        self.link = link
        self._context, self._call, self._notes = context, call, notes
        self._enclave: Sender[model_pb2.Down] = Sender(context.write)
        self._replica: Sender[model_pb2.Up] = Sender(call.write)
        self._ending = asyncio.Event()

    def announce(self, message: model_pb2.Down) -> None:
        """Tell the enclave something without waiting for it: once in the life of a link."""
        self._enclave.post(message)

    def end(self) -> None:
        """Let `run` return."""
        self._ending.set()

    async def run(self) -> None:
        """Returns when the enclave has ended its side or has gone, or `end` was called.

        Raises `FrameInvalid` or `TensorInvalid` for a malformed frame of the enclave, what the replica refuses the link
        with, and `ReplicaLost` where it breaks off or says what cannot be.
        """
        tasks = [asyncio.create_task(work) for work in (self._upward(), self._downward(), self._ended())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        except grpc.aio.BaseError:  # of our own side of gRPC: there is nobody any more to write to
            return
        finally:
            # First, and before anything is waited for: an enclave that leaves while this waits cancels the waiting, and
            # a link that nobody ends keeps its sessions on the replica.
            self._call.cancel()
            for task in tasks:
                task.cancel()
            self._enclave.stop()
            self._replica.stop()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ended(self) -> None:
        await self._ending.wait()

    async def _upward(self) -> None:
        link, notes, context = self.link, self._notes, self._context
        while (message := await context.read()) is not grpc.aio.EOF:
            began = time.perf_counter()
            stage = notes.admit if message.HasField("open") else notes.forward
            passed = link.up(message)
            for answer in passed.down:
                await self._enclave.send(answer)
            try:
                for onward in passed.up:
                    await self._replica.send(onward)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                raise await self._broken_off() from None
            notes.passed(self, passed)
            stage.observe(time.perf_counter() - began)

    async def _downward(self) -> None:
        link, notes, call = self.link, self._notes, self._call
        while True:
            try:
                message = await call.read()
            except grpc.aio.AioRpcError:
                raise await self._broken_off() from None
            if message is grpc.aio.EOF:
                raise await self._broken_off()
            began = time.perf_counter()
            notes.reported(message)
            try:
                passed = link.down(message)
            except RequestInvalid as error:
                structlog.get_logger().warning("reply refused", code=error.code, detail=error.message)
                raise ReplicaLost(f"the replica says what cannot be ({error.code})") from None
            for answer in passed.down:
                await self._enclave.send(answer)
            for onward in passed.up:
                # Not waited for: a replica that is not read may read nothing either.
                self._replica.post(onward)
            notes.passed(self, passed)
            notes.forward.observe(time.perf_counter() - began)

    async def _broken_off(self) -> StipError:
        """Why the replica's side is over."""
        code, trailing = await self._call.code(), await self._call.trailing_metadata()
        if code is grpc.StatusCode.OK:
            return ReplicaLost("the replica ended the link")
        if rpc.ERROR_CODE_KEY not in dict(trailing or ()):
            return ReplicaLost("the replica broke off")
        error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=await self._call.details())
        return rpc.from_rpc(error)
