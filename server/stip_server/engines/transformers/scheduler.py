"""What the next step computes. No tensors, no clock of its own: testable by calling it.

A step is either a few rows of every session whose waiting rows are all answered (decoding: the next row, with drafts
behind it), or one chunk of one session's prompt (prefilling). The two take turns, so that a prompt delays running
sessions by at most one chunk, and the chunk runs while their next rows are on the way. Prompts take turns chunk by
chunk, between accounts first: a short one overtakes a long one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from stip_protocol.errors import DeadlineExceeded, Overloaded, PositionRefused, RequestInvalid, StipError
from stip_protocol.fields import ID_BYTES
from stip_protocol.tensor import row_bytes
from stip_server.engine import Card, Form, Generation, Ids, Session, Slice
from stip_server.engines.acceptance import require_opening
from stip_server.engines.admission import Admission
from stip_server.engines.transformers.gather import GatherWindow
from stip_server.engines.transformers.sequence import Sequence
from stip_server.engines.transformers.slots import SlotTable, Vacate
from stip_server.engines.transformers.turns import Turns

PADDING = 2
"""A decoding step computes at most so many times the rows that were sent; beyond, it is split."""
BACKLOG = 256 << 20
"""Bytes of rows of one link that may wait, or twice what its largest session holds where that is more."""


@dataclass(frozen=True)
class Work:
    """One session's part of a step."""

    sequence: Sequence
    slot: int
    position: int
    """Of the first row."""
    count: int
    rows: list[memoryview] = field(repr=False)
    """Rows of the model's dtype or, of `Form.IDS`, uint32 ids."""
    form: Form
    outputs: int
    """How many of these rows, the last ones, are answered; 0: none."""


@dataclass(frozen=True)
class Batch:
    """A step: several sessions with a few rows each, or one session with a chunk."""

    moves: list[Vacate]
    """Carried out before the step."""
    work: list[Work]


