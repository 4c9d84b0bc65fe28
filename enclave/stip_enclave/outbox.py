"""What is still to leave on a link: messages in order, and ids that become rows when a frame is made of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Histogram

from stip_protocol.errors import StipError
from stip_protocol.wire import model_pb2

SLICES_PER_FRAME = 256
Awaited = Literal["nothing", "output", "row"]


class Owner(Protocol):
    """The session behind a port, as the link sees it."""

    def failed(self, error: StipError) -> None:
        """The session has ended on the other side, or the link ended it. Called once, and nothing after it."""


@dataclass(slots=True, eq=False)
class Port:
    """One session's place on a link."""

    handle: bytes = field(repr=False)
    owner: Owner = field(repr=False)
    request_id: str
    opened: asyncio.Future[None] = field(repr=False)
    position: int = 0
    """Rows handed to the link so far: the position of the next one."""
    awaits: Awaited = "nothing"
    asked: float = 0.0
    """When the last row left (`time.perf_counter`)."""
    waiting: NDArray[np.uint32] | None = field(default=None, repr=False)
    """Ids that are still to leave as rows; the last of them is at `position - 1`."""


Embed = Callable[[NDArray[np.uint32], NDArray[np.int64]], bytes]
"""ids [n] and positions [n] to n keyed rows."""


class Outbox:
    """Control messages go first, because an opening or a renewal comes before the rows that need it; then single rows
    of running sessions; then prompts, piece by piece and in turn.
    """

    def __init__(self, embed: Embed, frame_rows: int, open_ports: Container[bytes], embedding: Histogram) -> None:
        """`frame_rows`: of one frame at most; `open_ports`: handles whose rows still leave."""
        self.wake = asyncio.Event()
        """Set when there is something to send."""
        self._embed, self._frame_rows, self._open, self._embedding = embed, frame_rows, open_ports, embedding
        self._control: deque[model_pb2.Up] = deque()
        self._singles: deque[Port] = deque()
        self._prompts: deque[Port] = deque()

    def send(self, up: model_pb2.Up) -> None:
        """A control message."""
        self._control.append(up)
        self.wake.set()

    def renew(self, lease: bytes) -> None:
        """A renewed lease: once, where several sessions say so in a row."""
        if not (self._control and self._control[-1].renew.lease == lease):
            self.send(model_pb2.Up(renew=model_pb2.Renew(lease=lease)))

    def feed(self, port: Port, ids: NDArray[np.uint32]) -> None:
        """Ids of a port, counted in its position already, behind those of it that wait."""
        if port.waiting is None:
            port.waiting = ids
            (self._singles if len(ids) == 1 else self._prompts).append(port)
        else:
            port.waiting = np.concatenate([port.waiting, ids])
        self.wake.set()

    def next(self) -> model_pb2.Up | None:
        """The next message to send, or None."""
        if self._control:
            return self._control.popleft()
        while self._singles or self._prompts:
            slices, ids, positions = self._compose()
            if not slices:
                continue
            began = time.perf_counter()
            rows = self._embed(np.concatenate(ids), np.concatenate(positions))
            self._embedding.observe(time.perf_counter() - began)
            return model_pb2.Up(feed=model_pb2.Feed(slices=slices, rows=rows))
        return None

    def _compose(self) -> tuple[list[model_pb2.Slice], list[NDArray[np.uint32]], list[NDArray[np.int64]]]:
        """As many waiting ids as one frame takes; what is left of a prompt goes behind the others."""
        slices: list[model_pb2.Slice] = []
        ids: list[NDArray[np.uint32]] = []
        positions: list[NDArray[np.int64]] = []
        room = self._frame_rows
        while room and len(slices) < SLICES_PER_FRAME and (self._singles or self._prompts):
            port = (self._singles or self._prompts).popleft()
            if port.waiting is None or port.handle not in self._open:
                continue
            start = port.position - len(port.waiting)
            part, rest = port.waiting[:room], port.waiting[room:]
            room -= len(part)
            last = port.awaits == "output" and not len(rest)
            slices.append(model_pb2.Slice(session=port.handle, position=start, count=len(part), last=last))
            ids.append(part)
            positions.append(np.arange(start, start + len(part)))
            if len(rest):
                port.waiting = rest
                self._prompts.append(port)
            else:
                port.waiting = None
                port.asked = time.perf_counter()
        return slices, ids, positions
