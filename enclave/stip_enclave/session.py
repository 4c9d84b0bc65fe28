"""One user's session: ids in, ids out, turn after turn over one KV cache.

The sequence is what the client sent and what it was given, in order. Ids that are part of it but not yet fed (the
last token of a turn; what a cancelled turn left) are `pending` and go first in the next turn. A stop id is no part
of it: it was sampled and never given.

Everything here runs on the event loop without awaiting, from three sides: the client's frames (`begin`, `cancel`,
`taken`), the decoder's results (`answered`, `needs_row`), and the lease (`_advance`, when more rows may be fed).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import structlog
from numpy.typing import NDArray
from prometheus_client import Counter, Histogram

from stip_enclave.config import Limits
from stip_enclave.lease import LeaseAccount
from stip_enclave.link import Link
from stip_enclave.outbox import Port
from stip_enclave.tables import Tables
from stip_enclave.turns import Turn, TurnRequest
from stip_protocol.errors import (
    MESSAGE_LIMIT,
    DeadlineExceeded,
    Draining,
    FrameInvalid,
    PositionRefused,
    RequestInvalid,
    StipError,
)
from stip_protocol.telemetry import ADDED_LATENCY, TIME_BETWEEN_TOKENS, TIME_TO_FIRST_TOKEN, TOKENS, Telemetry
from stip_protocol.wire import enclave_pb2


class Kind(IntEnum):
    """`Step.kind` of wire/enclave.proto."""

    TOKEN = 0
    STOPPED = 1
    MAX_TOKENS = 2
    CANCELLED = 3
    POSITIONS = 4


@dataclass(frozen=True, slots=True)
class Meters:
    """What sessions measure."""

    telemetry: Telemetry
    first: Histogram
    between: Histogram
    added: Histogram
    prompt: Counter
    generated: Counter

    @classmethod
    def of(cls, telemetry: Telemetry) -> Meters:
        tokens = telemetry.counter(TOKENS)
        return cls(
            telemetry,
            telemetry.histogram(TIME_TO_FIRST_TOKEN),
            telemetry.histogram(TIME_BETWEEN_TOKENS),
            telemetry.histogram(ADDED_LATENCY),
            tokens.labels(direction="prompt"),
            tokens.labels(direction="generated"),
        )


class Session:
    """Owner of a port on a link, holder of a lease, and the queue of frames to one client."""

    def __init__(
        self, tables: Tables, link: Link, account: LeaseAccount, limits: Limits, meters: Meters, *, max_positions: int
    ) -> None:
        """`max_positions`: 0 for as many as the instance and its replica allow. Raises `PositionRefused` for more."""
        if max_positions > link.max_positions:
            raise PositionRefused.because("max_positions", max_positions, f"at most {link.max_positions}")
        self.max_positions = max_positions or link.max_positions
        self.frames: asyncio.Queue[enclave_pb2.EnclaveFrame | None] = asyncio.Queue()
        """To the client; None ends the stream. Bounded by pausing the session at `Limits.steps_ahead`."""
        self.asking: Turn | None = None
        """The turn whose output is awaited, whether or not it still runs."""
        self.ended = False
        self._tables, self._link, self._account = tables, link, account
        self._limits, self._meters = limits, meters
        self._port: Port | None = None
        self._turn: Turn | None = None
        self._pending: NDArray[np.uint32] = np.empty(0, np.uint32)
        self._length = 0
        self._stalled = False
        self._leaving = False
        self._timer: asyncio.TimerHandle | None = None
        self._log = structlog.get_logger()

    async def start(self, request_id: str) -> None:
        """Open on the link. Raises what the lease, the gateway or the replica refuses it with."""
        self._log = self._log.bind(request_id=request_id)
        self._account.join(self)
        try:
            self._port = await self._link.open(self, self._account.held.signed, request_id, self.max_positions)
        except BaseException:
            self.close()
            raise
        self._wait("a turn")

    # -- from the client ------------------------------------------------------------------------------------------

    def begin(self, request: TurnRequest) -> None:
        """Start a turn. Raises `FrameInvalid`, `RequestInvalid` or `PositionRefused`, which end the session."""
        if self._turn is not None:
            raise FrameInvalid("turn: the one before has not ended; read its last step or cancel it first")
        if self.frames.qsize() > self._limits.steps_ahead:
            raise FrameInvalid.because("turn", "unread steps", f"at most {self._limits.steps_ahead}; read them first")
        if not len(request.ids) and not len(self._pending):
            raise RequestInvalid.because("turn ids", "none", "at least one where nothing is left to go on from")
        room = self.max_positions - self._length
        if len(request.ids) > room:
            raise PositionRefused.because("turn ids", len(request.ids), f"at most {room}, the positions left")
        self._tables.require_ids(request.ids)
        self._still()
        self._turn = request.turn
        self._pending = np.concatenate([self._pending, request.ids])
        self._length += len(request.ids)
        self._meters.prompt.inc(len(request.ids))
        if self._length == self.max_positions:
            self._finish(Kind.POSITIONS)
        else:
            self._advance()

    def cancel(self) -> None:
        """Stop the running turn, if there is one; an output that is under way is dropped when it comes."""
        if self._turn is not None:
            self._finish(Kind.CANCELLED)

    def taken(self) -> None:
        """The client took a frame: a paused session may go on."""
        if self._stalled and self.frames.qsize() <= self._limits.steps_ahead // 2:
            self._stalled = False
            self._still()
            self._advance()

    def leave(self) -> None:
        """End when the running turn has: the enclave is going away, or the client has no more to say."""
        self._leaving = True
        if self._turn is None:
            self.frames.put_nowait(None)

    def drain(self) -> None:
        """As `leave`, and tell the client why."""
        if self._turn is None:
            self.failed(Draining("the enclave takes no more turns"))
        else:
            self._leaving = True

    def close(self) -> None:
        """Free everything. Idempotent."""
        self.ended = True
        self._still()
        self._account.leave(self)
        if self._turn is not None:
            self._turn.ended = True
            self._turn = None
        if self._port is not None:
            self._link.close(self._port)
        self._pending = np.empty(0, np.uint32)

    # -- from the lease and the link --------------------------------------------------------------------------------

    def failed(self, error: StipError) -> None:
        """End the session with an error, told to the client after the steps it has not read yet."""
        if self.ended:
            return
        self.close()
        self._meters.telemetry.refused(error.code)
        self._log.warning("session failed", code=error.code)
        self.frames.put_nowait(failure(error))

    def lease_renewed(self, signed: bytes) -> None:
        """The gateway must know a lease before rows that need it."""
        self._link.renew(signed)

    # -- from the decoder -------------------------------------------------------------------------------------------

    def answered(self, turn: Turn, token: int | None, compute: float) -> None:
        """The output that `turn` waited for was sampled to `token` (None: dropped, the turn had ended)."""
        self.asking = None
        if self.ended:
            return
        if turn.ended or token is None:
            self._advance()
            return
        self._measure(turn, compute)
        if token in turn.stop_ids:
            self._finish(Kind.STOPPED)
            return
        turn.step += 1
        self._length += 1
        self._pending = np.array([token], np.uint32)
        self._meters.generated.inc()
        end = None
        if turn.step == turn.max_tokens:
            end = Kind.MAX_TOKENS
        elif self._length == self.max_positions:
            end = Kind.POSITIONS
        elif self.frames.qsize() + 1 >= self._limits.steps_ahead:
            self._stalled = True
            self._wait("a client that reads")
        else:
            self._advance()
        self.frames.put_nowait(_step(Kind.TOKEN, token, self._length))
        if end is not None:
            self._finish(end)

    def needs_row(self, turn: Turn, compute: float) -> None:
        """The largest logits did not decide: ask for the whole row."""
        if self.ended or turn.ended or self._port is None:
            self.answered(turn, None, compute)
        else:
            turn.compute += compute
            self._link.recall(self._port)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Feed what is pending, as far as nothing is awaited, the client keeps up and the lease admits it."""
        waiting = self.ended or self._turn is None or self.asking is not None or self._stalled
        if waiting or self._port is None or not len(self._pending):
            return
        rows = self._account.take(len(self._pending), self, self._advance)
        if not rows:
            return
        ids, self._pending = self._pending[:rows], self._pending[rows:]
        last = not len(self._pending)
        if last:
            self.asking = self._turn
        self._link.feed(self._port, ids, last=last)

    def _measure(self, turn: Turn, compute: float) -> None:
        now = time.perf_counter()
        if turn.last is None:
            self._meters.first.observe(now - turn.began)
        else:
            gap = now - turn.last
            self._meters.between.observe(gap)
            self._meters.added.observe(max(0.0, gap - turn.compute - compute))
        turn.last, turn.compute = now, 0.0

    def _finish(self, kind: Kind) -> None:
        assert self._turn is not None
        self._turn.ended = True
        self._turn, self._stalled = None, False
        self._account.withdraw(self)
        self.frames.put_nowait(_step(kind, 0, self._length))
        if self._leaving:
            self.frames.put_nowait(None)
        else:
            self._wait("a turn")

    def _wait(self, what: str) -> None:
        """End the session if `what` does not come in time."""
        self._still()
        error = DeadlineExceeded.because("idle", f"no {what}", f"{self._limits.idle_seconds:g} s")
        self._timer = asyncio.get_running_loop().call_later(self._limits.idle_seconds, self.failed, error)

    def _still(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def failure(error: StipError) -> enclave_pb2.EnclaveFrame:
    """How a client hears of an error."""
    return enclave_pb2.EnclaveFrame(failed=enclave_pb2.Failed(code=error.code, message=error.message[:MESSAGE_LIMIT]))


def _step(kind: Kind, token: int, position: int) -> enclave_pb2.EnclaveFrame:
    """Every step has one size: all fields are fixed-width and set."""
    return enclave_pb2.EnclaveFrame(step=enclave_pb2.Step(id=token, kind=int(kind), position=position))
