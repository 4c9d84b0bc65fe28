"""One user's session: ids in, ids out, turn after turn over one history.

The history is what the client sent and what it was given, in order. A stop id is no part of it: it was sampled and
never given. Where its rows are, and how they get there, is the business of `travel`; how ids come of them, of
`stepwise` or `alone`.

Everything here runs on the event loop without awaiting, from three sides: the client's frames (`begin`, `cancel`,
`taken`), the way of decoding (`accept`, `tell`), and the lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import IntEnum

import structlog

from stip_enclave.config import Limits
from stip_enclave.decoding import Decoding
from stip_enclave.history import History
from stip_enclave.instances import Instance
from stip_enclave.lease import LeaseAccount
from stip_enclave.meters import Meters
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
from stip_protocol.rpc import retry_after_ms
from stip_protocol.wire import enclave_pb2


class Kind(IntEnum):
    """`Step.kind` of wire/enclave.proto."""

    TOKEN = 0
    STOPPED = 1
    MAX_TOKENS = 2
    CANCELLED = 3
    POSITIONS = 4


class Session:
    """Holder of a lease and of the queue of frames to one client."""

    def __init__(self, instance: Instance, account: LeaseAccount, limits: Limits, meters: Meters) -> None:
        """Raises `InstanceRefused` where no grant has opened the instance."""
        self.history = History()
        self.turn: Turn | None = None
        self.paused = False
        self.max_positions = 0
        """Once it has started."""
        self.frames: asyncio.Queue[enclave_pb2.EnclaveFrame | None] = asyncio.Queue()
        """To the client; None ends the stream. Bounded by pausing the session at `Limits.steps_ahead`."""
        self.ended = False
        self._account, self._limits, self._meters = account, limits, meters
        self._encoding = instance.encoding
        self._decoding: Decoding = instance.decoding(self, account)
        """Until it is closed: what a grant has opened must not be kept by a client that does not read."""
        self._ready: list[enclave_pb2.EnclaveFrame | None] = []
        self._leaving = False
        self._timer: asyncio.TimerHandle | None = None
        self._log = structlog.get_logger()

    async def start(self, request_id: str, max_positions: int) -> None:
        """Open on a replica. `max_positions`: 0 for as many as the instance and that replica allow.

        Raises what the lease, the gateway or the replicas refuse it with.
        """
        self._log = self._log.bind(request_id=request_id)
        self._account.join(self)
        travel = self._decoding.travel
        try:
            await travel.start(request_id, max_positions)
        except BaseException:
            self.close()
            raise
        self.max_positions = travel.positions
        if self.ended:  # by its lease, meanwhile: the client hears of it
            travel.close()
        else:
            self._wait("a turn")

    # -- from the client ------------------------------------------------------------------------------------------

    def begin(self, request: TurnRequest) -> None:
        """Start a turn. Raises `FrameInvalid`, `RequestInvalid` or `PositionRefused`, which end the session.

        A turn for a session that has failed is passed over: its client has not read yet that it did.
        """
        if self.ended:
            return
        if self.turn is not None:
            raise FrameInvalid("turn: the one before has not ended; read its last step or cancel it first")
        if self.frames.qsize() > self._limits.steps_ahead:
            raise FrameInvalid.because("turn", "unread steps", f"at most {self._limits.steps_ahead}; read them first")
        if not len(request.ids) and not self._decoding.goes_on:
            raise RequestInvalid.because("turn ids", "none", "at least one where nothing is left to go on from")
        room = self.max_positions - len(self.history)
        if len(request.ids) > room:
            raise PositionRefused.because("turn ids", len(request.ids), f"at most {room}, the positions left")
        self._encoding.require_ids(request.ids)
        self._still()
        self.turn = request.turn
        self.history.extend(request.ids)
        self._meters.prompt.inc(len(request.ids))
        if len(self.history) == self.max_positions:
            self._finish(Kind.POSITIONS)
            self.tell()
        else:
            self._decoding.begin()

    def cancel(self) -> None:
        """Stop the running turn, if there is one; an output that is under way is dropped when it comes."""
        if self.turn is not None:
            self._finish(Kind.CANCELLED)
            self._decoding.cancelled()
            self.tell()

    def taken(self) -> None:
        """The client took a frame: a paused session may go on."""
        if self.paused and self.frames.qsize() <= self._limits.steps_ahead // 2:
            self.paused = False
            self._still()
            self._decoding.advance()

    def leave(self) -> None:
        """End when the running turn has: the enclave is going away, or the client has no more to say."""
        self._leaving = True
        if self.turn is None:
            self.frames.put_nowait(None)

    def drain(self) -> None:
        """As `leave`, and tell the client why."""
        if self.turn is None:
            self.failed(Draining("the enclave takes no more turns"))
        else:
            self._leaving = True

    def close(self) -> None:
        """Free everything. Idempotent."""
        if self.ended:
            return
        self.ended = True
        self._still()
        self._account.leave(self)
        if self.turn is not None:
            self.turn.ended = True
            self.turn = None
        self.paused = False
        self._decoding.travel.close()
        del self._decoding, self._encoding
        self.history.clear()

    # -- from the lease and the way of decoding -----------------------------------------------------------------------

    def failed(self, error: StipError) -> None:
        """End the session with an error, told to the client after the steps it has not read yet."""
        if self.ended:
            return
        self.close()
        self._meters.telemetry.refused(error.code)
        self._log.warning("session failed", code=error.code)
        self.tell()
        self.frames.put_nowait(failure(error))

    def lease_renewed(self, signed: bytes) -> None:
        """The gateway must know a lease before rows that need it."""
        if not self.ended:
            self._decoding.travel.renew(signed)

    @property
    def room(self) -> int:
        """Steps that the client may still be behind."""
        return self._limits.steps_ahead - self.frames.qsize() - len(self._ready)

    def measure(self, turn: Turn, tokens: int, compute: float) -> None:
        self._meters.answered(turn, tokens, compute)

    def accept(self, tokens: Sequence[int]) -> None:
        """Sampled ids of the running turn, in order. What lies behind its end is dropped."""
        for token in tokens:
            turn = self.turn
            if turn is None:
                return
            if token in turn.stop_ids:
                self._finish(Kind.STOPPED)
                return
            turn.step += 1
            self.history.extend([token])
            self._meters.generated.inc()
            self._ready.append(_step(Kind.TOKEN, token, len(self.history)))
            if turn.step == turn.max_tokens:
                self._finish(Kind.MAX_TOKENS)
            elif len(self.history) == self.max_positions:
                self._finish(Kind.POSITIONS)
        if self.turn is not None and self.room <= 0:
            self.paused = True
            self._wait("a client that reads")

    def stop(self) -> None:
        """The running turn came upon a stop id on the server."""
        self._finish(Kind.STOPPED)

    def tell(self) -> None:
        """Hand what was accepted to the client."""
        ready, self._ready = self._ready, []
        for frame in ready:
            self.frames.put_nowait(frame)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _finish(self, kind: Kind) -> None:
        assert self.turn is not None
        self.turn.ended = True
        self.turn, self.paused = None, False
        self._account.withdraw(self)
        self._ready.append(_step(kind, 0, len(self.history)))
        if self._leaving:
            self._ready.append(None)
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
    return enclave_pb2.EnclaveFrame(
        failed=enclave_pb2.Failed(
            code=error.code, message=error.message[:MESSAGE_LIMIT], retry_after_ms=retry_after_ms(error)
        )
    )


def _step(kind: Kind, token: int, position: int) -> enclave_pb2.EnclaveFrame:
    """Every step has one size: all fields are fixed-width and set."""
    return enclave_pb2.EnclaveFrame(step=enclave_pb2.Step(id=token, kind=int(kind), position=position))
