"""One session as the scheduler sees it, and the rules by which it accepts rows. No tensors, no clock of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from stip_protocol.errors import FrameInvalid, PositionRefused, TensorInvalid
from stip_server.engine import Card, Form, Session, Slice
from stip_server.frames import is_finite, require_rows


@dataclass
class Rows:
    """Rows that wait: a view on the frame they came in."""

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
    """When it last fed, opened, or got an output."""
    slot: int = -1
    """-1 until the border of the step after `open`."""
    fed: int = 0
    """Rows accepted: the position that the next slice must have."""
    done: int = 0
    """Rows in the cache."""
    waiting: deque[Rows] = field(default_factory=deque)
    owed: bool = False
    """An output is owed for row `fed - 1`."""
    answered_at: float | None = None
    """When its last output left; None while it is not expected back."""
    ready_since: float = 0.0
    """End of its last step."""
    compute: float = 0.0
    """Since its last output."""
    queue: float = 0.0
    """Since its last output."""

    @property
    def pending(self) -> int:
        """Rows accepted and not yet in the cache."""
        return self.fed - self.done

    def accept(self, piece: Slice, card: Card, now: float) -> None:
        """Queue a slice's rows. Raises the `RequestInvalid` that ends this session; nothing is queued then."""
        if piece.count < 1:
            raise FrameInvalid.because("count", piece.count, "at least 1")
        if self.owed:
            raise PositionRefused.because("position", "rows after a slice marked last", "rows once it is answered")
        if piece.position != self.fed:
            raise PositionRefused.because("position", piece.position, self.fed)
        if self.fed + piece.count > self.capacity:
            raise PositionRefused.because("position", self.fed + piece.count - 1, f"below {self.capacity}")
        require_rows(piece.rows, piece.count, card)
        if not is_finite(piece.rows, card.dtype):
            raise TensorInvalid.because("rows", "a value that is not finite", "finite values")
        self.waiting.append(Rows(memoryview(piece.rows), piece.count, now))
        self.fed += piece.count
        self.owed = piece.last
        self.touched, self.answered_at = now, None

    def take(self, rows: int, row_bytes: int, begun: float) -> list[memoryview]:
        """Take up to `rows` waiting rows out, for a step that begins at `begun`; counts their wait."""
        taken: list[memoryview] = []
        arrived = begun
        while rows and self.waiting:
            head = self.waiting[0]
            arrived = min(arrived, head.arrived)
            count = min(rows, head.count)
            taken.append(head.data[: count * row_bytes])
            rows -= count
            if count == head.count:
                self.waiting.popleft()
            else:
                head.data, head.count = head.data[count * row_bytes :], head.count - count
        self.queue += begun - max(arrived, self.ready_since)
        return taken

    def advance(self, rows: int, seconds: float, now: float) -> bool:
        """Account for a step over `rows` of its rows; whether an output is due."""
        self.done += rows
        self.compute += seconds
        self.ready_since = now
        return self.owed and self.done == self.fed

    def answer(self, now: float) -> tuple[float, float]:
        """(compute, queue) of the output that leaves now; its account starts anew."""
        spent = self.compute, self.queue
        self.compute = self.queue = 0.0
        self.owed = False
        self.touched = self.answered_at = now
        return spent
