"""What is still to leave on a link: messages in order, and ids that become rows when a frame is made of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Histogram

from stip_protocol.errors import StipError
from stip_protocol.wire import model_pb2

SLICES_PER_FRAME = 256
Awaited = Literal["nothing", "output", "row", "ids"]
NO_IDS: NDArray[np.uint32] = np.empty(0, np.uint32)


class Owner(Protocol):
    """A session's seat, as the link that holds its port sees it."""

    def failed(self, error: StipError) -> None:
        """What was answered cannot be used: the session is over."""

    def lost(self, error: StipError) -> None:
        """The port has ended on the other side, or the link ended it. Called once, and nothing after it."""

    def draining(self) -> None:
        """The replica wants to be rid of its sessions; the port goes on."""

    def came(self, ids: NDArray[np.uint32], done: bool, compute: float) -> None:
        """Permuted ids [n] that a generation added, in the vocabulary; `compute` in seconds."""


@dataclass(slots=True, eq=False)
class Port:
    """One session's place on a link."""

    handle: bytes = field(repr=False)
    owner: Owner = field(repr=False)
    request_id: str
    opened: asyncio.Future[None] = field(repr=False)
    position: int = 0
    """Rows handed to the link so far, and ids generated behind them: the position of the next row."""
    awaits: Awaited = "nothing"
    outputs: int = 0
    """Outputs asked with the last rows."""
    drafted: NDArray[np.uint32] = field(default_factory=lambda: NO_IDS, repr=False)
    """Guessed ids that were fed behind the certain ones: as many outputs, and one, are awaited."""
    recalled: int = 0
    """Position of the row that is asked whole."""
    left: int = 0
    """Ids that the running generation may still add."""
    asked: float = 0.0
    """When the last row left, or the last ids came (`time.perf_counter`)."""
    waiting: NDArray[np.uint32] | None = field(default=None, repr=False)
    """Ids that are still to leave as rows; the last of them is at `position - 1`."""
    back: int = 0
    """Rows that the other side forgets before the first of those that wait."""


class Encoding(Protocol):
    """How ids leave: as keyed rows (`Tables`), or permuted (`Substitution`)."""

    def feed(
        self, slices: list[model_pb2.Slice], ids: NDArray[np.uint32], positions: NDArray[np.int64]
    ) -> model_pb2.Feed:
        """One frame of ids [n] at `positions` [n]."""

    def require_ids(self, ids: NDArray[np.uint32]) -> None:
        """Raise `RequestInvalid` unless every id is in the vocabulary."""


class Outbox:
    """Control messages go first, because an opening or a renewal comes before the rows that need it; then the rows of
    running sessions' steps; then prompts, piece by piece and in turn.
    """

    def __init__(self, encoding: Encoding, frame_rows: int, open_ports: Container[bytes], embedding: Histogram) -> None:
        """`frame_rows`: of one frame at most; `open_ports`: handles whose rows still leave."""
        self.wake = asyncio.Event()
        """Set when there is something to send."""
        self.idle = asyncio.Event()
        """Set when all has been written."""
        self.idle.set()
        self._encoding, self._frame_rows, self._open, self._embedding = encoding, frame_rows, open_ports, embedding
        self._control: deque[model_pb2.Up] = deque()
        self._steps: deque[Port] = deque()
        self._prompts: deque[Port] = deque()
        self._behind: dict[bytes, model_pb2.Up] = {}

    def send(self, up: model_pb2.Up) -> None:
        """A control message."""
        self._control.append(up)
        self._stir()

    def renew(self, lease: bytes) -> None:
        """A renewed lease: once, where several sessions say so in a row."""
        if not (self._control and self._control[-1].renew.lease == lease):
            self.send(model_pb2.Up(renew=model_pb2.Renew(lease=lease)))

    def feed(self, port: Port, ids: NDArray[np.uint32]) -> None:
        """Ids of a port, counted in its position already, behind those of it that wait."""
        if port.waiting is None:
            port.waiting = ids
            (self._steps if len(ids) <= max(port.outputs, 1) else self._prompts).append(port)
        else:
            port.waiting = np.concatenate([port.waiting, ids])
        self._stir()

    def generate(self, port: Port, up: model_pb2.Up) -> None:
        """A message that goes behind the port's last ids."""
        if port.waiting is None:
            self.send(up)
        else:
            self._behind[port.handle] = up

    def next(self) -> model_pb2.Up | None:
        """The next message to send, or None."""
        while True:
            if self._control:
                return self._control.popleft()
            if not self._steps and not self._prompts:
                return None
            slices, ids, positions = self._compose()
            if not slices:
                continue
            began = time.perf_counter()
            feed = self._encoding.feed(slices, np.concatenate(ids), np.concatenate(positions))
            self._embedding.observe(time.perf_counter() - began)
            return model_pb2.Up(feed=feed)

    def _stir(self) -> None:
        self.idle.clear()
        self.wake.set()

    def _compose(self) -> tuple[list[model_pb2.Slice], list[NDArray[np.uint32]], list[NDArray[np.int64]]]:
        """As many waiting ids as one frame takes; what is left of a prompt goes behind the others."""
        slices: list[model_pb2.Slice] = []
        ids: list[NDArray[np.uint32]] = []
        positions: list[NDArray[np.int64]] = []
        room = self._frame_rows
        while room and len(slices) < SLICES_PER_FRAME and (self._steps or self._prompts):
            queue = self._steps or self._prompts
            port = queue.popleft()
            if port.waiting is None or port.handle not in self._open:
                self._behind.pop(port.handle, None)
                continue
            outputs = port.outputs if port.awaits == "output" else 0
            cut = _cut(len(port.waiting), outputs, room)
            if not cut:
                queue.appendleft(port)
                break
            start = port.position - len(port.waiting)
            part, rest = port.waiting[:cut], port.waiting[cut:]
            room -= cut
            wanted = 0 if len(rest) else outputs
            slices.append(
                model_pb2.Slice(session=port.handle, position=start, count=cut, outputs=wanted, back=port.back)
            )
            port.back = 0
            ids.append(part)
            positions.append(np.arange(start, start + cut))
            if len(rest):
                port.waiting = rest
                self._prompts.append(port)
            else:
                port.waiting = None
                port.asked = time.perf_counter()
                if (up := self._behind.pop(port.handle, None)) is not None:
                    self._control.append(up)
        return slices, ids, positions


def _cut(waiting: int, outputs: int, room: int) -> int:
    """How many of the ids that wait fit in `room`: rows that are answered together stay together."""
    if waiting <= room:
        return waiting
    return min(room, waiting - outputs)
