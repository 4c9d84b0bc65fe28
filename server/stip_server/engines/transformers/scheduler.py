"""What the next step computes. No tensors, no clock of its own: testable by calling it.

A step is either one row of every session that has one waiting (decoding), or one chunk of one session's prompt
(prefilling). The two take turns, so that a prompt delays running sessions by at most one chunk, and the chunk
runs while their next rows are on the way. Prompts take turns chunk by chunk: a short one overtakes a long one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stip_protocol.errors import DeadlineExceeded, Overloaded, PositionRefused, RequestInvalid, StipError
from stip_protocol.tensor import row_bytes
from stip_server.engine import Card, Form, Session, Slice
from stip_server.engines.transformers.gather import GatherWindow
from stip_server.engines.transformers.sequence import Sequence
from stip_server.engines.transformers.slots import SlotTable, Vacate


@dataclass(frozen=True)
class Work:
    """One session's part of a step."""

    sequence: Sequence
    slot: int
    position: int
    """Of the first row."""
    count: int
    rows: list[memoryview] = field(repr=False)
    answer: Form | None
    """The output that is due after these rows."""


@dataclass(frozen=True)
class Batch:
    """A step: several sessions with one row each, or one session with a chunk."""

    moves: list[Vacate]
    """Carried out before the step."""
    work: list[Work]


class Scheduler:
    """Sessions, slots and turns of one engine."""

    def __init__(self, card: Card, *, prefill_chunk: int, window: float, idle: float) -> None:
        self._card = card
        self._row_bytes = row_bytes(card.dtype, card.width)
        self._chunk = prefill_chunk
        self._idle = idle
        self._open: dict[Session, Sequence] = {}
        self._leaving: list[Sequence] = []
        self._slots = SlotTable()
        self._prefilled_last = False
        self._ready: float | None = None
        self.window = GatherWindow(window)

    def __len__(self) -> int:
        return len(self._open)

    def open(self, session: Session, *, max_positions: int, output: Form, now: float) -> None:
        """See `Engine.open`."""
        if session in self._open:
            raise RequestInvalid.because("session", "a handle that is open", "a fresh one")
        if output not in self._card.forms:
            raise RequestInvalid.because("output", output, ", ".join(self._card.forms))
        if not 1 <= max_positions <= self._card.max_positions:
            raise PositionRefused.because("max_positions", max_positions, f"1 to {self._card.max_positions}")
        if len(self._open) >= self._card.max_sessions:
            raise Overloaded.because("sessions", f"{len(self._open)} open", f"{self._card.max_sessions} slots")
        self._open[session] = Sequence(session, capacity=max_positions, output=output, touched=now)

    def feed(self, piece: Slice, now: float) -> None:
        """Accept a slice. Raises what ends its session."""
        sequence = self._open.get(piece.session)
        if sequence is None:
            return
        away = sequence.answered_at
        sequence.accept(piece, self._card, now)
        if away is not None:
            self.window.returned(now - away)
        if self._ready is None:
            self._ready = now

    def recallable(self, session: Session, position: int) -> Sequence | None:
        """The session whose last `Top` stands at `position`; None where it is not open. Raises what ends it."""
        sequence = self._open.get(session)
        if sequence is None:
            return None
        if sequence.output is not Form.TOP:
            raise RequestInvalid.because("recall", f"a session of output {sequence.output}", Form.TOP)
        if sequence.pending or sequence.done == 0 or position != sequence.done - 1:
            raise PositionRefused.because("recall position", position, "that of the last output, nothing fed since")
        return sequence

    def close(self, session: Session) -> None:
        """Forget a session; its slot is emptied at the next step's border."""
        sequence = self._open.pop(session, None)
        if sequence is not None and sequence.slot >= 0:
            self._leaving.append(sequence)

    def sessions(self) -> list[Sequence]:
        """The open sessions."""
        return list(self._open.values())

    def is_open(self, sequence: Sequence) -> bool:
        """Whether this very session (and not a later one of the same key) is open."""
        return self._open.get(sequence.session) is sequence

    def patience(self, now: float) -> float | None:
        """Seconds to wait for returning sessions before `next`: 0 means go, None that there is nothing to do."""
        decoding, prefilling = self._candidates()
        if not decoding and not prefilling:
            self._ready = None
            return None
        if prefilling and not (decoding and self._prefilled_last):
            return 0.0
        away = (s.answered_at for s in self._open.values() if s.answered_at is not None)
        return self.window.patience(away, now if self._ready is None else self._ready, now)

    def next(self, now: float) -> Batch:
        """The next step. Only where `patience` is not None."""
        moves = [self._slots.leave(sequence) for sequence in self._leaving]
        self._leaving.clear()
        decoding, prefilling = self._candidates()
        self._prefilled_last = bool(prefilling) and not (decoding and self._prefilled_last)
        chosen = prefilling[:1] if self._prefilled_last else decoding
        if self._prefilled_last:
            # To the end of the order, so that the prompts take turns.
            self._open[prefilling[0].session] = self._open.pop(prefilling[0].session)
        self._ready = None
        return Batch(moves, [self._take(sequence, now) for sequence in chosen])

    def computed(self, batch: Batch, *, seconds: float, now: float) -> list[Sequence]:
        """Account for a finished step; the open sessions whose output is due, in the order of its work."""
        due = [w.sequence for w in batch.work if w.sequence.advance(w.count, seconds, now)]
        if all(w.count == 1 for w in batch.work):
            self.window.stepped(seconds)
        # What came in while the step ran could have started a step only now.
        self._ready = now if any(s.pending for s in self._open.values()) else None
        return [sequence for sequence in due if self.is_open(sequence)]

    def idle(self, now: float) -> list[tuple[Session, StipError]]:
        """Close the sessions that neither fed nor waited for `idle` seconds; who they were."""
        late = [s for s in self._open.values() if not s.pending and now - s.touched >= self._idle]
        for sequence in late:
            self.close(sequence.session)
        error = DeadlineExceeded(f"the session was idle for {self._idle:g} s", field="idle")
        return [(sequence.session, error) for sequence in late]

    def next_idle(self, now: float) -> float | None:
        """Seconds until `idle` could find something."""
        touched = min((s.touched for s in self._open.values() if not s.pending), default=None)
        return None if touched is None else max(0.0, touched + self._idle - now)

    def _candidates(self) -> tuple[list[Sequence], list[Sequence]]:
        """The sessions with one row waiting, and those with more."""
        waiting = [s for s in self._open.values() if s.pending]
        return [s for s in waiting if s.pending == 1], [s for s in waiting if s.pending > 1]

    def _take(self, sequence: Sequence, now: float) -> Work:
        if sequence.slot < 0:
            self._slots.assign(sequence)
        count = min(sequence.pending, self._chunk)
        due = sequence.owed and count == sequence.pending
        return Work(
            sequence,
            sequence.slot,
            sequence.done,
            count,
            sequence.take(count, self._row_bytes, now),
            sequence.output if due else None,
        )
