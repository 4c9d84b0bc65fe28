"""The interface between the service and whatever steps the model.

An engine owns its loop: the service opens sessions, feeds rows and reads a stream of events. There is no
`forward(batch)`, because engines that schedule on their own (vLLM) could not offer it.

    engine.open(session, max_positions=..., output=...)
    engine.feed([Slice(session, position=0, count=3, outputs=1, rows=...)])
    async for events in engine.steps():    # until engine.stop()
        ...                                # Output, Ids, Ended, Stepped
    engine.close(session)

A session goes step by step (`Form.HIDDEN`, `Form.TOP`): rows in, outputs out, and the caller decides on the next row.
Or the engine decodes alone (`Form.IDS`): ids in, `generate`, ids out until it is done or told to `halt`.

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
    """What a session is answered with."""

    HIDDEN = "hidden"
    """The hidden state after the final norm."""
    TOP = "top"
    """The largest logits with their (permuted) indices, and the log-sum-exp of the whole row."""
    IDS = "ids"
    """The engine decodes alone, on permuted ids."""


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
    max_outputs: int = 1
    """Rows of one slice that may be answered."""

    @property
    def max_rows(self) -> int:
        """Rows of one frame."""
        return rows_per_frame(self.dtype, self.width)


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of one session. `rows` holds `count` rows of `card.width` elements, native dtype, row-major; of a session of
    `Form.IDS` it holds `count` permuted ids, uint32 little-endian."""

    session: Session
    position: int
    """Of the first row; accepted only where it equals the session's length less `back`."""
    count: int
    outputs: int
    """Outputs wanted, for the last `outputs` rows: at most `count` and `card.max_outputs`."""
    rows: bytes | memoryview = field(repr=False)
    back: int = 0
    """Rows that are forgotten before these: at most `outputs - 1` of the slice before, so that what was decided on its
    first output stays; of `Form.IDS` any number of those that a generation added."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden states after the final norm: `card.width` elements of `card.dtype` each, row-major."""

    rows: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Top:
    """The `min(TOP_COUNT, vocabulary)` largest logits, descending, and the log-sum-exp of the whole row; of several
    outputs one after the other."""

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

    rows: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Output:
    """The answer to a slice with `outputs`, or to a recall."""

    session: Session
    position: int
    """Of the row that the first output belongs to."""
    out: Hidden | Top | Logits
    count: int = 1
    """Outputs in `out`, of rows that follow each other."""
    compute: float = 0.0
    """Seconds of model compute behind this output: the steps since the session's previous output."""
    queue: float = 0.0
    """Seconds that the rows behind it waited for their steps to begin, gather window included."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine is asked to decode alone."""

    position: int
    """The session's length: ids fed and generated so far."""
    max_ids: int
    stop_ids: frozenset[int] = field(repr=False)
    """Permuted. One of them ends the generation and is not part of it."""
    temperature: float = 0.0
    """0: greedy, ties to the smallest permuted id."""
    top_k: int = 0
    """0: off."""
    top_p: float = 0.0
    """0 or 1: off."""
    seed: int = field(default=0, repr=False)
    step: int = 0
    """Draws made before: a generation that goes on elsewhere does not repeat them."""


@dataclass(frozen=True, slots=True)
class Ids:
    """Ids that a generation added to its session."""

    session: Session
    position: int
    """Of the first of them."""
    ids: bytes = field(repr=False)
    """Permuted, uint32 little-endian; may be empty where it is done."""
    done: bool
    """Nothing more follows for this generation."""
    compute: float = 0.0
    queue: float = 0.0


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


Event = Output | Ids | Ended | Stepped


class Engine(Protocol):
    """Steps one model for many sessions."""

    @property
    def card(self) -> Card:
        """Fixed for the engine's life."""
        ...

    def open(self, session: Session, *, max_positions: int, output: Form, account: bytes = b"") -> None:
        """Admit a session that will hold at most `max_positions` rows. Sessions of one `account` share its turns and
        its part of the room.

        Raises `Overloaded` (no room, before any memory is touched; it says when to try again), `PositionRefused` or
        `RequestInvalid` (a bound or a form that the card does not offer, or a session that is open already).
        """
        ...

    def feed(self, slices: Sequence[Slice]) -> None:
        """Take rows in. Never blocks and never raises: a slice that cannot be accepted ends its session alone,
        through an `Ended` event. Slices of sessions that are not open are ignored."""
        ...

    def recall(self, session: Session, position: int) -> None:
        """Ask for the full logits behind the `Top` at `position`, one of the session's last outputs. Once an output.

        Answered by an `Output` with `Logits`, or by `Ended` where something newer was fed or the row was asked for
        before.
        """
        ...

    def generate(self, session: Session, generation: Generation) -> None:
        """Decode alone, for a session of `Form.IDS`: answered by `Ids`, the last one `done`. One at a time.

        A generation that cannot be accepted ends the session through an `Ended` event.
        """
        ...

    def halt(self, session: Session) -> None:
        """Stop the session's generation, at the border of the step in progress at the latest: an `Ids` that is `done`
        follows. Nothing happens where none runs."""
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
