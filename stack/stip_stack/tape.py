"""What a model server saw of a running stack: a tape of the messages on its links, and the sessions on it.

A tape is a file: `MAGIC`, then one entry a message in the order they passed. The recorder (`stip_stack.recording`)
writes them as they come; everything that takes thought happens here, when it is read.

What stands of a session is what its server would go on from: rows that were taken `back` are gone, and so are answers
behind them. A session that went on elsewhere is one session (its `request_id` says so): what stands is its last seat's,
with the answers that earlier seats gave behind the same rows.
"""

from __future__ import annotations

import heapq
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

import numpy as np
from google.protobuf.message import DecodeError

from stip_enclave.tables import NUMPY_DTYPE
from stip_keyservice.audit.view import Floats, Seen, Top
from stip_protocol.errors import ConfigurationError, FrameInvalid
from stip_protocol.fields import ID_BYTES
from stip_protocol.manifest import Manifest
from stip_protocol.rpc import MESSAGE_BYTES
from stip_protocol.wire import model_pb2

MAGIC = b"stip tape 1\n"
_ENTRY = struct.Struct("<QIBI")
"""Nanoseconds of the machine's monotonic clock, which all processes share; link; way; bytes that follow."""


class Way(IntEnum):
    """From where to where."""

    UP = 0
    """To the model server: `Up` of wire/model.proto."""
    DOWN = 1
    """From it: `Down`."""


@dataclass(frozen=True, order=True)
class Entry:
    """One message."""

    nanoseconds: int
    link: int
    """A number of the recorder's."""
    way: Way
    message: bytes = field(repr=False)


