"""One stream to the gateway, shared by all sessions of one instance.

Rows that become ready in the same turn of the event loop leave in one frame; single rows of running sessions go
before the next piece of a prompt. Every reply is checked against what was asked: another session's handle, another
position, a reply that nobody asked for, bytes that do not fit and values that are not finite end the sessions
they concern and no other. When the stream breaks, all its sessions fail with `ReplicaLost`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc.aio
import numpy as np
import structlog
from numpy.typing import NDArray

from stip_enclave.config import Limits
from stip_enclave.outbox import SLICES_PER_FRAME, Embed, Outbox, Owner, Port
from stip_enclave.replies import Outputs, read_outputs
from stip_protocol import rpc
from stip_protocol.errors import (
    DeadlineExceeded,
    FrameInvalid,
    ManifestMismatch,
    PositionRefused,
    ReplicaLost,
    SessionUnknown,
    StipError,
    TensorInvalid,
    from_code,
)
from stip_protocol.manifest import Manifest
from stip_protocol.runtime.logs import fault
from stip_protocol.telemetry import LINKS, Telemetry
from stip_protocol.tensor import rows_per_frame
from stip_protocol.versions import require_wire
from stip_protocol.wire import model_pb2, model_pb2_grpc

HANDLE_BYTES = 16
LEFT_LIMIT = 4096
"""Handles remembered whose last answer may still be under way when they were closed."""
OUTPUT = {"hidden": model_pb2.OUTPUT_HIDDEN, "top": model_pb2.OUTPUT_TOP}


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """Checked outputs, one row a port, and what the replica says of the step behind them."""

    ports: tuple[Port, ...]
    outputs: Outputs
    compute: float
    """Seconds of model compute."""
    queue: float
    """Seconds the rows waited before the step."""


class Link:
    """An open stream. Made by `Link.connect`; everything runs on one event loop."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        card: model_pb2.Card,
        manifest: Manifest,
        embed: Embed,
        deliver: Callable[[Delivery], Awaitable[None]],
        limits: Limits,
        telemetry: Telemetry,
    ) -> None:
        self._channel, self._manifest, self._deliver = channel, manifest, deliver
        self._limits, self._telemetry = limits, telemetry
        self.max_positions = min(card.max_positions, manifest.max_positions)
        self.lost: StipError | None = None
        self.draining = False
        self._ports: dict[bytes, Port] = {}
        self._left: dict[bytes, None] = {}
        frame_rows = min(card.max_rows, rows_per_frame(manifest.dtype, manifest.width))
        self._outbox = Outbox(embed, frame_rows, self._ports, telemetry.stage("embed"))
        self._round_trip = telemetry.stage("link")
        metadata = ((rpc.INSTANCE_KEY, manifest.instance), (rpc.EPOCH_KEY, str(manifest.epoch)))
        self._call: Any = model_pb2_grpc.ModelStub(channel).Link(metadata=metadata)
        self._tasks = [asyncio.create_task(work()) for work in (self._write, self._read, self._watch)]
        telemetry.gauge(LINKS).inc()

    @classmethod
    async def connect(
        cls,
        channel: grpc.aio.Channel,
        manifest: Manifest,
        manifest_digest: bytes,
        embed: Embed,
        deliver: Callable[[Delivery], Awaitable[None]],
        limits: Limits,
        telemetry: Telemetry,
    ) -> Link:
        """Ask for the card, hold it to the manifest, and open the stream. Owns `channel` from here on.

        Raises `ManifestMismatch`, `VersionUnsupported`, or what the peer or the transport says.
        """
        try:
            reference = model_pb2.InstanceRef(instance=manifest.instance, epoch=manifest.epoch)
            card = await model_pb2_grpc.ModelStub(channel).Describe(reference, timeout=limits.open_seconds)
            _require_card(card, manifest, manifest_digest)
            return cls(channel, card, manifest, embed, deliver, limits, telemetry)
        except grpc.aio.AioRpcError as error:
            await channel.close()
            raise rpc.from_rpc(error) from None
        except BaseException:
            await channel.close()
            raise

    @property
    def usable(self) -> bool:
        """Whether new sessions may open here."""
        return self.lost is None and not self.draining

    @property
    def sessions(self) -> int:
        return len(self._ports)

    async def open(self, owner: Owner, lease: bytes, request_id: str, max_positions: int) -> Port:
        """A new session under a fresh random handle.

        Raises what the other side refuses it with, `DeadlineExceeded` or `ReplicaLost`.
        """
        if self.lost is not None:
            raise self.lost
        port = Port(secrets.token_bytes(HANDLE_BYTES), owner, request_id, asyncio.get_running_loop().create_future())
        self._ports[port.handle] = port
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

    def feed(self, port: Port, ids: NDArray[np.uint32], *, last: bool) -> None:
        """Send the rows of `ids` after those sent before; with `last`, an output is wanted for the last of them.

        One row a session may be unanswered: not to be called while `port.awaits` something.
        """
        port.position += len(ids)
        port.awaits = "output" if last else "nothing"
        port.asked = time.perf_counter()
        self._outbox.feed(port, ids)

    def recall(self, port: Port) -> None:
        """Ask for the whole row behind the last output."""
        port.awaits = "row"
        port.asked = time.perf_counter()
        self._send(model_pb2.Up(recall=model_pb2.Recall(session=port.handle, position=port.position - 1)))

    def renew(self, lease: bytes) -> None:
        """Tell the gateway of a renewed lease, before any row that needs it."""
        if self.lost is None:
            self._outbox.renew(lease)

    def close(self, port: Port) -> None:
        """End a session from this side. Idempotent."""
        if self._forget(port):
            self._send(model_pb2.Up(close=model_pb2.Close(session=port.handle)))

    async def stop(self) -> None:
        """End the stream and its channel; sessions that are left fail."""
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
        if self._ports.pop(port.handle, None) is None:
            return False
        if port.awaits != "nothing":
            self._left[port.handle] = None
            while len(self._left) > LEFT_LIMIT:
                del self._left[next(iter(self._left))]
        return True

    def _end(self, port: Port, error: StipError, *, tell: bool = True) -> None:
        """End one session with an error, towards its owner and (with `tell`) the replica."""
        if not self._forget(port):
            return
        if tell:
            self._send(model_pb2.Up(close=model_pb2.Close(session=port.handle)))
        if port.opened.done():
            port.owner.failed(error)
        else:
            port.opened.set_exception(error)

    def _lose(self, error: StipError) -> None:
        if self.lost is not None:
            return
        self.lost = error
        self._telemetry.gauge(LINKS).dec()
        for port in list(self._ports.values()):
            self._end(port, error, tell=False)
        self._outbox.wake.set()

    # -- upward ---------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        with self._losing():
            while self.lost is None:
                await self._outbox.wake.wait()
                self._outbox.wake.clear()
                while self.lost is None and (up := self._outbox.next()) is not None:
                    await self._call.write(up)

    # -- downward -------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        with self._losing():
            while (down := await self._call.read()) is not grpc.aio.EOF:
                await self._received(down)
            code = await self._call.code()
            if code is not grpc.StatusCode.OK:
                trailing = dict(await self._call.trailing_metadata() or ())
                raise ReplicaLost(f"the link broke off ({trailing.get(rpc.ERROR_CODE_KEY, code.name.lower())})")
            raise ReplicaLost("the link was ended by the other side")

    async def _received(self, down: model_pb2.Down) -> None:
        kind = down.WhichOneof("body")
        if kind == "fed":
            await self._fed(down.fed)
        elif kind == "opened":
            self._opened(down.opened)
        elif kind == "closed":
            self._left.pop(down.closed.session, None)
            if (port := self._ports.get(down.closed.session)) is not None:
                self._end(port, from_code(down.closed.code, down.closed.message), tell=False)
        elif kind == "drain":
            self.draining = True
        else:
            self._refuse(FrameInvalid.because("Down.body", kind, "opened, fed, closed, drain"))

    def _opened(self, opened: model_pb2.Opened) -> None:
        port = self._ports.get(opened.session)
        if port is None:
            return
        if port.opened.done():
            self._refuse(FrameInvalid("Opened: the session was open already"), port)
        else:
            port.opened.set_result(None)

    async def _fed(self, fed: model_pb2.Fed) -> None:
        received = time.perf_counter()
        if not 0 < len(fed.slices) <= SLICES_PER_FRAME:
            self._refuse(FrameInvalid.because("Fed.slices", len(fed.slices), f"1 to {SLICES_PER_FRAME}"))
            return
        form = fed.WhichOneof("out")
        asked: dict[int, Port] = {}
        for row, part in enumerate(fed.slices):
            if (port := self._claim(part, form)) is not None:
                asked[row] = port
        # A slice that came twice ended its session on the second time.
        asked = {row: port for row, port in asked.items() if port.handle in self._ports}
        if not asked:
            return
        try:
            outputs = read_outputs(fed, len(fed.slices), self._manifest)
        except StipError as error:
            for port in asked.values():
                self._refuse(error, port)
            return
        for row in outputs.bad & asked.keys():
            self._refuse(TensorInvalid("reply: values that are not finite, not in order or out of range"), asked[row])
            del asked[row]
        if not asked:
            return
        compute, queue = fed.compute_us * 1e-6, fed.queue_us * 1e-6
        first = next(iter(asked.values()))
        self._round_trip.observe(max(0.0, received - first.asked - compute - queue))
        await self._deliver(Delivery(tuple(asked.values()), outputs.only(list(asked)), compute, queue))

    def _claim(self, part: model_pb2.Slice, form: str | None) -> Port | None:
        """The port that asked for this slice; it awaits nothing afterwards."""
        port = self._ports.get(part.session)
        if port is None:
            if part.session in self._left:
                del self._left[part.session]
            else:
                self._refuse(SessionUnknown("reply: for a session that is not open on this link"))
            return None
        wanted = {"nothing": "no reply", "row": "logits", "output": self._manifest.output}[port.awaits]
        if form != wanted:
            self._refuse(FrameInvalid.because("reply", form, wanted), port)
        elif part.count != 1:
            self._refuse(FrameInvalid.because("reply Slice.count", part.count, 1), port)
        elif part.position != port.position - 1:
            self._refuse(PositionRefused.because("reply Slice.position", part.position, port.position - 1), port)
        else:
            port.awaits = "nothing"
            return port
        return None

    def _refuse(self, error: StipError, port: Port | None = None) -> None:
        """Count a bad message of the replica, and end the session it concerns."""
        log = structlog.get_logger() if port is None else structlog.get_logger().bind(request_id=port.request_id)
        log.warning("reply refused", code=error.code, detail=error.message)
        if port is None:
            self._telemetry.refused(error.code)
        else:
            self._end(port, error)

    async def _watch(self) -> None:
        """End sessions whose answer does not come."""
        while self.lost is None:
            await asyncio.sleep(min(1.0, self._limits.reply_seconds / 4))
            late = time.perf_counter() - self._limits.reply_seconds
            for port in list(self._ports.values()):
                if port.awaits != "nothing" and port.asked < late:
                    self._refuse(DeadlineExceeded("the replica did not answer in time"), port)

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
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._lose(ReplicaLost("the link broke off"))
        except Exception as error:  # noqa: BLE001 - a defect of ours must end the sessions, not leave them waiting
            structlog.get_logger().error("link failed", fault=fault(error))
            self._lose(StipError("internal error; see the log of the enclave"))


def _require_card(card: model_pb2.Card, manifest: Manifest, manifest_digest: bytes) -> None:
    require_wire(card.version, peer="replica")
    vocabulary = manifest.vocabulary if manifest.output == "top" else 0
    for field_name, got, allowed in (
        ("instance", card.instance, manifest.instance),
        ("epoch", card.epoch, manifest.epoch),
        ("manifest_digest", card.manifest_digest.hex(), manifest_digest.hex()),
        ("preset", card.preset, manifest.preset),
        ("dtype", card.dtype, manifest.dtype),
        ("width", card.width, manifest.width),
        ("vocabulary", card.vocabulary, vocabulary),
    ):
        if got != allowed:
            raise ManifestMismatch.because(f"card {field_name}", got, allowed)
    if OUTPUT[manifest.output] not in card.outputs:
        raise ManifestMismatch.because("card outputs", list(card.outputs), f"{OUTPUT[manifest.output]} among them")
    if min(card.max_rows, card.max_positions) < 1:
        raise ManifestMismatch.because("card max_rows, max_positions", 0, "at least 1")
