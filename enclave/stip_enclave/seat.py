"""A session's place on one link: the owner of one port.

A session may sit on several in its life, and on two at a time while it moves. What comes for a seat that was left is
nobody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stip_enclave.lease import LeaseAccount
from stip_enclave.link import Link
from stip_enclave.outbox import Port
from stip_protocol.errors import FrameInvalid, StipError

if TYPE_CHECKING:
    from stip_enclave.travel import Travel


class Seat:
    """What all seats share: how they are taken, lost and left. How rows are fed is the way of decoding's."""

    port: Port
    """Once `take` has returned."""

    def __init__(self, travel: Travel, link: Link) -> None:
        self.link = link
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Of a seat that is warmed: done when its prefill is."""
        self.over: StipError | None = None
        """Why the other side ended it."""
        self.left = False
        self.warming = False
        """What is answered first shows that the rows before are there, and is dropped."""
        self.waited = 0.0
        """Seconds until it was this session's turn to feed its history."""
        self._travel = travel
        self._replaying = False

    async def take(self, lease: bytes, request_id: str, positions: int, *, replaying: bool) -> None:
        """Open the port, and with `replaying` wait for this session's turn to feed its history.

        Raises what the replica refuses it with, `DeadlineExceeded` or `ReplicaLost`.
        """
        if replaying:
            began = time.monotonic()
            await self.link.replays.acquire()
            self._replaying, self.waited = True, time.monotonic() - began
        try:
            self.port = await self.link.open(self, lease, request_id, positions)
            if self.over is not None:
                raise self.over
        except BaseException:
            self.arrived()
            raise

    async def fill(self, ids: NDArray[np.uint32], account: LeaseAccount, *, outputs: int) -> None:
        """Feed ids [n] of the history as far as the lease admits them, and then the rest.

        Raises what the lease is refused with, or what the seat was lost with.
        """
        with self._waiting(account) as waiting:
            while len(ids):
                rows = account.take(len(ids), waiting, waiting.more.set, outputs=0)
                part, ids = ids[:rows], ids[rows:]
                if rows:
                    self.warming = outputs > 0 and not len(ids)
                    self.link.feed(self.port, part, outputs=0 if len(ids) else outputs)
                if len(ids):
                    await waiting.wait()

    async def reserve_one(self, account: LeaseAccount) -> None:
        """Reserve one id of the lease. Raises as `fill`."""
        with self._waiting(account) as waiting:
            while not account.reserve(1, waiting, waiting.more.set):
                await waiting.wait()

    def arrived(self) -> None:
        """The history is there, or is not going to be: the next session may feed its own. Idempotent."""
        if self._replaying:
            self._replaying = False
            self.link.replays.release()

    def warmed(self) -> None:
        """The prefill is there."""
        self.warming = False
        if not self.ready.done():
            self.ready.set_result(None)

    def leave(self) -> None:
        """Give the place up. Idempotent."""
        if not self.left:
            self.left = True
            self.arrived()
            if self.over is None:
                self.link.close(self.port)

    @contextlib.contextmanager
    def _waiting(self, account: LeaseAccount) -> Iterator[_Waiting]:
        waiting = _Waiting(self.ready)
        try:
            yield waiting
        finally:
            account.withdraw(waiting)

    # -- the port's owner ---------------------------------------------------------------------------------------------

    def failed(self, error: StipError) -> None:
        """What was answered cannot be used."""
        if not self.left:
            self._travel.failed(error)

    def lost(self, error: StipError) -> None:
        """The port has ended."""
        self.over = error
        self.arrived()
        if not self.left:
            self._travel.lost(self, error)

    def draining(self) -> None:
        """The replica wants to be rid of this session."""
        if not self.left:
            self._travel.draining(self)

    def came(self, ids: NDArray[np.uint32], done: bool, compute: float) -> None:
        """Ids of a generation: nothing that a seat which goes step by step has asked for."""
        self.failed(FrameInvalid("reply: ids, to a session that goes step by step"))


class _Waiting:
    """Waits for more rows of a lease, or for the end of the seat that wants them."""

    def __init__(self, ready: asyncio.Future[None]) -> None:
        self.more = asyncio.Event()
        self._ready = ready

    async def wait(self) -> None:
        more = asyncio.ensure_future(self.more.wait())
        try:
            await asyncio.wait((more, self._ready), return_when=asyncio.FIRST_COMPLETED)
        finally:
            more.cancel()
        self.more.clear()
        if self._ready.done():
            self._ready.result()

    def failed(self, error: StipError) -> None:
        """The lease admits no more: a seat that cannot be filled is no seat."""
        if not self._ready.done():
            self._ready.set_exception(error)
