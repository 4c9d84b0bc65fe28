"""One lease in use: how many rows it still admits, and how long since its user was last confirmed.

Two bounds, both counted here and neither by a clock, which the host could set:

- rows: `lease.tokens` is a cumulative mark; every row fed counts, prompts included;
- revocation: after `heartbeat_tokens` outputs since the last heartbeat that was answered, nothing is fed until
  another one is. Outputs count from when that heartbeat was *made*, and rows in flight count as outputs. Over an open
  control stream (`control`) a lease is ended at once.

Where the server decodes alone, ids are *reserved* before it is asked for them and *counted* when they arrive, because
the gateway counts them too; which of them are *handed on* to the client is bounded as outputs are. Rows that are fed
again on another replica count again.

Renewals run ahead in the background, so that a session normally never waits: at half of the rows, and as many
outputs before the bound as twice what the last renewal took.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from stip_enclave.release import HeldLease
from stip_protocol.errors import BudgetSpent, LeaseExpired, LeaseSpent, StipError, Unavailable
from stip_protocol.release import NONCE_BYTES, Heartbeat
from stip_protocol.runtime.logs import fault

RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0)
"""Pauses between attempts while the key service cannot be reached; then who waits fails, and the next asks anew."""
LEAD_SHARES = (0.25, 0.75)
"""Least and greatest share of `heartbeat_tokens` that is left when a renewal begins."""
LEAST_RESERVED = 64
"""Ids that are reserved together, where there are as many: a round trip for fewer would not pay."""
TIME_SHARE = 0.5
"""Share of a lease's life after which it is renewed, by the host's clock: a convenience, not a bound."""


class Renewing(Protocol):
    """Where renewals come from (`ReleaseClient`)."""

    async def renew(self, held: HeldLease, heartbeat: Heartbeat) -> HeldLease:
        """A lease with the same handle and a later serial."""


class Waiter(Protocol):
    """Who wants more than is admitted."""

    def failed(self, error: StipError) -> None:
        """The lease admits nothing more."""


class Holder(Waiter, Protocol):
    """A session that runs under a lease."""

    def lease_renewed(self, signed: bytes) -> None:
        """Hand the renewed lease to the gateway, before more rows."""


class LeaseAccount:
    """A lease shared by the sessions of one delegation."""

    def __init__(
        self,
        held: HeldLease,
        renewing: Renewing,
        *,
        heartbeat_tokens: int,
        chunk: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`chunk`: rows asked for at a time; `clock`: unix seconds, of the host."""
        self.held = held
        self.ended: StipError | None = None
        """Why no session may run under this lease any more."""
        self.superseded = False
        """Whether its epoch drains: the sessions under it go on, a new one asks for a new lease."""
        self.began = time.monotonic()
        self._renewing, self._chunk, self._clock = renewing, chunk, clock
        self._heartbeat_tokens = max(1, heartbeat_tokens)
        self._fed = 0
        self._reserved = 0
        self._astray = 0
        """Ids that were reserved for a generation whose end was not seen: the gateway may have counted them."""
        self._reported, self._gained = 0, LEAST_RESERVED
        """Rows fed when the last heartbeat was made, and by how much the mark rose then."""
        self.beats = 0
        """Heartbeats made so far."""
        self._outputs = 0
        self._confirmed, self._confirmed_beat = 0, 0
        """Outputs, and heartbeats, up to the one that was answered last."""
        self._lead = 0.5 * self._heartbeat_tokens
        self._wanted = 0
        self._grows = True
        self._life = self._left_seconds()
        self._pending: tuple[Heartbeat, int] | None = None
        self._holders: set[Holder] = set()
        self._waiting: dict[Waiter, Callable[[], None]] = {}
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"LeaseAccount(fed={self._fed}, tokens={self.held.lease.tokens})"

    @property
    def in_use(self) -> bool:
        return bool(self._holders)

    @property
    def expired(self) -> bool:
        """By the host's clock: good for forgetting leases and for asking early, not for trusting them."""
        return self._left_seconds() <= 0

    def join(self, holder: Holder) -> None:
        """A session starts under this lease. Raises what ended it."""
        if self.ended is not None:
            raise self.ended
        self._holders.add(holder)

    def leave(self, holder: Holder) -> None:
        """The session has ended. Idempotent."""
        self._holders.discard(holder)
        self.withdraw(holder)

    def withdraw(self, waiter: Waiter) -> None:
        """The waiter needs no rows after all: neither called nor failed for having waited. Idempotent."""
        self._waiting.pop(waiter, None)

    def take(self, rows: int, waiter: Waiter, resume: Callable[[], None], *, outputs: int = 1) -> int:
        """Count rows that are fed now, at most `rows`, the last of which give `outputs`; where fewer are allowed,
        `resume` is called when more may be taken, or the waiter gets `failed`.
        """
        taken = min(rows, self._rows_left) if self._admits else 0
        self._fed += taken
        if taken == rows:
            self._outputs += outputs
        self._ask(rows - taken, waiter, resume)
        return taken

    def spare(self) -> int:
        """Rows with an output each that may be taken now."""
        return min(self._rows_left, self._outputs_left) if self._admits else 0

    def returned(self, outputs: int, beat: int) -> None:
        """Outputs that were taken after `beat` heartbeats and gave nothing: drafted ids that were not confirmed.

        A heartbeat that was made in between counted them; without them it admits no more than without drafts.
        """
        self._outputs -= outputs
        if beat < self._confirmed_beat:
            self._confirmed -= outputs
        if self._pending is not None and beat < self.beats:
            heartbeat, counted = self._pending
            self._pending = heartbeat, counted - outputs

    def reserve(self, ids: int, waiter: Waiter, resume: Callable[[], None]) -> int:
        """Set aside ids that a server is asked to decode alone, at most `ids`; where none can be, as `take`.

        One session gets half of what is left, so that the others of the lease get theirs.
        """
        left = self._rows_left
        reserved = min(ids, max(left // 2, min(left, LEAST_RESERVED))) if self._admits else 0
        self._reserved += reserved
        self._ask(0 if reserved else ids, waiter, resume)
        return reserved

    def counted(self, ids: int) -> None:
        """Reserved ids that came."""
        self._reserved -= ids
        self._fed += ids
        self._freed()

    def released(self, ids: int) -> None:
        """Reserved ids that will not come."""
        self._reserved -= ids
        self._freed()

    def forfeited(self, ids: int) -> None:
        """Reserved ids of which nothing more will be heard: some may have passed the gateway and been counted there."""
        self._astray += ids
        self.released(ids)

    def settle(self) -> int:
        """The gateway says that all rows are used, and here some are left. Counts ids that went astray, which may
        explain it, and returns how many; then what is lacking can be asked for."""
        astray, self._astray = min(self._astray, self._rows_left), 0
        self._fed += astray
        return astray

    def hand_on(self, ids: int, waiter: Waiter, resume: Callable[[], None]) -> int:
        """Count ids that came and are handed to the client now, at most `ids`; where fewer are allowed, as `take`."""
        handed = min(ids, self._outputs_left) if self._admits else 0
        self._outputs += handed
        if handed < ids:
            self._ask(1, waiter, resume)
        elif self._due():
            self._start()
        return handed

    @property
    def _rows_left(self) -> int:
        return max(0, self.held.lease.tokens - self._fed - self._reserved)

    @property
    def _outputs_left(self) -> int:
        return self._confirmed + self._heartbeat_tokens - self._outputs

    @property
    def _admits(self) -> bool:
        return self.ended is None and self._outputs_left > 0 and not self.expired

    def _ask(self, lacking: int, waiter: Waiter, resume: Callable[[], None]) -> None:
        """Have `resume` called when what is `lacking` may be there; ask ahead where nothing is."""
        if self.ended is not None:
            return
        if lacking:
            self._waiting[waiter] = resume
            self._wanted = max(self._wanted, lacking)
        if (lacking and not self._set_aside) or self._due():
            self._start()

    @property
    def _set_aside(self) -> bool:
        """Whether rows lack because others have reserved them, and a renewal would not raise the mark yet."""
        soon = max(self._fed - self._reported, self._gained) < LEAST_RESERVED
        return self._reserved > 0 and soon and self._outputs_left > 0

    def _freed(self) -> None:
        if self._waiting and not self._set_aside:
            self._start()

    async def refresh(self) -> None:
        """Renew, where the lease is about to end; wait for it, where the gateway would not admit a session under
        the present one. Raises what ended the lease.
        """
        if self._due() or self.expired:
            self._start()
        if self.expired and self._task is not None:
            await asyncio.shield(self._task)
        if self.ended is not None:
            raise self.ended
        if self.expired:
            raise LeaseExpired("lease: it has ended, and could not be renewed")

    def confirm(self) -> None:
        """Ask now whether the lease still stands, where sessions run under it."""
        if self._holders:
            self._start()

    def end(self, error: StipError) -> None:
        """End all sessions under the lease, and admit no more. Idempotent: the first error stays."""
        if self.ended is not None:
            return
        self.ended = error
        self._fail(list(self._holders), error)

    async def stop(self) -> None:
        """Renew no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _left_seconds(self) -> float:
        return self.held.lease.expires - self._clock()

    def _due(self) -> bool:
        return (
            self._outputs_left <= self._lead
            or (self._grows and 2 * (self.held.lease.tokens - self._fed) <= min(self._chunk, self.held.lease.tokens))
            or self._left_seconds() < TIME_SHARE * self._life
        )

    def _start(self) -> None:
        if self._task is None and self.ended is None:
            self._task = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        """One renewal, and then everybody who waited goes on or fails."""
        try:
            error = await self._attempt()
        except Exception as defect:  # noqa: BLE001 - a defect of ours must end the sessions, not leave them waiting
            structlog.get_logger().error("renewal failed", fault=fault(defect))
            error = StipError("internal error; see the log of the enclave")
        self._task = None
        if self.ended is not None:
            return  # while it was under way: whatever the answer was, it is too late
        if error is None:
            waiting, self._waiting = self._waiting, {}
            for resume in waiting.values():
                resume()
            return
        structlog.get_logger().warning("lease not renewed", code=error.code)
        # Without an answer, or without budget, those that need more rows fail and rows admitted already may be
        # used; any other refusal ends all sessions.
        if isinstance(error, Unavailable | BudgetSpent | LeaseSpent):
            self._grows = False
            self._fail(list(self._waiting), error)
        else:
            self.end(error)

    def _fail(self, waiters: Sequence[Waiter], error: StipError) -> None:
        for waiter in waiters:
            self._waiting.pop(waiter, None)
            waiter.failed(error)

    async def _attempt(self) -> StipError | None:
        for pause in (*RETRY_SECONDS, None):
            if self._pending is None:
                self._pending = self._heartbeat(), self._outputs
                self._reported = self._fed
                self.beats += 1
            heartbeat, _ = self._pending
            # Rows that were taken in this turn of the event loop leave first: signing takes longer than writing them.
            await asyncio.sleep(0)
            try:
                held = await self._renewing.renew(self.held, heartbeat)
            except Unavailable as error:
                if pause is None:
                    return error
                await asyncio.sleep(pause)
            except StipError as error:
                self._pending = None
                return error
            else:
                _, outputs = self._pending
                self._pending = None
                return self._renewed(held, outputs)
        return None

    def _heartbeat(self) -> Heartbeat:
        lease = self.held.lease
        return Heartbeat(
            handle=lease.handle,
            serial=lease.serial,
            nonce=secrets.token_bytes(NONCE_BYTES),
            fed=self._fed,
            wanted=max(self._chunk, self._wanted + self._reserved),
        )

    def _renewed(self, held: HeldLease, outputs: int) -> StipError | None:
        self._gained = held.lease.tokens - self.held.lease.tokens
        self._grows = self._gained > 0
        self.held = held
        self.superseded = self.superseded or held.superseded
        self._confirmed, self._confirmed_beat = outputs, self.beats
        self._wanted, self._life = 0, self._left_seconds()
        least, greatest = (share * self._heartbeat_tokens for share in LEAD_SHARES)
        self._lead = min(max(2.0 * (self._outputs - outputs), least), greatest)
        if self.expired:
            return LeaseExpired.because("renewed lease expires", held.lease.expires, "a time to come")
        for holder in list(self._holders):
            holder.lease_renewed(held.signed)
        return None
