"""Decoding step by step: rows in, outputs out, and the enclave decides on the next row.

What is pending is what the seat does not hold of the history yet. With drafts, guessed ids are fed behind the one row
that is certain; those that were not confirmed are taken `back` with the next rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stip_enclave.config import Limits
from stip_enclave.decoding import TokenStream
from stip_enclave.drafting import propose
from stip_enclave.lease import LeaseAccount
from stip_enclave.link import Link
from stip_enclave.links import Links
from stip_enclave.outbox import NO_IDS, Port
from stip_enclave.seat import Seat
from stip_enclave.travel import Travel
from stip_enclave.turns import Turn
from stip_protocol.errors import StipError
from stip_protocol.fields import TOP


class StepSeat(Seat):
    """A seat whose outputs are sampled here. What the decoder calls is in `decode.Owner`."""

    def __init__(self, travel: Travel, link: Link, decoding: Stepwise) -> None:
        super().__init__(travel, link)
        self.asking: Turn | None = None
        """Whose output is awaited, or being sampled."""
        self.unused = 0
        """Outputs that were asked and have given no token yet."""
        self.beat = 0
        """Heartbeats of the lease that were made before they were asked."""
        self._decoding = decoding

    @property
    def busy(self) -> bool:
        return self.asking is not None or self.port.awaits != "nothing"

    def turn_for(self, port: Port) -> Turn | None:
        """The turn that waits for an output that came; None where none does any more."""
        self.arrived()
        if self.left:
            return None
        if self.warming:
            self.warmed()
            self._decoding.advance()
            return None
        turn = self.asking
        if turn is not None and turn.ended:
            self.asking = None
            self._decoding.dropped(self)
            return None
        return turn

    def answered(self, turn: Turn, tokens: Sequence[int], compute: float) -> None:
        """Tokens [1 to the outputs asked] that were sampled for `turn`; `compute` in seconds."""
        self.asking = None
        if not self.left:
            self._decoding.answered(self, turn, tokens, compute)

    def needs_row(self, turn: Turn, tokens: Sequence[int], compute: float) -> None:
        """As `answered`, maybe without a token, and the next one needs its whole row."""
        if not self.left:
            self._decoding.needs_row(self, turn, tokens, compute)


class Stepwise:
    """How one session decodes where its outputs are hidden states or logits."""

    def __init__(self, stream: TokenStream, links: Links, account: LeaseAccount, limits: Limits) -> None:
        self._stream, self._account = stream, account
        self.travel = Travel(self, links, account, limits)
        self._asked = 0
        """Ids of the history behind whose last one an output was asked for."""

    # -- for the session ----------------------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        """Whether a turn without ids has something to go on from: an id behind the last one that was asked about."""
        return len(self._stream.history) > self._asked

    def begin(self) -> None:
        """A turn begins; its ids are in the history."""
        self.travel.rest()
        self.advance()

    def cancelled(self) -> None:
        """The turn has ended; an output that is under way is dropped when it comes."""
        self.travel.rest()

    def advance(self) -> None:
        """Feed what is pending, as far as nothing is awaited, the client keeps up and the lease admits it."""
        stream, turn = self._stream, self._stream.turn
        if turn is None:
            self.travel.rest()
        if turn is None or stream.paused:
            return
        seat = self.travel.here()
        if seat is None or self.busy(seat):
            return
        assert isinstance(seat, StepSeat)
        held = self._held(seat.port)
        rest = stream.history.part(held)
        drafted = self._drafted(turn, seat) if len(rest) == 1 else NO_IDS
        outputs = 1 + len(drafted)
        ids = np.concatenate([rest, drafted]) if len(drafted) else rest
        rows = self._account.take(len(ids), stream, self.advance, outputs=outputs)
        if not rows:
            return
        back = seat.port.position - held
        if rows == len(ids):
            seat.asking, seat.unused, self._asked = turn, outputs, len(stream.history)
            seat.beat = self._account.beats
            seat.link.feed(seat.port, ids, outputs=outputs, back=back, drafted=drafted)
        else:
            seat.link.feed(seat.port, ids[:rows], outputs=0, back=back)

    def _held(self, port: Port) -> int:
        """How many ids of the history the other side holds: all that was fed, less the drafts that were wrong. The
        last id is fed (again) in any case, because its output is wanted."""
        history = self._stream.history
        certain = port.position - len(port.drafted)
        held = certain + (history.agrees(certain, port.drafted) if len(port.drafted) else 0)
        return min(held, len(history) - 1)

    def _drafted(self, turn: Turn, seat: StepSeat) -> NDArray[np.uint32]:
        """Guesses to feed behind the certain row: as many as the client, the replica, the turn, the session's positions
        and the lease leave room for. None where each token needs its whole row, which is asked one by one."""
        if not turn.drafts or (seat.link.answers_top and not turn.sampler.reads_top(TOP)):
            return NO_IDS
        history = self._stream.history
        most = min(
            turn.drafts,
            seat.link.max_outputs - 1,
            turn.max_tokens - turn.step - 1,
            self._stream.max_positions - len(history) - 1,
            self._account.spare() - 1,
        )
        return propose(history.ids, most) if most > 0 else NO_IDS

    # -- for the seats ------------------------------------------------------------------------------------------------

    def answered(self, seat: StepSeat, turn: Turn, tokens: Sequence[int], compute: float) -> None:
        self.travel.progressed()
        self._take_in(seat, turn, tokens, compute)
        self._account.returned(seat.unused, seat.beat)
        # The next row is queued before the frames to the client.
        self.advance()
        self._stream.tell()

    def dropped(self, seat: StepSeat) -> None:
        """An output came whose turn had ended."""
        self._account.returned(seat.unused, seat.beat)
        self.advance()

    def needs_row(self, seat: StepSeat, turn: Turn, tokens: Sequence[int], compute: float) -> None:
        # The row in question is that of the last id accepted: the output asked first is of the row before the drafts.
        position = seat.port.position - seat.port.outputs + len(tokens)
        self._take_in(seat, turn, tokens, compute)
        if turn.ended:
            seat.asking = None
            self.dropped(seat)
        else:
            seat.link.recall(seat.port, position)
        self._stream.tell()

    def _take_in(self, seat: StepSeat, turn: Turn, tokens: Sequence[int], compute: float) -> None:
        seat.unused -= len(tokens)
        if turn.ended:
            return
        self._stream.measure(turn, len(tokens), compute)
        self._stream.accept(tokens)

    # -- for the travel -----------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._stream.turn is not None

    @property
    def history_length(self) -> int:
        return len(self._stream.history)

    def seat(self, link: Link) -> StepSeat:
        return StepSeat(self.travel, link, self)

    def busy(self, seat: Seat) -> bool:
        assert isinstance(seat, StepSeat)
        return seat.busy

    async def warm(self, seat: Seat) -> None:
        ids = self._stream.history.part(0, -1)
        if len(ids):
            await seat.fill(ids, self._account, outputs=1)
            await seat.ready

    def failed(self, error: StipError) -> None:
        self._stream.failed(error)
