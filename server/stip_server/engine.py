"""The interface between the service and whatever steps the model.

An engine owns its loop: the service opens sessions, feeds rows and reads a stream of events. There is no
`forward(batch)`, because engines that schedule on their own (vLLM) could not offer it.

    engine.open(session, max_positions=..., output=...)
    engine.feed([Slice(session, position=0, count=3, last=True, rows=...)])
    async for events in engine.steps():    # until engine.stop()
        ...                                # Output, Ended, Stepped
    engine.close(session)

All methods but `steps` are called on the event loop, return at once and do not wait for a step in progress.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from stip_protocol.errors import StipError
from stip_protocol.tensor import rows_per_frame

TOP_COUNT = 64
"""Entries of a `Top`: the largest logits of a row (`Top.count` of the wire is min(64, vocabulary))."""

Session = tuple[int, bytes]
"""A session's key: the link it came by and the 16-byte handle that the enclave chose."""


class Form(StrEnum):
    """What a session wants for the last row it feeds."""

    HIDDEN = "hidden"
    """The hidden state after the final norm."""
    TOP = "top"
    """The largest logits with their (permuted) indices, and the log-sum-exp of the whole row."""


@dataclass(frozen=True)
class Card:
    """What an engine serves: the shape of every tensor and the bounds of every request."""

    instance: str
    epoch: int
    manifest_digest: bytes
    preset: str
    dtype: str
    """Of rows and outputs: float64, float32, float16 or bfloat16."""
    width: int
    """Residual width d: elements of a row and of a hidden state."""
    vocabulary: int
    """Elements of a logits row; 0 where the head is in the enclave."""
    max_positions: int
    """Rows that one session can hold."""
    max_sessions: int
    forms: tuple[Form, ...]

    @property
    def max_rows(self) -> int:
        """Rows of one frame."""
        return rows_per_frame(self.dtype, self.width)


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of one session. `rows` holds `count` rows of `card.width` elements, native dtype, row-major."""

    session: Session
    position: int
    """Of the first row; accepted only where it equals the rows that the session was fed so far."""
    count: int
    last: bool
    """An output is wanted for the last of these rows."""
    rows: bytes | memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class Hidden:
    """The hidden state after the final norm: `card.width` elements of `card.dtype`."""

    row: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Top:
    """The `min(TOP_COUNT, vocabulary)` largest logits, descending, and the log-sum-exp of the whole row."""

    count: int
    indices: bytes = field(repr=False)
    """uint32, little-endian."""
    values: bytes = field(repr=False)
    """`card.dtype`."""
    log_sum_exp: bytes = field(repr=False)
    """float32, little-endian."""


@dataclass(frozen=True, slots=True)
class Logits:
    """A full row of logits: `card.vocabulary` elements of `card.dtype`."""

    row: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Output:
    """The answer to a slice with `last`, or to a recall."""

    session: Session
    position: int
    """Of the row that the output belongs to."""
    out: Hidden | Top | Logits
    compute: float = 0.0
    """Seconds of model compute behind this output: the steps since the session's previous output."""
    queue: float = 0.0
    """Seconds that the rows behind it waited for their steps to begin, gather window included."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine ended a session: a refused slice, a failed step, idleness. Nothing follows for it."""

    session: Session
    error: StipError


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step of the model is done."""

    sessions: int
    rows: int
    compute: float
    """Seconds."""


Event = Output | Ended | Stepped


class Engine(Protocol):
    """Steps one model for many sessions."""

    @property
    def card(self) -> Card:
        """Fixed for the engine's life."""
        ...

    def open(self, session: Session, *, max_positions: int, output: Form) -> None:
        """Admit a session that will hold at most `max_positions` rows.

        Raises `Overloaded` (every slot is taken), `PositionRefused` or `RequestInvalid` (a bound or a form that
        the card does not offer, or a session that is open already).
        """
        ...

    def feed(self, slices: Sequence[Slice]) -> None:
        """Take rows in. Never blocks and never raises: a slice that cannot be accepted ends its session alone,
        through an `Ended` event. Slices of sessions that are not open are ignored."""
        ...

    def recall(self, session: Session, position: int) -> None:
        """Ask for the full logits behind the `Top` at `position`, the session's last output. Once an output.

        Answered by an `Output` with `Logits`, or by `Ended` where something newer was fed or the row was asked for
        before.
        """
        ...

    def close(self, session: Session) -> None:
        """Free a session, at the border of the step in progress at the latest. No event of it follows. Idempotent."""
        ...

    def steps(self) -> AsyncIterator[list[Event]]:
        """Run the model while there is work, and yield what happened. One consumer. Ends after `stop`."""
        ...

    async def stop(self) -> None:
        """End `steps`, once the step in progress is done. Idempotent."""
        ...