class Scheduler:
    """Sessions, slots and turns of one engine."""

    def __init__(
        self, card: Card, *, prefill_chunk: int, window: float, idle: float, positions: int | None = None
    ) -> None:
        """`positions`: the sum of all sessions' `max_positions` that is admitted, by default what fits the slots."""
        self._card = card
        self._row_bytes = row_bytes(card.dtype, card.width)
        self._chunk = prefill_chunk
        self._idle = idle
        self._open: dict[Session, Sequence] = {}
        self._leaving: list[Sequence] = []
        self._slots = SlotTable()
        self._turns = Turns()
        slots = card.max_sessions
        self._admission = Admission(slots, slots * card.max_positions if positions is None else positions)
        self._links: Counter[int] = Counter()
        self._backlog: Counter[int] = Counter()
        self._most_backlog = max(BACKLOG, 2 * card.max_positions * self._row_bytes)
        self._prefilled_last = False
        self._ready: float | None = None
        self.window = GatherWindow(window)

    def __len__(self) -> int:
        return len(self._open)

    def open(self, session: Session, *, max_positions: int, output: Form, now: float, account: bytes = b"") -> None:
        """See `Engine.open`."""
        require_opening(session, max_positions=max_positions, output=output, card=self._card, opened=self._open)
        self._admission.enter(account, max_positions, now)
        width = ID_BYTES if output is Form.IDS else self._row_bytes
        sequence = Sequence(session, max_positions, output, now, account, width)
        self._open[session] = sequence
        self._turns.join(sequence)
        self._links[session[0]] += 1

    def feed(self, piece: Slice, now: float) -> None:
        """Accept a slice. Raises what ends its session."""
        sequence = self._open.get(piece.session)
        if sequence is None:
            return
        away, link = sequence.answered_at, piece.session[0]
        backlog = self._backlog[link] + _burden(sequence, piece.count)
        if backlog > self._most_backlog:
            raise Overloaded(
                f"rows: got {backlog} bytes waiting on this link, allowed: {self._most_backlog}",
                field="rows",
                retry_after=self._admission.retry_after(),
            )
        sequence.accept(piece, self._card, now)
        self._backlog[link] = backlog
        if away is not None:
            self.window.link(link).observe(now - away)
        if self._ready is None:
            self._ready = now

    def generate(self, session: Session, generation: Generation, now: float) -> None:
        """Let a session decode alone. Raises what ends it."""
        if (sequence := self._open.get(session)) is not None:
            sequence.begin(generation, self._card, now)

    def halt(self, session: Session, now: float) -> Ids | None:
        """Stop a generation: the end of it, or None where none runs or the step in progress will end it."""
        sequence = self._open.get(session)
        if sequence is None or sequence.generation is None:
            return None
        if sequence.stepping:
            sequence.halted = True
            return None
        sequence.end(now)
        return Ids(session, sequence.fed, b"", done=True)

    def recallable(self, session: Session, position: int) -> Sequence | None:
        """The session that has `position` in its last answer; None where it is not open. Raises what ends it."""
        sequence = self._open.get(session)
        if sequence is None:
            return None
        if sequence.output is not Form.TOP:
            raise RequestInvalid.because("recall", f"a session of output {sequence.output}", Form.TOP)
        if not sequence.fed - sequence.answered <= position < sequence.fed:
            raise PositionRefused.because("recall position", position, "those of the last answer, nothing fed since")
        return sequence

    def close(self, session: Session, now: float) -> None:
        """Forget a session; its slot is emptied at the next step's border."""
        sequence = self._open.pop(session, None)
        if sequence is None:
            return
        if sequence.slot >= 0:
            self._leaving.append(sequence)
        self._admission.leave(sequence.account, sequence.capacity, now)
        self._turns.leave(sequence)
        self._unburden(sequence, sum(rows.count for rows in sequence.waiting))
        self._links[session[0]] -= 1
        if not self._links[session[0]]:
            del self._links[session[0]], self._backlog[session[0]]
            self.window.forget(session[0])

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
        if any(s.generation is not None for s in decoding):
            return 0.0  # who decodes alone never waits for the network of others
        away = ((s.session[0], s.answered_at) for s in self._open.values() if s.answered_at is not None)
        return self.window.patience(away, now if self._ready is None else self._ready, now)

    def next(self, now: float) -> Batch:
        """The next step. Only where `patience` is not None."""
        moves = [self._slots.leave(sequence) for sequence in self._leaving]
        self._leaving.clear()
        decoding, prefilling = self._candidates()
        self._prefilled_last = bool(prefilling) and not (decoding and self._prefilled_last)
        chosen = [self._turns.next(prefilling)] if self._prefilled_last else _together(decoding)
        self._ready = None
        return Batch(moves, [self._take(sequence, now) for sequence in chosen])

    def computed(self, batch: Batch, *, seconds: float, now: float) -> None:
        """Account for a finished step. Its answers are for `Sequence.answer` and `Sequence.add` to take note of."""
        for work in batch.work:
            work.sequence.advance(work.count, seconds, now)
        if not self._prefilled_last:
            self.window.stepped(seconds)
        # What came in while the step ran could have started a step only now.
        self._ready = now if any(s.ready(self._chunk) for s in self._open.values()) else None

    def idle(self, now: float) -> list[tuple[Session, StipError]]:
        """The sessions that neither fed nor waited for `idle` seconds, and what ends them."""
        error = DeadlineExceeded(f"the session was idle for {self._idle:g} s", field="idle")
        return [(s.session, error) for s in self._quiet() if now - s.touched >= self._idle]

    def next_idle(self, now: float) -> float | None:
        """Seconds until `idle` could find something."""
        touched = min((s.touched for s in self._quiet()), default=None)
        return None if touched is None else max(0.0, touched + self._idle - now)

    def _quiet(self) -> list[Sequence]:
        return [s for s in self._open.values() if not s.ready(self._chunk)]

    def _candidates(self) -> tuple[list[Sequence], list[Sequence]]:
        """The sessions that decode (one row waits, or rows that are all answered), and those with a prompt."""
        decoding, prefilling = list[Sequence](), list[Sequence]()
        for sequence in self._open.values():
            if ready := sequence.ready(self._chunk):
                (decoding if ready <= max(1, sequence.owed) else prefilling).append(sequence)
        return decoding, prefilling

    def _take(self, sequence: Sequence, now: float) -> Work:
        if sequence.slot < 0:
            self._slots.assign(sequence)
        outputs = sequence.owed if sequence.generation is None else 1
        count = sequence.ready(self._chunk)
        if count > max(self._chunk, outputs):
            # The rows that are answered stay together, in the last chunk.
            count = min(self._chunk, count - outputs)
        due = outputs if outputs and count == sequence.pending else 0
        sequence.stepping = due > 0
        self._unburden(sequence, count)
        rows = sequence.take(count, now)
        return Work(sequence, sequence.slot, sequence.done, count, rows, sequence.output, due)

    def _unburden(self, sequence: Sequence, rows: int) -> None:
        """Rows do not wait any more."""
        self._backlog[sequence.session[0]] -= _burden(sequence, rows)


def _burden(sequence: Sequence, rows: int) -> int:
    """Bytes of waiting rows. Ids are not worth counting: a session's positions bound them to little."""
    return 0 if sequence.output is Form.IDS else rows * sequence.row_bytes


def _together(decoding: list[Sequence]) -> list[Sequence]:
    """Those that step together: all, unless padding to the longest costs too much; then those with one row or those
    with several, whichever holds the session that has waited longest."""
    counts = [s.pending for s in decoding]
    if max(counts) * len(counts) <= PADDING * sum(counts):
        return decoding
    oldest = min(decoding, key=lambda s: s.waiting[0].arrived)
    return [s for s in decoding if (s.pending > 1) is (oldest.pending > 1)]