class TapeWriter:
    """Appends to a tape that only its owner reads. What is written is in the file at once."""

    def __init__(self, path: Path) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = os.fdopen(handle, "ab", buffering=0)
        if not os.fstat(handle).st_size:
            self._file.write(MAGIC)

    def put(self, link: int, way: Way, message: bytes) -> None:
        self._file.write(_ENTRY.pack(time.monotonic_ns(), link, way, len(message)) + message)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def entries(path: Path) -> Iterator[Entry]:
    """The messages on a tape. One that a killed recorder left unfinished at the end is none.

    Raises `ConfigurationError` where there is no tape, `FrameInvalid` where it holds what no recorder wrote.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigurationError(f"tape {path}: {error.strerror}") from None
    with file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ConfigurationError.because(f"tape {path}", "another file", "a tape of this version")
        while len(head := file.read(_ENTRY.size)) == _ENTRY.size:
            nanoseconds, link, way, size = _ENTRY.unpack(head)
            if way not in set(Way) or size > MESSAGE_BYTES:
                raise FrameInvalid.because("tape entry", f"way {way}, {size} bytes", f"0 or 1, {MESSAGE_BYTES}")
            message = file.read(size)
            if len(message) == size:
                yield Entry(nanoseconds, link, Way(way), message)


@dataclass(frozen=True)
class Heard:
    """One session, as its servers saw it, as far as it stands."""

    request_id: str
    """What every part's log calls it, the client's too."""
    seen: Seen
    recalled: tuple[int, ...]
    """Positions whose full row of logits was asked for."""


def heard(tapes: Iterable[Path], manifest: Manifest) -> list[Heard]:
    """The sessions on all tapes of one instance, in the order they opened; without those that fed nothing.

    Raises as `entries`, and `FrameInvalid` for messages that are none.
    """
    reader = _Reader(manifest)
    for entry in heapq.merge(*map(entries, tapes)):
        reader.take(entry)
    return reader.sessions()


@dataclass
class _Seat:
    """One session of one link."""

    request_id: str
    held: list[Any] = field(default_factory=list, repr=False)
    """Of each position: its row [d], or its permuted id."""
    answers: dict[int, Any] = field(default_factory=dict, repr=False)
    """Of a position: the final hidden state [d] behind it, a row of `Top`, or the id that came."""
    recalled: list[int] = field(default_factory=list)
    touched: int = 0
    """When something came for it."""
    over: bool = False

    def feed(self, piece: model_pb2.Slice, rows: Sequence[Any]) -> None:
        """Rows or ids [count]. A server refuses what does not go on from its own length, and ends the session."""
        length = len(self.held) - piece.back
        if piece.position != length:
            self.over = True
            return
        del self.held[length:]
        self.held += rows
        if not isinstance(self.held[-1], int):  # an id that goes again is the answer that it was: see `standing`
            self.answers = {at: answer for at, answer in self.answers.items() if at < length}
        self.recalled = [at for at in self.recalled if at < length]

    def generated(self, place: int, ids: Sequence[int]) -> None:
        if place == len(self.held):
            self.answers |= {place - 1 + number: id_ for number, id_ in enumerate(ids)}
            self.held += ids

    def standing(self) -> dict[int, Any]:
        """Answers by position, rising. An id stands where it was not replaced by another."""
        count = len(self.held)
        return {
            at: answer
            for at, answer in sorted(self.answers.items())
            if (at + 1 < count and self.held[at + 1] == answer if isinstance(answer, int) else at < count)
        }


class _Reader:
    """Follows the sessions of one instance."""

    def __init__(self, manifest: Manifest) -> None:
        self._dtype, self._width = NUMPY_DTYPE[manifest.dtype], manifest.width
        self._open: dict[tuple[int, bytes], _Seat] = {}
        self._seats: list[_Seat] = []
        self._handlers: dict[str, Callable[[Entry, Any], None]] = {
            "open": self._opened, "feed": self._fed, "close": self._closed,
            "fed": self._answered, "closed": self._closed,
        }  # fmt: skip

    def take(self, entry: Entry) -> None:
        message: Any = model_pb2.Up() if entry.way is Way.UP else model_pb2.Down()
        try:
            message.ParseFromString(entry.message)
        except DecodeError:
            raise FrameInvalid("tape entry: no message of the wire") from None
        body = message.WhichOneof("body")
        if body in self._handlers:
            self._handlers[body](entry, getattr(message, body))

    def sessions(self) -> list[Heard]:
        joined: dict[str, list[_Seat]] = {}
        for number, seat in enumerate(self._seats):
            if seat.held:
                joined.setdefault(seat.request_id or f"#{number}", []).append(seat)
        return [self._heard(seats) for seats in joined.values()]

    # -- messages -----------------------------------------------------------------------------------------------------

    def _opened(self, entry: Entry, opening: model_pb2.Open) -> None:
        seat = _Seat(opening.request_id)
        self._open[entry.link, opening.session] = seat
        self._seats.append(seat)

    def _closed(self, entry: Entry, closing: model_pb2.Close | model_pb2.Closed) -> None:
        self._open.pop((entry.link, closing.session), None)

    def _fed(self, entry: Entry, feed: model_pb2.Feed) -> None:
        total = sum(piece.count for piece in feed.slices)
        rows = _ids(feed.ids, total) if feed.ids else list(self._rows(feed.rows, total))
        for piece, part in zip(feed.slices, _cut(rows, feed.slices), strict=True):
            if (seat := self._seat(entry, piece)) is not None:
                seat.feed(piece, part)

    def _answered(self, entry: Entry, fed: model_pb2.Fed) -> None:
        total = sum(piece.count for piece in fed.slices)
        kind = fed.WhichOneof("out")
        outs: list[Any] = []
        if kind == "hidden":
            outs = list(self._rows(fed.hidden, total))
        elif kind == "top":
            outs = self._tops(fed.top, total)
        elif kind == "ids":
            outs = _ids(fed.ids.ids, total)
        for piece, part in zip(fed.slices, _cut(outs, fed.slices), strict=True):
            seat = self._seat(entry, piece)
            if seat is None:
                continue
            if kind == "ids":
                seat.generated(piece.position, part)
            elif kind == "logits":
                seat.recalled.append(piece.position)
            else:
                seat.answers |= {piece.position + number: out for number, out in enumerate(part)}

    def _seat(self, entry: Entry, piece: model_pb2.Slice) -> _Seat | None:
        seat = self._open.get((entry.link, piece.session))
        if seat is None or seat.over:
            return None
        seat.touched = entry.nanoseconds
        return seat

    # -- bytes --------------------------------------------------------------------------------------------------------

    def _rows(self, data: bytes, count: int) -> Floats:
        """[count, d] in float32."""
        if len(data) != count * self._width * self._dtype.itemsize:
            raise FrameInvalid.because("tape rows", f"{len(data)} bytes", f"{count} rows of {self._width}")
        return np.frombuffer(data, self._dtype).reshape(count, self._width).astype(np.float32)

    def _tops(self, top: model_pb2.Top, total: int) -> list[tuple[Any, Any, Any]]:
        """Of each row: (indices [k], values [k], log-sum-exp)."""
        shape = total, top.count
        sizes = len(top.indices), len(top.values), len(top.log_sum_exp)
        wanted = ID_BYTES * total * top.count, self._dtype.itemsize * total * top.count, 4 * total
        if sizes != wanted:
            raise FrameInvalid.because("tape top", f"{sizes} bytes", wanted)
        indices = np.frombuffer(top.indices, "<u4").reshape(shape).astype(np.int64)
        values = np.frombuffer(top.values, self._dtype).reshape(shape).astype(np.float32)
        return list(zip(indices, values, np.frombuffer(top.log_sum_exp, "<f4"), strict=True))

    # -- sessions -----------------------------------------------------------------------------------------------------

    def _heard(self, seats: Sequence[_Seat]) -> Heard:
        """One session out of its seats."""
        last = max(seats, key=lambda seat: seat.touched)
        answers: dict[int, Any] = {}
        for seat in seats:
            common = _common(seat.held, last.held)
            answers |= {at: answer for at, answer in seat.standing().items() if at < common}
        answers |= last.standing()
        asked = np.array(sorted(answers), np.int64)
        outs = [answers[at] for at in asked]
        recalled = tuple(sorted(last.recalled))
        if isinstance(last.held[0], int):
            return Heard(last.request_id, Seen(None, np.array(last.held, np.int64), asked), recalled)
        rows = np.stack(last.held)
        if outs and isinstance(outs[0], tuple):
            indices, values, log_sum_exp = (np.stack(column) for column in zip(*outs, strict=True))
            return Heard(last.request_id, Seen(rows, None, asked, top=Top(indices, values, log_sum_exp)), recalled)
        hidden = np.stack(outs) if outs else np.empty((0, self._width), np.float32)
        return Heard(last.request_id, Seen(rows, None, asked, hidden=hidden), recalled)


def _ids(data: bytes, count: int) -> list[int]:
    if len(data) != count * ID_BYTES:
        raise FrameInvalid.because("tape ids", f"{len(data)} bytes", f"{count} ids")
    ids: list[int] = np.frombuffer(data, "<u4").tolist()
    return ids


def _cut(items: Sequence[Any], slices: Iterable[model_pb2.Slice]) -> Iterator[Sequence[Any]]:
    """What belongs to each slice; nothing where there are no items."""
    start = 0
    for piece in slices:
        yield items[start : start + piece.count]
        start += piece.count


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Positions from the first on that are the same, bit by bit."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if not np.array_equal(a, b)), min(len(one), len(other)))
