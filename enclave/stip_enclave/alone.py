"""Decoding alone: permuted ids in once, and the server streams permuted ids until it is done.

What came and was not handed on yet is `held`: a client that does not read, or a user who was not confirmed lately, gets
nothing more, however far the server is ahead. The sequence is what was handed on; ids beyond it are taken back with the
next turn. Where a generation has to go on elsewhere, or is asked for in parts because the lease admits no more at once,
draws go on from the step they had reached.

When a generation ends before its ids are all there and nobody halted it, it came upon a stop id: the enclave cannot
tell that from a server that stops where it likes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stip_enclave.config import Limits
from stip_enclave.decoding import TokenStream
from stip_enclave.lease import LeaseAccount
from stip_enclave.link import Link
from stip_enclave.links import Links
from stip_enclave.seat import Seat
from stip_enclave.substitution import Substitution
from stip_enclave.travel import Travel
from stip_enclave.turns import Turn
from stip_protocol.errors import FrameInvalid, StipError
from stip_protocol.wire import model_pb2


class GeneratingSeat(Seat):
    """A seat that ids come to."""

    def __init__(self, travel: Travel, link: Link, decoding: Alone, account: LeaseAccount) -> None:
        super().__init__(travel, link)
        self.turn: Turn | None = None
        """For which the running generation is, or the last one was; None while it is warmed."""
        self.reserved = 0
        """Ids of the lease that the running generation may still use."""
        self.halted = False
        self.added = 0
        """Ids that the last generation added."""
        self.surplus = 0
        """Ids at the end of the other side's sequence that are no part of the session's."""
        self._decoding = decoding
        self._account: LeaseAccount = account

    @property
    def busy(self) -> bool:
        return self.port.awaits == "ids"

    def came(self, ids: NDArray[np.uint32], done: bool, compute: float) -> None:
        self.arrived()
        if not self.left:
            self._decoding.came(self, ids, done, compute)

    def generate(self, message: model_pb2.Generate) -> None:
        """Set a generation of `message.max_ids` ids off, which were reserved of the lease."""
        self.reserved, self.added, self.halted = message.max_ids, 0, False
        self.link.generate(self.port, message)

    def halt(self) -> None:
        """Have the running generation end. Idempotent."""
        if self.busy and not self.halted:
            self.halted = True
            self.link.halt(self.port)

    def lost(self, error: StipError) -> None:
        self._give_back()
        super().lost(error)

    def leave(self) -> None:
        self._give_back()
        super().leave()

    def _give_back(self) -> None:
        if self.reserved:
            self._account.forfeited(self.reserved)
            self.reserved = 0


class Alone:
    """How one session decodes where the server holds everything but π_c."""

    def __init__(
        self, stream: TokenStream, links: Links, account: LeaseAccount, limits: Limits, substitution: Substitution
    ) -> None:
        self._stream, self._account, self._substitution = stream, account, substitution
        self.travel = Travel(self, links, account, limits)
        self.goes_on = False
        """Whether a turn without ids has something to go on from: a token that was given, or ids not fed yet."""
        self._held: list[int] = []
        """True ids that came for the running turn and were not handed on."""
        self._stopped = False
        """Whether the running turn ends behind what is held."""

    # -- for the session ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A turn begins; its ids are in the history."""
        self._stopped, self.goes_on = False, True
        self.travel.rest()
        self.advance()

    def cancelled(self) -> None:
        """The turn has ended: what was not handed on is no part of the session, and neither is what still comes."""
        seat = self._seated
        if seat is not None:
            seat.surplus += len(self._held)
            seat.halt()
        self._held = []
        self.travel.rest()

    def advance(self) -> None:
        """Hand on what may be; then feed what is pending, and set a generation off."""
        self._hand_on()
        stream, turn = self._stream, self._stream.turn
        if turn is None:
            self.travel.rest()
        if turn is None or self._stopped:
            return
        if self.travel.moving and (present := self._seated) is not None:
            present.halt()
        if stream.paused:
            return
        seat = self.travel.here()
        if seat is None or self.busy(seat):
            return
        assert isinstance(seat, GeneratingSeat)
        if self._fed(seat):
            self._generate(seat, turn)

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _seated(self) -> GeneratingSeat | None:
        seat = self.travel.seat
        assert seat is None or isinstance(seat, GeneratingSeat)
        return seat

    def _known(self) -> NDArray[np.uint32]:
        """The sequence with what is held: what the server's should be."""
        return np.concatenate([self._stream.history.ids, np.array(self._held, np.uint32)])

    def _hand_on(self) -> None:
        """As far as the client keeps up and its user was confirmed."""
        stream = self._stream
        while self._held and stream.turn is not None and not stream.paused:
            count = self._account.hand_on(min(len(self._held), max(1, stream.room)), stream, self.advance)
            if not count:
                break
            tokens, self._held = self._held[:count], self._held[count:]
            self.goes_on = True
            stream.accept(tokens)
        if self._stopped and not self._held and stream.turn is not None:
            self.goes_on = False
            stream.stop()
        stream.tell()

    def _fed(self, seat: GeneratingSeat) -> bool:
        """Feed what the server lacks, as far as the lease admits it. True where nothing is lacking."""
        known = self._known()
        back = seat.surplus
        start = seat.port.position - back
        if back and start == len(known):
            start, back = start - 1, back + 1  # a frame has at least one row: the last id goes again
        rest = known[start:]
        if not len(rest):
            return True
        if back > seat.added:
            # Rows that were fed cannot be taken back: only a fresh seat has none of them.
            self.travel.abandon()
            self.advance()
            return False
        rows = self._account.take(len(rest), self._stream, self.advance, outputs=0)
        if rows:
            seat.surplus = seat.added = 0
            seat.link.feed(seat.port, rest[:rows], outputs=0, back=back)
        return rows == len(rest)

    def _generate(self, seat: GeneratingSeat, turn: Turn) -> None:
        stream, held = self._stream, len(self._held)
        wanted = min(turn.max_tokens - turn.step, stream.max_positions - len(stream.history)) - held
        if wanted < 1:
            return
        reserved = self._account.reserve(wanted, stream, self.advance)
        if not reserved:
            return
        spec = turn.sampler.spec
        seat.turn, self.goes_on = turn, turn.step > 0
        seat.generate(
            model_pb2.Generate(
                max_ids=reserved,
                stop_ids=self._substitution.permuted(np.array(sorted(turn.stop_ids), np.uint32)),
                temperature=spec.temperature,
                top_k=spec.top_k,
                top_p=spec.top_p,
                seed=spec.seed,
                step=turn.step + held,
            ),
        )

    # -- for the seats ------------------------------------------------------------------------------------------------

    def came(self, seat: GeneratingSeat, ids: NDArray[np.uint32], done: bool, compute: float) -> None:
        """Ids of a generation, checked to be in the vocabulary and no more than were asked."""
        seat.reserved -= len(ids)
        seat.added += len(ids)
        self._account.counted(len(ids))
        turn = seat.turn
        if turn is None or turn.ended:
            seat.surplus += len(ids)
        else:
            true = self._substitution.true(ids)
            if not turn.stop_ids.isdisjoint(true):
                self._stream.failed(FrameInvalid("reply: a stop id, which ends a generation and is not sent"))
                return
            self._stream.measure(turn, len(ids), compute)
            self._held.extend(true)
            self.travel.progressed()
        if done:
            early = seat.reserved > 0
            self._account.released(seat.reserved)
            seat.reserved = 0
            if turn is None:
                seat.warmed()
            elif not turn.ended:
                self._stopped = early and not seat.halted
        self.advance()

    # -- for the travel -----------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._stream.turn is not None

    @property
    def history_length(self) -> int:
        return len(self._stream.history)

    def seat(self, link: Link) -> GeneratingSeat:
        return GeneratingSeat(self.travel, link, self, self._account)

    def busy(self, seat: Seat) -> bool:
        assert isinstance(seat, GeneratingSeat)
        return seat.busy

    async def warm(self, seat: Seat) -> None:
        assert isinstance(seat, GeneratingSeat)
        ids = self._stream.history.part(0, -1)
        if not len(ids):
            return
        await seat.fill(ids, self._account, outputs=0)
        await seat.reserve_one(self._account)
        seat.generate(model_pb2.Generate(max_ids=1))
        await seat.ready

    def failed(self, error: StipError) -> None:
        self._stream.failed(error)
