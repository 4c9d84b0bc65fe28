"""One session's gRPC stream: frames out, steps in, and one reader that knows which turn a step belongs to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import grpc
import grpc.aio

from stip.channel import cancelled_here
from stip.sampling import Sampling, pack
from stip_protocol import rpc
from stip_protocol.errors import Cancelled, DeadlineExceeded, FrameInvalid, StipError, Unavailable, from_code
from stip_protocol.wire import enclave_pb2

TOKEN = 0


class FinishReason(StrEnum):
    STOP = "stop"
    """A stop id came."""
    LENGTH = "length"
    """`max_tokens` or the positions of the instance are used up."""
    CANCELLED = "cancelled"


FINISHES: dict[int, FinishReason] = {
    1: FinishReason.STOP,
    2: FinishReason.LENGTH,
    3: FinishReason.CANCELLED,
    4: FinishReason.LENGTH,
}
"""`Step.kind` of the last step of a turn (wire/enclave.proto)."""


@dataclass(eq=False)
class Turn:
    """The steps of one turn, from the reader to whoever iterates. At most `max_tokens` ids and one end."""

    max_tokens: int
    received: int = 0
    finish: FinishReason | None = None
    cancelling: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _ids: asyncio.Queue[int | FinishReason | StipError] = field(default_factory=asyncio.Queue, repr=False)

    def put(self, item: int | FinishReason | StipError) -> None:
        self._ids.put_nowait(item)
        if not isinstance(item, int):
            self.finish = item if isinstance(item, FinishReason) else None
            self.ended.set()

    async def next(self) -> int | FinishReason:
        """The next id, or how the turn ended. Raises what ended the session."""
        item = await self._ids.get()
        if isinstance(item, StipError):
            raise item
        return item


class Stream:
    """An open session. One turn at a time; `failure` says why it can take no more."""

    def __init__(
        self,
        call: grpc.aio.StreamStreamCall[enclave_pb2.ClientFrame, enclave_pb2.EnclaveFrame],
        request_id: str,
        explain: Callable[[StipError], Awaitable[StipError]],
    ) -> None:
        self._call = call
        self._explain = explain
        self._opened: asyncio.Future[enclave_pb2.Opened] = asyncio.get_running_loop().create_future()
        self._turn: Turn | None = None
        self._reader = asyncio.create_task(self._read())
        self.request_id = request_id
        self.opened = enclave_pb2.Opened()
        self.position = 0
        """Rows the enclave has taken in, as of the last step."""
        self.failure: StipError | None = None

    @classmethod
    async def open(
        cls,
        stub: Any,
        *,
        request_id: str,
        delegation: bytes,
        instance: str,
        max_positions: int,
        timeout: float,
        explain: Callable[[StipError], Awaitable[StipError]],
    ) -> Stream:
        """Open a session and wait until the enclave took it. Nothing of a prompt is in here.

        Raises `DeadlineExceeded`, `ChannelChanged`, or what the enclave reports.
        """
        call = stub.Session(metadata=((rpc.REQUEST_ID_KEY, request_id),))
        stream = cls(call, request_id, explain)
        frame = enclave_pb2.Open(delegation=delegation, instance=instance, max_positions=max_positions)
        try:
            async with asyncio.timeout(timeout):
                await stream._write(enclave_pb2.ClientFrame(open=frame))
                stream.opened = await asyncio.shield(stream._opened)
        except TimeoutError:
            await stream.close()
            raise DeadlineExceeded(f"session: the enclave did not open one within {timeout:.1f} s") from None
        except BaseException:
            await stream.close()
            raise
        return stream

    async def turn(self, ids: list[int], sampling: Sampling) -> Turn:
        """Send one turn. The one before must have ended (`settle`)."""
        if self.failure is not None:
            raise self.failure
        turn = self._turn = Turn(sampling.max_tokens)
        await self._write(enclave_pb2.ClientFrame(turn=enclave_pb2.Turn(ids=pack(ids), sampling=sampling.to_wire())))
        return turn

    async def cancel(self, only: Turn | None = None) -> None:
        """Ask the enclave to stop the running turn (where it is `only`), once. Its last step still comes."""
        turn = self._turn
        if turn is None or turn.cancelling or turn.ended.is_set() or self.failure is not None:
            return
        if only is not None and only is not turn:
            return
        turn.cancelling = True
        await self._write(enclave_pb2.ClientFrame(cancel=enclave_pb2.Cancel()))

    async def settle(self, *, timeout: float) -> None:
        """End the running turn, if any, and wait for its last step. A stream that does not settle is closed."""
        turn = self._turn
        if turn is None or turn.ended.is_set():
            return
        try:
            async with asyncio.timeout(timeout):
                await self.cancel()
                await turn.ended.wait()
        except TimeoutError:
            await self.close()
            raise DeadlineExceeded(f"turn: the enclave did not stop it within {timeout:.1f} s") from None

    async def close(self, reason: StipError | None = None) -> None:
        """End the session, for `reason` where there is one; idempotent. The enclave forgets it."""
        self._end(reason or Cancelled("session: closed"))
        self._call.cancel()
        self._reader.cancel()
        with suppress(asyncio.CancelledError):
            await self._reader

    async def _write(self, frame: enclave_pb2.ClientFrame) -> None:
        try:
            await self._call.write(frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError, asyncio.CancelledError):
            if cancelled_here():
                raise
            await asyncio.wait([self._reader])
            raise self.failure or Unavailable("session: the stream is closed") from None

    async def _read(self) -> None:
        ended: StipError = Cancelled("session: the stream was cancelled")
        try:
            while isinstance(frame := await self._call.read(), enclave_pb2.EnclaveFrame):
                self._take(frame)
            ended = Unavailable("session: the enclave ended it")
        except grpc.aio.AioRpcError as error:
            ended = await self._explain(rpc.from_rpc(error))
        except StipError as error:
            ended = error
            self._call.cancel()
        finally:
            self._end(ended)

    def _take(self, frame: enclave_pb2.EnclaveFrame) -> None:
        body = frame.WhichOneof("body")
        if body == "failed":
            failed = frame.failed
            raise from_code(failed.code, failed.message, rpc.retry_after(failed.retry_after_ms))
        if body == "opened" and not self._opened.done():
            self._opened.set_result(frame.opened)
        elif body == "step" and self._turn is not None and not self._turn.ended.is_set():
            self._step(self._turn, frame.step)
        else:
            raise FrameInvalid.because("enclave frame", str(body), "opened once, then the steps of a turn")

    def _step(self, turn: Turn, step: enclave_pb2.Step) -> None:
        self.position = step.position
        if step.kind != TOKEN:
            if step.kind not in FINISHES:
                raise FrameInvalid.because("step kind", step.kind, f"0 to {max(FINISHES)}")
            turn.put(FINISHES[step.kind])
            return
        turn.received += 1
        if turn.received > turn.max_tokens:
            raise FrameInvalid.because("turn", "more tokens", f"at most {turn.max_tokens}")
        if step.id >= self.opened.vocabulary:
            raise FrameInvalid.because("step id", "an id outside of the vocabulary", f"below {self.opened.vocabulary}")
        turn.put(step.id)

    def _end(self, error: StipError) -> None:
        if self.failure is None:
            self.failure = error
        if not self._opened.done():
            self._opened.set_exception(self.failure)
            self._opened.exception()  # retrieved here: nobody may be waiting
        if self._turn is not None and not self._turn.ended.is_set():
            self._turn.put(self.failure)
