"""One session as this engine sees it, and the rules by which it accepts rows and ids. No vLLM, no clock of its own."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from stip_protocol.errors import PositionRefused, RequestInvalid, TensorInvalid
from stip_server.engine import Card, Form, Generation, Session, Slice
from stip_server.engines.acceptance import require_generation, require_slice
from stip_server.engines.outputs import LogitsRow
from stip_server.frames import is_finite, require_ids, require_rows

FIRST_ROWS = 64
"""Rows that a session has room for at first; then it doubles, up to the longest session."""


class History(Protocol):
    """Everything a session holds: what is sent to vLLM again with each request."""

    def __len__(self) -> int: ...
    def check(self, piece: Slice, card: Card) -> None:
        """Raise `TensorInvalid` unless a slice's bytes are its rows or ids."""
        ...

    def cut(self, length: int) -> None:
        """Forget what lies behind."""
        ...

    def add(self, piece: Slice) -> None: ...


class Rows:
    """Embeddings. Rows that were handed to vLLM are never written again: what is sent is a view."""

    def __init__(self, card: Card) -> None:
        self._rows = torch.empty((0, card.width), dtype=getattr(torch, card.dtype))
        self._length, self._most = 0, card.max_positions

    def __len__(self) -> int:
        return self._length

    def check(self, piece: Slice, card: Card) -> None:
        require_rows(piece.rows, piece.count, card)
        if not is_finite(piece.rows, card.dtype):
            raise TensorInvalid.because("rows", "a value that is not finite", "finite values")

    def cut(self, length: int) -> None:
        self._length = length

    def add(self, piece: Slice) -> None:
        end = self._length + piece.count
        if end > len(self._rows):
            room = max(end, min(max(FIRST_ROWS, 2 * len(self._rows)), self._most))
            larger = self._rows.new_empty((room, self._rows.shape[1]))
            larger[: self._length] = self._rows[: self._length]
            self._rows = larger
        new = torch.frombuffer(bytearray(piece.rows), dtype=self._rows.dtype)
        self._rows[self._length : end] = new.view(piece.count, -1)
        self._length = end

    def tensor(self) -> torch.Tensor:
        """[length, d]."""
        return self._rows[: self._length]


class Ids:
    """Permuted ids, fed and generated."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, piece: Slice, card: Card) -> None:
        require_ids(piece.rows, piece.count, card)

    def cut(self, length: int) -> None:
        del self.ids[length:]

    def add(self, piece: Slice) -> None:
        self.ids += np.frombuffer(piece.rows, "<u4").tolist()

    def extend(self, ids: Ordered[int]) -> None:
        """Take generated ids in."""
        self.ids += ids


@dataclass
class Sequence:
    """A session and its bookkeeping. Times in seconds of one monotonic clock."""

    session: Session
    capacity: int
    output: Form
    account: bytes
    touched: float
    """When it last fed, opened, or was answered."""
    history: Rows | Ids = field(repr=False)
    salt: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    """Of vLLM's prefix cache: nobody else's rows or ids can be told from how fast they come back."""
    owed: bool = False
    """An output is owed for the last row."""
    generation: Generation | None = None
    added: int = 0
    """Ids that the last generation added, as long as nothing newer was fed."""
    request: asyncio.Task[None] | None = field(default=None, repr=False)
    """Brings the answer that is on its way."""
    top: LogitsRow | None = field(default=None, repr=False)
    """Behind the last output, as long as it may be recalled."""

    @property
    def busy(self) -> bool:
        """An answer is on its way."""
        return self.owed or self.generation is not None

    def accept(self, piece: Slice, card: Card, now: float) -> None:
        """Take a slice in. Raises the `RequestInvalid` that ends this session; nothing is taken then."""
        start = len(self.history) - piece.back
        require_slice(
            piece,
            card,
            self.output,
            busy=self.busy,
            length=len(self.history),
            spare=self.added,
            capacity=self.capacity,
        )
        self.history.check(piece, card)
        self.history.cut(start)
        self.history.add(piece)
        self.owed, self.added, self.top, self.touched = piece.outputs > 0, 0, None, now

    def begin(self, generation: Generation, now: float) -> None:
        """Start to decode alone. Raises the `RequestInvalid` that ends this session."""
        running, length = self.generation is not None, len(self.history)
        require_generation(generation, self.output, running=running, length=length, capacity=self.capacity)
        self.generation, self.added, self.touched = generation, 0, now

    def stop(self) -> None:
        """Give up the answer that is on its way."""
        self.generation, self.owed = None, False
        if self.request is not None:
            self.request.cancel()
            self.request = None

    def recall(self, position: int) -> LogitsRow:
        """The row behind the last `Top`, once. Raises the `RequestInvalid` that ends this session."""
        if self.output is not Form.TOP:
            raise RequestInvalid.because("recall", f"a session of output {self.output}", Form.TOP)
        if self.top is None or position != len(self.history) - 1:
            raise PositionRefused.because("recall position", position, "that of the last output, once")
        row, self.top = self.top, None
        return row


def sequence(session: Session, card: Card, output: Form, capacity: int, account: bytes, now: float) -> Sequence:
    """A session that has just been admitted."""
    history = Ids() if output is Form.IDS else Rows(card)
    return Sequence(session, capacity, output, account, now, history)
