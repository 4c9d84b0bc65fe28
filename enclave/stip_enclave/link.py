"""One stream to one replica, by way of the gateway, shared by all sessions of one instance that are there.

Rows that become ready in the same turn of the event loop leave in one frame; the rows of running steps go before the
next piece of a prompt. Replies are checked by the `Inbox`. When the stream breaks, all its ports are lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc.aio
import numpy as np
import structlog
from numpy.typing import NDArray

from stip_enclave.cards import OUTPUT
from stip_enclave.config import Limits
from stip_enclave.inbox import Deliver, Inbox
from stip_enclave.outbox import NO_IDS, Encoding, Outbox, Owner, Port
from stip_protocol import rpc
from stip_protocol.errors import (
    DeadlineExceeded,
    Draining,
    FrameInvalid,
    Overloaded,
    ReplicaLost,
    StipError,
    from_code,
)
from stip_protocol.fields import HANDLE_BYTES, TOP
from stip_protocol.manifest import Manifest
from stip_protocol.runtime.logs import fault
from stip_protocol.telemetry import LINKS, Telemetry
from stip_protocol.tensor import rows_per_frame
from stip_protocol.wire import model_pb2, model_pb2_grpc


class Link:
    """An open stream. Everything runs on one event loop."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        card: model_pb2.Card,
        replica: str,
        manifest: Manifest,
        encoding: Encoding,
        deliver: Deliver,
        over: Callable[[Link], None],
        limits: Limits,
        telemetry: Telemetry,
    ) -> None:
        """Owns `channel` from here on. `replica`: its name at the gateway, or "" for any; `over` is called when the
        link was lost, and when the last session has left one that drains.
        """
        self._channel, self._manifest, self._over = channel, manifest, over
        self._limits, self._telemetry = limits, telemetry
        self.replica = replica
        self.max_positions = min(card.max_positions, manifest.max_positions)
        frame_rows = min(card.max_rows, rows_per_frame(manifest.dtype, manifest.width))
        self.max_outputs = max(1, min(card.max_outputs, frame_rows))
        """Rows of one step that may be answered."""
        self.answers_top = manifest.output == "top" and manifest.vocabulary > TOP
        """Whether an answer is the largest logits of a row, and not all."""
        self.lost: StipError | None = None
        self.draining = False
        self.replays = asyncio.Semaphore(limits.replays)
        """Histories that are fed at once, so that running sessions are not stalled by those that come from elsewhere.
        First come, first served."""
        self._said, self._own = 0, 0
        self._inbox = Inbox(manifest, deliver, self._end, telemetry)
        self._outbox = Outbox(encoding, frame_rows, self._inbox.ports, telemetry.stage("embed"))
        metadata = [(rpc.INSTANCE_KEY, manifest.instance), (rpc.EPOCH_KEY, str(manifest.epoch))]
        if replica:
            metadata.append((rpc.REPLICA_KEY, replica))
        self._call: Any = model_pb2_grpc.ModelStub(channel).Link(metadata=tuple(metadata))
        self._tasks = [asyncio.create_task(work()) for work in (self._write, self._read, self._watch)]
        telemetry.gauge(LINKS).inc()

    @property
    def usable(self) -> bool:
        """Whether new sessions may open here."""
        return self.lost is None and not self.draining

    @property
    def sessions(self) -> int:
        """Of this enclave."""
        return len(self._inbox.ports)

    @property
    def load(self) -> int:
        """Sessions on the replica: as it last said, and what was opened or closed here since."""
        return max(self.sessions, self._said + self.sessions - self._own)

    async def open(self, owner: Owner, lease: bytes, request_id: str, max_positions: int) -> Port:
        """A new session under a fresh random handle.

        Raises what the other side refuses it with, `DeadlineExceeded` or `ReplicaLost`.
        """
        if self.lost is not None:
            raise self.lost
        port = Port(secrets.token_bytes(HANDLE_BYTES), owner, request_id, asyncio.get_running_loop().create_future())
        self._inbox.ports[port.handle] = port
        opening = model_pb2.Open(
            session=port.handle,
            lease=lease,
            output=OUTPUT[self._manifest.output],
            max_positions=max_positions,
            space=model_pb2.SPACE_RESIDUAL,
            mode=model_pb2.MODE_GENERATE,
            request_id=request_id,
        )
        self._send(model_pb2.Up(open=opening))
        try:
            async with asyncio.timeout(self._limits.open_seconds):
                await port.opened
        except TimeoutError:
            self.close(port)
            raise DeadlineExceeded("the replica did not open the session in time") from None
        except BaseException:
            self.close(port)
            raise
        return port

    def feed(
        self, port: Port, ids: NDArray[np.uint32], *, outputs: int, back: int = 0, drafted: NDArray[np.uint32] = NO_IDS
    ) -> None:
        """Send the rows of `ids` after those sent before, of which the last `back` are forgotten first.

        `outputs` are wanted for as many of the last rows; the last ids may be `drafted`, one fewer than the outputs.
        Not to be called while `port.awaits` something; `back` not while rows wait to be sent.
        """
        port.position += len(ids) - back
        port.outputs, port.drafted = outputs, drafted
        port.awaits = "output" if outputs else "nothing"
        port.back += back
        port.asked = time.perf_counter()
        self._outbox.feed(port, ids)

    def recall(self, port: Port, position: int) -> None:
        """Ask for the whole row behind one of the last outputs."""
        port.awaits, port.recalled = "row", position
        port.asked = time.perf_counter()
        self._send(model_pb2.Up(recall=model_pb2.Recall(session=port.handle, position=position)))

    def generate(self, port: Port, generate: model_pb2.Generate) -> None:
        """Have the replica decode alone behind all that was fed; names the port and its position."""
        generate.session, generate.position = port.handle, port.position
        port.awaits, port.left = "ids", generate.max_ids
        port.asked = time.perf_counter()
        if self.lost is None:
            self._outbox.generate(port, model_pb2.Up(generate=generate))

    def halt(self, port: Port) -> None:
        """Stop the running generation: its last ids still come."""
        self._send(model_pb2.Up(halt=model_pb2.Halt(session=port.handle)))

    def renew(self, lease: bytes) -> None:
        """Tell the gateway of a renewed lease, before any row that needs it."""
        if self.lost is None:
            self._outbox.renew(lease)

    def close(self, port: Port) -> None:
        """End a session from this side. Idempotent."""
        if self._forget(port):
            self._send(model_pb2.Up(close=model_pb2.Close(session=port.handle)))

    async def stop(self) -> None:
        """End the stream and its channel, once what is still to be said has left; sessions that are left are lost."""
        if self.lost is None and not self.sessions:
            await self._last_words()
        self._lose(ReplicaLost("the link was stopped"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._call.cancel()
        await self._channel.close()

    def _send(self, up: model_pb2.Up) -> None:
        if self.lost is None:
            self._outbox.send(up)

    def _forget(self, port: Port) -> bool:
        if not self._inbox.forget(port):
            return False
        if self.draining and not self.sessions:
            self._over(self)
        return True

    def _end(self, port: Port, error: StipError, *, tell: bool = True) -> None:
        """End one session with an error, towards its owner and (with `tell`) the replica."""
        if not self._inbox.forget(port):
            return
        if tell:
            self._send(model_pb2.Up(close=model_pb2.Close(session=port.handle)))
        if port.opened.done():
            port.owner.lost(error)
        else:
            port.opened.set_exception(error)
        if self.draining and not self.sessions:
            self._over(self)

    def _lose(self, error: StipError) -> None:
        if self.lost is not None:
            return
        self.lost = error
        self._telemetry.gauge(LINKS).dec()
        for port in list(self._inbox.ports.values()):
            self._end(port, error, tell=False)
        self._outbox.wake.set()
        self._over(self)

    # -- upward ---------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        # A stream that has ended takes nothing more: why it ended is the reader's to find out.
        with self._losing(), contextlib.suppress(asyncio.InvalidStateError):
            while self.lost is None:
                await self._outbox.wake.wait()
                self._outbox.wake.clear()
                while self.lost is None and (up := self._outbox.next()) is not None:
                    await self._call.write(up)
                self._outbox.idle.set()

    async def _last_words(self) -> None:
        """Wait until what is queued has been written, as long as a peer may take to answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(1.0, self._limits.open_seconds)):
                await self._outbox.idle.wait()

    # -- downward -------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        with self._losing():
            while (down := await self._call.read()) is not grpc.aio.EOF:
                await self._received(down)
            raise ReplicaLost("the link was ended by the other side")

    async def _received(self, down: model_pb2.Down) -> None:
        self._said, self._own = down.load, self.sessions
        kind = down.WhichOneof("body")
        if kind == "fed":
            await self._inbox.fed(down.fed)
        elif kind == "opened":
            self._opened(down.opened)
        elif kind == "closed":
            closed = down.closed
            if (port := self._inbox.closed(closed.session)) is not None:
                retry_after = rpc.retry_after(closed.retry_after_ms)
                self._end(port, from_code(closed.code, closed.message, retry_after), tell=False)
        elif kind == "drain":
            self._drain()
        else:
            self._inbox.refuse(FrameInvalid.because("Down.body", kind, "opened, fed, closed, drain"))

    def _opened(self, opened: model_pb2.Opened) -> None:
        port = self._inbox.ports.get(opened.session)
        if port is None:
            return
        if port.opened.done():
            self._inbox.refuse(FrameInvalid("Opened: the session was open already"), port)
        else:
            port.opened.set_result(None)

    def _drain(self) -> None:
        if self.draining:
            return
        self.draining = True
        structlog.get_logger().info("replica drains", replica=self.replica, sessions=self.sessions)
        for port in list(self._inbox.ports.values()):
            if port.opened.done():
                port.owner.draining()
        if not self.sessions:
            self._over(self)

    async def _watch(self) -> None:
        """End sessions whose answer does not come."""
        while self.lost is None:
            await asyncio.sleep(min(1.0, self._limits.reply_seconds / 4))
            late = time.perf_counter() - self._limits.reply_seconds
            for port in list(self._inbox.ports.values()):
                if port.awaits != "nothing" and port.asked < late:
                    self._inbox.refuse(DeadlineExceeded("the replica did not answer in time"), port)

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """Whatever ends a pump ends the link."""
        try:
            yield
        except asyncio.CancelledError:
            self._lose(ReplicaLost("the link was cancelled"))
            raise
        except StipError as error:
            self._lose(error)
        except grpc.aio.AioRpcError as error:
            self._lose(_why(error))
        except Exception as error:  # noqa: BLE001 - a defect of ours must end the sessions, not leave them waiting
            structlog.get_logger().error("link failed", fault=fault(error))
            self._lose(StipError("internal error; see the log of the enclave"))


def _why(error: grpc.aio.AioRpcError) -> StipError:
    """What a broken stream means to its sessions. Whoever refused it for reasons of its own is believed, and so is the
    time to try again; any other refusal was the link's, not theirs."""
    told = rpc.from_rpc(error)
    if isinstance(told, Overloaded | Draining | ReplicaLost):
        return told
    return ReplicaLost(f"the link broke off ({told.code})", retry_after=told.retry_after)
