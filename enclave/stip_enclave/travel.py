"""How a session's rows travel: the seat it has, the next one where that is lost, and the one it warms before it moves.

- *Lost* (the link broke, or the replica refuses to go on for reasons of its own): a seat elsewhere, and the history is
  fed again from its first row. Nothing is sampled again.
- *Draining*: a seat elsewhere is warmed while the present one goes on; between two tokens the session changes over,
  and only what was sampled meanwhile is still to be fed. With nowhere to go the session stays to its end.
- *Idle*: a session between two turns takes no seat; the next turn does.

What a replica says of its own state (`Unavailable` and what is below it) makes a session travel. A wrong answer ends
it: that is a question of integrity, and asking somebody else would hide it.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog

from stip_enclave.config import Limits
from stip_enclave.lease import LeaseAccount
from stip_enclave.link import Link
from stip_enclave.links import RETRY_SECONDS, Links
from stip_enclave.patience import Patience
from stip_enclave.seat import Seat
from stip_protocol.errors import LeaseSpent, ReplicaLost, StipError, Unavailable
from stip_protocol.runtime.logs import fault

START_ATTEMPTS = 3
"""Replicas that a new session asks before its client hears that there is no room."""
REPLAYED_TIMES = 16
"""How often its own length a session may feed again elsewhere, where that is more than `Limits.replayed_rows`."""


class Passenger(Protocol):
    """A way of decoding, as its travel sees it."""

    @property
    def running(self) -> bool:
        """Whether a turn runs."""

    @property
    def history_length(self) -> int:
        """Rows that a new seat has to be fed."""

    def seat(self, link: Link) -> Seat:
        """A seat of the right kind, not taken yet."""

    def busy(self, seat: Seat) -> bool:
        """Whether something is awaited there."""

    def advance(self) -> None:
        """There is a seat again, or one more is ready: go on."""

    async def warm(self, seat: Seat) -> None:
        """Feed a seat all but the last id of the history, and return once its prefill is done."""

    def failed(self, error: StipError) -> None:
        """The session is over."""


class Travel:
    """The seats of one session."""

    def __init__(self, passenger: Passenger, links: Links, account: LeaseAccount, limits: Limits) -> None:
        self.positions = 0
        """Rows that a seat must have room for."""
        self._passenger, self._links, self._account, self._limits = passenger, links, account, limits
        self._request_id = ""
        self._seat: Seat | None = None
        self._warm: Seat | None = None
        self._next: Seat | None = None
        """Warm, and ready to be changed to."""
        self._task: asyncio.Task[None] | None = None
        self._patience: Patience | None = None
        """Since the last answer that was used, where a seat was lost after it."""
        self._replayed = 0
        """Rows that seats after the first were taken for, and those that went astray."""
        self._log = structlog.get_logger()

    async def start(self, request_id: str, max_positions: int) -> None:
        """The first seat, for at most `max_positions` rows (0: as many as are possible there).

        Raises what the lease, the gateway or the replicas refuse it with.
        """
        self._request_id = request_id
        self._log = self._log.bind(request_id=request_id)
        refused: set[str] = set()
        for attempt in range(1, START_ATTEMPTS + 1):
            link = await self._place(max_positions, refused)
            seat = self._passenger.seat(link)
            self.positions = max_positions or link.max_positions
            try:
                await self._occupy(seat, replaying=False)
            except Unavailable as error:
                refused.add(link.replica)
                if attempt == START_ATTEMPTS or not self._links.elsewhere(link):
                    error.retry_after = error.retry_after or RETRY_SECONDS
                    raise
            else:
                self._seat = seat
                return

    def here(self) -> Seat | None:
        """The seat to go on with; None while there is none: `advance` is called when there is."""
        self._move_on()
        if self._seat is None and self._task is None:
            self._task = asyncio.create_task(self._depart())
        return self._seat

    @property
    def seat(self) -> Seat | None:
        """The present seat."""
        return self._seat

    @property
    def moving(self) -> bool:
        """Whether a warm seat waits for the present one to fall silent."""
        return self._next is not None

    def rest(self) -> None:
        """Between two turns: leave a replica that drains, for the seat that is warm if there is one, unless that is
        still being warmed. The next turn has all its time to find one."""
        self._move_on()
        seat = self._seat
        if seat is not None and seat.link.draining and self._warm is None:
            self._log.info("session leaves a draining replica", replica=seat.link.replica)
            self._stop()
            self.abandon()
        if self._patience is not None:
            self._patience.renew()

    def abandon(self) -> None:
        """Give the present seat up; the next one is fed from the first row."""
        if self._seat is not None:
            self._seat.leave()
            self._seat = None

    def progressed(self) -> None:
        """An answer came and was used: the next loss has all its time again."""
        self._patience = None

    def renew(self, lease: bytes) -> None:
        """Tell the gateway of a renewed lease."""
        for seat in (self._seat, self._warm):
            if seat is not None:
                seat.link.renew(lease)

    def close(self) -> None:
        """Leave everything. Idempotent."""
        self._stop()
        self.abandon()

    # -- from the seats -----------------------------------------------------------------------------------------------

    def failed(self, error: StipError) -> None:
        self._passenger.failed(error)

    def lost(self, seat: Seat, error: StipError) -> None:
        """A seat was ended by the other side, or with its link."""
        if seat is self._seat:
            self._log.warning("seat lost", replica=seat.link.replica, code=error.code)
            seat.leave()
            self._seat = None
            if not self._passes(error):
                self._passenger.failed(error)
                return
            self._patience = self._patience or Patience(self._limits.failover_seconds)
            self._patience.avoid.add(seat.link.replica)
            self._change_over()
            self._passenger.advance()
        elif seat is self._warm and not self._passes(error):
            self._passenger.failed(error)
        elif seat is self._warm and not seat.ready.done():
            seat.ready.set_exception(error)
        elif seat is self._warm:
            seat.leave()
            self._warm = self._next = None
            if self._seat is not None and self._seat.link.draining:
                self.draining(self._seat)

    def draining(self, seat: Seat) -> None:
        """A replica wants to be rid of a seat."""
        if seat is self._warm:
            self.lost(seat, ReplicaLost("the replica drains"))
        elif seat is self._seat and not self._passenger.running:
            self.rest()
        elif seat is self._seat and self._task is None:
            self._task = asyncio.create_task(self._move(seat))

    def _passes(self, error: StipError) -> bool:
        """Whether a seat can be sought elsewhere after an error of this one."""
        if not isinstance(error, LeaseSpent):
            return isinstance(error, Unavailable)
        settled = self._account.settle()
        self._replayed += settled  # a gateway that says so for nothing must not cost a user more than one that breaks
        return settled > 0

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _depart(self) -> None:
        """A seat for a session that has none."""
        self._patience = self._patience or Patience(self._limits.failover_seconds)
        try:
            seat = await self._elsewhere(self._patience)
        except StipError as error:
            self._task = self._patience = None
            if self._passenger.running:
                self._passenger.failed(error)
            return
        except Exception as error:  # noqa: BLE001 - a defect of ours must end the session, not leave it waiting
            self._defect(error)
            return
        self._task = None
        self._seat = seat
        self._log.info("session goes on", replica=seat.link.replica)
        self._passenger.advance()
        if self._seat is seat and not self._passenger.busy(seat):
            seat.arrived()
        if self._seat is seat and seat.link.draining:
            self.draining(seat)

    async def _move(self, old: Seat) -> None:
        """Warm a seat while `old` goes on. What was warmed is changed to by `here`, between two tokens."""
        patience = Patience(self._limits.failover_seconds)
        patience.avoid.add(old.link.replica)
        try:
            while self._warm is None:
                seat = await self._elsewhere(patience)
                self._warm = seat
                try:
                    await self._passenger.warm(seat)
                except Unavailable as error:
                    self._log.warning("warm seat lost", replica=seat.link.replica, code=error.code)
                    patience.avoid.add(seat.link.replica)
                    seat.leave()
                    self._warm = None
        except StipError as error:
            self._log.warning("session stays on a draining replica", replica=old.link.replica, code=error.code)
            self._task = None
            self._stop()
            if not self._passenger.running:
                self.rest()
            return
        except Exception as error:  # noqa: BLE001 - as above
            self._defect(error)
            return
        self._task = None
        self._next = self._warm
        self._log.info("session moves", replica=old.link.replica, to=seat.link.replica)
        self._passenger.advance()
        self._move_on()

    def _move_on(self) -> None:
        """Change over to the seat that is warm, if there is one and the present one is silent."""
        if self._next is not None and (self._seat is None or not self._passenger.busy(self._seat)):
            self._change_over()

    def _change_over(self) -> None:
        """From the present seat, or from none, to the one that is warm or being warmed."""
        seat = self._warm
        if seat is None:
            if self._task is not None:
                self._stop()  # a move from a seat that is gone: a departure takes its place
            return
        if self._next is None:
            self._warm = None
            self._stop()
        self.abandon()
        self._seat, self._warm, self._next = seat, None, None
        if seat.link.draining:
            self.draining(seat)

    async def _elsewhere(self, patience: Patience) -> Seat:
        """A seat with room for the session's history. Raises `ReplicaLost` where `patience` ends first, or where the
        session was fed again too often."""
        while True:
            await patience.before_an_attempt()
            rows, seat = self._passenger.history_length, None
            most = max(self._limits.replayed_rows, REPLAYED_TIMES * rows)
            if self._replayed + rows > most:
                raise ReplicaLost(f"this session's seats were lost too often: {self._replayed} rows were fed again")
            try:
                seat = self._passenger.seat(await self._place(self.positions, patience.avoid))
                await self._occupy(seat, replaying=rows > 1)
            except Unavailable as error:
                self._log.info("no seat yet", code=error.code)
                if seat is not None:
                    patience.avoid.add(seat.link.replica)
            else:
                self._replayed += rows
                return seat
            finally:
                if seat is not None:
                    patience.extend(seat.waited)

    async def _place(self, positions: int, avoid: set[str]) -> Link:
        certificate = self._account.held.link_certificate
        return await self._links.place(certificate, positions=positions, avoid=avoid)

    async def _occupy(self, seat: Seat, *, replaying: bool) -> None:
        lease = self._account.held.signed
        await seat.take(lease, self._request_id, self.positions, replaying=replaying)
        if self._account.held.signed != lease:
            seat.link.renew(self._account.held.signed)

    def _stop(self) -> None:
        """End what is under way, and leave the seat that is being warmed."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._warm is not None:
            self._warm.leave()
        self._warm = self._next = None

    def _defect(self, error: Exception) -> None:
        self._task = None
        self._log.error("travel failed", fault=fault(error))
        self._passenger.failed(StipError("internal error; see the log of the enclave"))
