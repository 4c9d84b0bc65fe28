"""What comes down a link, held against what was asked before it is believed.

Another session's handle, another position or count, a reply that nobody asked for, bytes that do not fit and values
that are not finite end the sessions they concern and no other.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
from prometheus_client import Histogram

from stip_enclave.outbox import SLICES_PER_FRAME, Port
from stip_enclave.replies import Outputs, read_ids, read_outputs
from stip_protocol.errors import FrameInvalid, PositionRefused, SessionUnknown, StipError, TensorInvalid
from stip_protocol.manifest import Manifest
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import model_pb2

LEFT_LIMIT = 4096
"""Handles remembered whose last answer may still be under way when they were closed."""


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """Checked outputs, and what the replica says of the step behind them."""

    ports: tuple[Port, ...]
    outputs: Outputs
    """One row a port and drafted id of it, in the order of the ports; one row a port where whole rows were recalled."""
    compute: float
    """Seconds of model compute."""
    queue: float
    """Seconds the rows waited before the step."""


Deliver = Callable[[Delivery], Awaitable[None]]


class Inbox:
    """The ports of a link, and the replies to them."""

    def __init__(
        self, manifest: Manifest, deliver: Deliver, end: Callable[[Port, StipError], None], telemetry: Telemetry
    ) -> None:
        """`end` tells the owner of a port, and the replica, that a wrong reply has ended it."""
        self.ports: dict[bytes, Port] = {}
        self._left: dict[bytes, None] = {}
        self._manifest, self._deliver, self._end, self._telemetry = manifest, deliver, end, telemetry
        self._round_trip: Histogram = telemetry.stage("link")

    def forget(self, port: Port) -> bool:
        """Take a port out; False where it was out."""
        if self.ports.pop(port.handle, None) is None:
            return False
        if port.awaits != "nothing":
            self._left[port.handle] = None
            while len(self._left) > LEFT_LIMIT:
                del self._left[next(iter(self._left))]
        return True

    def closed(self, session: bytes) -> Port | None:
        """The port of a session that the other side has ended."""
        self._left.pop(session, None)
        return self.ports.get(session)

    async def fed(self, fed: model_pb2.Fed) -> None:
        """One frame of outputs or ids."""
        received = time.perf_counter()
        if not 0 < len(fed.slices) <= SLICES_PER_FRAME:
            self.refuse(FrameInvalid.because("Fed.slices", len(fed.slices), f"1 to {SLICES_PER_FRAME}"))
            return
        form = fed.WhichOneof("out")
        asked: dict[bytes, tuple[Port, int, model_pb2.Slice]] = {}
        rows = 0
        for part in fed.slices:
            # A slice of another count than was asked does not move its neighbours.
            size = _asked(self.ports.get(part.session), part)
            if (port := self._claim(part, form)) is not None:
                asked[port.handle] = port, rows, part
            rows += size
        # A slice that came twice ended its session on the second time.
        asked = {handle: entry for handle, entry in asked.items() if handle in self.ports}
        if not asked:
            return
        first = next(iter(asked.values()))[0]
        compute, queue = fed.compute_us * 1e-6, fed.queue_us * 1e-6
        self._round_trip.observe(max(0.0, received - first.asked - compute - queue))
        try:
            if form == "ids":
                self._ids(fed, rows, list(asked.values()), compute)
                return
            outputs = read_outputs(fed, rows, self._manifest)
        except StipError as error:
            for port, _, _ in asked.values():
                self.refuse(error, port)
            return
        kept: list[int] = []
        ports = []
        for port, start, part in asked.values():
            own = range(start, start + part.count)
            if outputs.bad and not outputs.bad.isdisjoint(own):
                self.refuse(TensorInvalid("reply: values that are not finite, not in order or out of range"), port)
            else:
                kept.extend(own)
                ports.append(port)
        if ports:
            await self._deliver(Delivery(tuple(ports), outputs.only(kept), compute, queue))

    def _ids(
        self, fed: model_pb2.Fed, count: int, asked: list[tuple[Port, int, model_pb2.Slice]], compute: float
    ) -> None:
        ids = read_ids(fed.ids.ids, count)
        now = time.perf_counter()
        for port, start, part in asked:
            own = ids[start : start + part.count]
            if own.size and int(own.max()) >= self._manifest.vocabulary:
                self.refuse(TensorInvalid("reply: an id outside the vocabulary"), port)
                continue
            port.position += part.count
            port.left -= part.count
            port.asked = now
            if part.done:
                port.awaits = "nothing"
            port.owner.came(own, part.done, compute)

    def _claim(self, part: model_pb2.Slice, form: str | None) -> Port | None:
        """The port that asked for this slice. One whose outputs have come awaits nothing afterwards."""
        port = self.ports.get(part.session)
        if port is None:
            if part.session not in self._left:
                self.refuse(SessionUnknown("reply: for a session that is not open on this link"))
            elif form != "ids" or part.done:
                del self._left[part.session]
            return None
        awaited = {"nothing": "no reply", "row": "logits", "output": self._manifest.output, "ids": "ids"}[port.awaits]
        position, least, most = _expected(port)
        if form != awaited or port.waiting is not None:
            self.refuse(FrameInvalid.because("reply", form, awaited), port)
        elif not least <= part.count <= most or (port.awaits == "ids" and not part.count and not part.done):
            self.refuse(FrameInvalid.because("reply Slice.count", part.count, f"{least} to {most}"), port)
        elif part.position != position:
            self.refuse(PositionRefused.because("reply Slice.position", part.position, position), port)
        else:
            if form != "ids":
                port.awaits = "nothing"
            return port
        return None

    def refuse(self, error: StipError, port: Port | None = None) -> None:
        """Count a bad message of the replica, and end the session it concerns."""
        log = structlog.get_logger() if port is None else structlog.get_logger().bind(request_id=port.request_id)
        log.warning("reply refused", code=error.code, detail=error.message)
        if port is None:
            self._telemetry.refused(error.code)
        else:
            self._end(port, error)


def _expected(port: Port) -> tuple[int, int, int]:
    """(position, least count, greatest count) of the next reply to a port."""
    if port.awaits == "ids":
        return port.position, 0, port.left
    if port.awaits == "row":
        return port.recalled, 1, 1
    return port.position - port.outputs, port.outputs, port.outputs


def _asked(port: Port | None, part: model_pb2.Slice) -> int:
    """Rows that a slice of a reply should have: as its port asked, else as it says."""
    if port is None or port.awaits in ("nothing", "ids"):
        return part.count
    return port.outputs if port.awaits == "output" else 1
