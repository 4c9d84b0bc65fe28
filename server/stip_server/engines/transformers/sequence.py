"""One session as the scheduler sees it, and the rules by which it accepts rows. No tensors, no clock of its own.

A session that decodes alone (`Form.IDS`) always holds its last id back until a generation runs: the first id of the
generation is picked from that row's logits, whether it was fed, generated before, or stands before a stop id.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from stip_protocol.errors import TensorInvalid
from stip_protocol.fields import ID_BYTES
from stip_server.engine import Card, Form, Generation, Session, Slice
from stip_server.engines.acceptance import require_generation, require_slice
from stip_server.frames import is_finite, require_ids, require_rows


@dataclass
class Rows:
    """Rows that wait."""

    data: memoryview = field(repr=False)
    count: int
    arrived: float


@dataclass
class Sequence:
    """A session's place and its bookkeeping. Lengths in rows, times in seconds of one monotonic clock."""

    session: Session
    capacity: int
    output: Form
    touched: float
    """When it last opened, fed, stepped or was answered."""
    account: bytes = b""
    row_bytes: int = ID_BYTES
    """Of what is fed: rows, or ids."""
    slot: int = -1
    """-1 until the border of the step after `open`."""
    fed: int = 0
    """Rows accepted or generated: the position that the next slice must have."""
    done: int = 0
    """Rows in the cache that count."""
    written: int = 0
    """Rows of the cache that were ever written: what was taken back is still there."""
    waiting: deque[Rows] = field(default_factory=deque)
    owed: int = 0
    """Outputs owed, for the last rows fed."""
    answered: int = 0
    """Outputs of the last answer, as long as nothing newer was fed; of ids, how many the last generation added."""
    generation: Generation | None = None
    halted: bool = False
    """The generation ends with the step that holds its row."""
    stepping: bool = False
    """A step that will answer holds its rows."""
    answered_at: float | None = None
    """When its last output left; None while it is not expected back."""
    ready_since: float = 0.0
    """End of its last step."""
    compute: float = 0.0
    """Since its last answer."""
    queue: float = 0.0
    """Since its last answer."""
    _last: bytes = field(default=b"", repr=False)
    """Of `Form.IDS`: the id at `fed - 1`."""

    @property
    def pending(self) -> int:
        """Rows accepted and not yet in the cache."""
        return self.fed - self.done

    def ready(self, chunk: int) -> int:
        """Rows that a step may take. Before its generation a prompt of ids goes ahead in whole chunks only, so that
        its end takes no step more than it would have taken with it."""
        if self.output is not Form.IDS or self.generation is not None:
            return self.pending
        return max(0, self.pending - 1) // chunk * chunk

    def accept(self, piece: Slice, card: Card, now: float) -> None:
        """Queue a slice's rows. Raises the `RequestInvalid` that ends this session; nothing is queued then."""
        of_ids = self.output is Form.IDS
        spare = self.answered if of_ids else max(0, self.answered - 1)
        busy = self.owed > 0 or self.generation is not None
        require_slice(piece, card, self.output, busy=busy, length=self.fed, spare=spare, capacity=self.capacity)
        if of_ids:
            require_ids(piece.rows, piece.count, card)
        else:
            require_rows(piece.rows, piece.count, card)
            if not is_finite(piece.rows, card.dtype):
                raise TensorInvalid.because("rows", "a value that is not finite", "finite values")
        # A copy: a view of a few rows would keep the whole frame, with whatever else was in it.
        rows = bytes(piece.rows)
        self._forget(piece.back)
        self._queue(rows, piece.count, now)
        if of_ids:
            self._last = rows[-ID_BYTES:]
        self.owed, self.answered = piece.outputs, 0
        self.touched, self.answered_at = now, None

    def begin(self, generation: Generation, card: Card, now: float) -> None:
        """Start to decode alone. Raises the `RequestInvalid` that ends this session."""
        running = self.generation is not None
        require_generation(generation, self.output, running=running, length=self.fed, capacity=self.capacity)
        self.generation, self.answered, self.halted, self.touched = generation, 0, False, now

    def take(self, rows: int, begun: float) -> list[memoryview]:
        """Take up to `rows` waiting rows out, for a step that begins at `begun`; counts their wait."""
        taken: list[memoryview] = []
        arrived = begun
        while rows and self.waiting:
            head = self.waiting[0]
            arrived = min(arrived, head.arrived)
            count = min(rows, head.count)
            taken.append(head.data[: count * self.row_bytes])
            rows -= count
            if count == head.count:
                self.waiting.popleft()
            else:
                head.data, head.count = head.data[count * self.row_bytes :], head.count - count
        self.queue += begun - max(arrived, self.ready_since)
        return taken

    def advance(self, rows: int, seconds: float, now: float) -> None:
        """Account for a step over `rows` of its rows."""
        self.done += rows
        self.written = max(self.written, self.done)
        self.compute += seconds
        self.ready_since = self.touched = now
        self.stepping = False

    def answer(self, now: float) -> tuple[float, float]:
        """(compute, queue) of the outputs that leave now; its account starts anew."""
        self.answered, self.owed = self.owed, 0
        self.answered_at = now
        return self._spent(now)

    def add(self, picked: int, now: float) -> tuple[bytes, bool, float, float]:
        """Take the id that was picked at the end of a step: (ids to send, whether the generation is done, compute,
        queue). A stop id is neither sent nor kept."""
        generation = self.generation
        assert generation is not None
        spent = self._spent(now)
        if picked in generation.stop_ids:
            self.end(now)
            return b"", True, *spent
        self._last = picked.to_bytes(ID_BYTES, "little")
        self._queue(self._last, 1, now)
        self.answered += 1
        done = self.halted or self.answered == generation.max_ids
        if done:
            self.end(now)
        return self._last, done, *spent

    def end(self, now: float) -> None:
        """End the generation; the last id waits for the next one."""
        self.generation, self.halted = None, False
        if not self.pending:
            self.done -= 1
            self.waiting.append(Rows(memoryview(self._last), 1, now))

    def _queue(self, rows: bytes, count: int, now: float) -> None:
        self.waiting.append(Rows(memoryview(rows), count, now))
        self.fed += count

    def _forget(self, back: int) -> None:
        """Take rows back. Nothing waits then but the last id of a generation, which is the first to go."""
        if not back:
            return
        self.waiting.clear()
        self.fed -= back
        self.done = min(self.done, self.fed)

    def _spent(self, now: float) -> tuple[float, float]:
        spent = self.compute, self.queue
        self.compute = self.queue = 0.0
        self.touched = now
        return spent
