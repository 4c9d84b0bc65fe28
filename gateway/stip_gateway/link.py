"""One link through the gateway: an enclave on one side, a replica on the other.

Pure bookkeeping over envelopes, no I/O: `up` takes a message from the enclave and says what goes to the
replica and what is answered at once; `down` does the same in the other direction. Tensor bytes are only ever
cut at row borders, where a frame carries a slice that is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import structlog

from stip_gateway.admission import Account, Admission
from stip_protocol.errors import (
    Draining,
    FrameInvalid,
    Overloaded,
    SessionUnknown,
    StipError,
)
from stip_protocol.rpc import MESSAGE_BYTES
from stip_protocol.tensor import require_rows, row_bytes
from stip_protocol.wire import model_pb2

HANDLE_BYTES = 16
REQUEST_ID = re.compile(r"[0-9a-f]{32}")


@dataclass
class Passed:
    """What one message turns into: a message to hand on, and answers to the sender."""

    onward: list[model_pb2.Up] = field(default_factory=list)
    answers: list[model_pb2.Down] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    rows: int = 0


@dataclass(frozen=True)
class _Session:
    account: Account
    request_id: str


class LinkSessions:
    """The sessions of one link and the leases they run under."""

    def __init__(
        self,
        card: model_pb2.Card,
        admission: Admission,
        *,
        link_key: bytes,
        sessions: int,
        slices: int,
    ) -> None:
        self._card, self._admission, self._link_key = card, admission, link_key
        self._limit, self._slices = sessions, slices
        self._row = row_bytes(card.dtype, card.width)
        self._open_sessions: dict[bytes, _Session] = {}
        self._ended: dict[bytes, None] = {}
        self.draining = False

    @property
    def sessions(self) -> int:
        return len(self._open_sessions)

    def up(self, message: model_pb2.Up) -> Passed:
        """One message of the enclave.

        A refusal about one session is an answer, and its neighbours go on; a malformed envelope raises
        `FrameInvalid` or `TensorInvalid` and ends the link.
        """
        kind = message.WhichOneof("body")
        passed = Passed()
        if kind == "feed":
            self._feed(message, passed)
        elif kind == "open":
            self._open(message, passed)
        elif kind == "close":
            session = _handle(message.close.session, "Close.session")
            if session in self._open_sessions:
                self._end(session)
                passed.onward.append(message)
        elif kind == "recall":
            session = _handle(message.recall.session, "Recall.session")
            if session in self._open_sessions:
                passed.onward.append(message)
            else:
                self._unknown(session, passed)
        elif kind == "renew":
            try:
                self._admit(message.renew.lease)
            except StipError as error:
                self._refuse(error, passed)
        else:
            raise FrameInvalid.because("Up.body", kind, "open, feed, renew, close, recall")
        return passed

    def down(self, message: model_pb2.Down) -> None:
        """Note what a message of the replica ends; it is handed on as it is."""
        if message.WhichOneof("body") == "closed" and message.closed.session in self._open_sessions:
            self._end(message.closed.session, message.closed.code)

    def _open(self, message: model_pb2.Up, passed: Passed) -> None:
        opening = message.open
        session = _handle(opening.session, "Open.session")
        if opening.request_id and not REQUEST_ID.fullmatch(opening.request_id):
            raise FrameInvalid.because("Open.request_id", "another form", "32 hexadecimal digits")
        try:
            if self.draining:
                raise Draining("this gateway takes no new sessions")
            if session in self._open_sessions:
                raise FrameInvalid.because("Open.session", "a session that is open", "a fresh handle")
            if self.sessions >= self._limit:
                raise Overloaded.because("sessions of the link", self.sessions + 1, f"at most {self._limit}")
            account = self._admit(opening.lease)
        except StipError as error:
            self._refuse(error, passed, session, opening.request_id)
            if session not in self._open_sessions:
                self._remember(session)
            return
        self._ended.pop(session, None)
        self._open_sessions[session] = _Session(account, opening.request_id)
        structlog.get_logger().info("session opened", request_id=opening.request_id, sessions=self.sessions)
        opening.lease = b""
        passed.onward.append(message)

    def _feed(self, message: model_pb2.Up, passed: Passed) -> None:
        feed = message.feed
        if not 0 < len(feed.slices) <= self._slices:
            raise FrameInvalid.because("Feed.slices", len(feed.slices), f"1 to {self._slices}")
        total = sum(part.count for part in feed.slices)
        if total * self._row > MESSAGE_BYTES:
            raise FrameInvalid.because("Feed rows", total, f"at most {MESSAGE_BYTES // self._row}")
        require_rows(feed.rows, total, self._card.dtype, self._card.width, what="Feed.rows")
        now = self._admission.now()
        kept, refused = [], False
        for part in feed.slices:
            session = self._open_sessions.get(_handle(part.session, "Slice.session"))
            if session is None:
                self._unknown(part.session, passed)
                refused = True
                continue
            try:
                if part.count == 0:
                    raise FrameInvalid.because("Slice.count", 0, "at least 1")
                session.account.debit(part.count, now)
            except StipError as error:
                self._refuse(error, passed, part.session, session.request_id)
                self._end(part.session, error.code)
                passed.onward.append(model_pb2.Up(close=model_pb2.Close(session=part.session)))
                refused = True
                continue
            kept.append(part)
        passed.rows = sum(part.count for part in kept)
        if kept:
            passed.onward.append(message if not refused else self._without_refused(feed, kept))

    def _without_refused(self, feed: model_pb2.Feed, kept: list[model_pb2.Slice]) -> model_pb2.Up:
        wanted = {id(part) for part in kept}
        rows, start = [], 0
        for part in feed.slices:
            end = start + part.count * self._row
            if id(part) in wanted:
                rows.append(feed.rows[start:end])
            start = end
        return model_pb2.Up(feed=model_pb2.Feed(slices=kept, rows=b"".join(rows)))

    def _admit(self, lease: bytes) -> Account:
        return self._admission.open(
            lease,
            instance=self._card.instance,
            epoch=self._card.epoch,
            manifest_digest=self._card.manifest_digest,
            link_key=self._link_key,
        )

    def _unknown(self, session: bytes, passed: Passed) -> None:
        """Slices that were in flight when their session was closed are dropped without a word."""
        if session not in self._ended:
            self._refuse(SessionUnknown("session: not open on this link"), passed, session)
            self._remember(session)

    def _end(self, session: bytes, code: str = "closed") -> None:
        ended = self._open_sessions.pop(session)
        self._remember(session)
        structlog.get_logger().info("session ended", request_id=ended.request_id, code=code, sessions=self.sessions)

    def _remember(self, session: bytes) -> None:
        """Note an ended session; the oldest are forgotten."""
        self._ended[session] = None
        while len(self._ended) > 4 * self._limit:
            self._ended.pop(next(iter(self._ended)))

    def _refuse(self, error: StipError, passed: Passed, session: bytes = b"", request_id: str = "") -> None:
        passed.refusals.append(error.code)
        structlog.get_logger().warning("refused", code=error.code, request_id=request_id, detail=error.message)
        if session:
            closed = model_pb2.Closed(session=session, code=error.code, message=error.message)
            passed.answers.append(model_pb2.Down(closed=closed))


def _handle(session: bytes, what: str) -> bytes:
    """`session`, whose length bounds what is remembered and logged of it."""
    if len(session) != HANDLE_BYTES:
        raise FrameInvalid.because(what, f"{len(session)} bytes", f"{HANDLE_BYTES} bytes")
    return session
