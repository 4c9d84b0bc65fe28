"""One link through the gateway: an enclave on one side, a replica on the other.

Pure bookkeeping over envelopes, no I/O: `up` takes a message from the enclave, `down` one from the replica, and each
says what goes to the one and to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from stip_gateway.admission import Account, Admission, overloaded
from stip_gateway.frames import Shape, cut
from stip_protocol.errors import BY_CODE, Draining, FrameInvalid, LeaseError, SessionUnknown, StipError
from stip_protocol.fields import ID_BYTES, REQUEST_ID, require_handle
from stip_protocol.rpc import retry_after_ms
from stip_protocol.wire import model_pb2


@dataclass
class Passed:
    """What one message turns into."""

    up: list[model_pb2.Up] = field(default_factory=list)
    """To the replica."""
    down: list[model_pb2.Down] = field(default_factory=list)
    """To the enclave."""
    refusals: list[str] = field(default_factory=list)
    """Codes."""
    rows: int = 0
    """Debited."""


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
        retry_after: float,
    ) -> None:
        """At most `sessions` sessions, and `slices` a frame; one more session may try again after `retry_after` s."""
        self._card, self._admission, self._link_key = card, admission, link_key
        self._limit, self._retry_after = sessions, retry_after
        self._shape = Shape.of(card, slices)
        self._open_sessions: dict[bytes, _Session] = {}
        self._ended: dict[bytes, None] = {}
        self.draining = False
        self._handlers: dict[str, Callable[[model_pb2.Up, Any, Passed], None]] = {
            "feed": self._feed,
            "open": self._open,
            "close": self._close,
            "recall": self._hand_on,
            "renew": self._renew,
            "generate": self._generate,
            "halt": self._hand_on,
        }

    @property
    def sessions(self) -> int:
        return len(self._open_sessions)

    def up(self, message: model_pb2.Up) -> Passed:
        """One message of the enclave.

        A refusal about one session is an answer, and its neighbours go on; a malformed envelope raises
        `FrameInvalid` or `TensorInvalid` and ends the link.
        """
        kind, passed = message.WhichOneof("body"), Passed()
        if kind is None:
            raise FrameInvalid.because("Up.body", kind, ", ".join(self._handlers))
        self._handlers[kind](message, getattr(message, kind), passed)
        return passed

    def down(self, message: model_pb2.Down) -> Passed:
        """One message of the replica: handed on as it is, but for ids that no lease pays for.

        Raises `FrameInvalid` or `TensorInvalid` where nobody can have asked for it.
        """
        kind, passed = message.WhichOneof("body"), Passed()
        if kind == "fed":
            self._shape.require_fed(message.fed)
            if message.fed.HasField("ids"):
                self._ids(message, passed)
                return passed
        elif kind == "closed" and message.closed.session in self._open_sessions:
            said = message.closed.code  # which a replica may fill as it likes
            self._end(message.closed.session, said if said in BY_CODE else "unknown")
        passed.down.append(message)
        return passed

    # -- upward ---------------------------------------------------------------------------------------------------

    def _open(self, message: model_pb2.Up, opening: model_pb2.Open, passed: Passed) -> None:
        session = require_handle(opening.session, "Open.session")
        if opening.request_id and not REQUEST_ID.fullmatch(opening.request_id):
            raise FrameInvalid.because("Open.request_id", "another form", "32 hexadecimal digits")
        try:
            if self.draining:
                raise Draining("this gateway takes no new sessions")
            if session in self._open_sessions:
                raise FrameInvalid.because("Open.session", "a session that is open", "a fresh handle")
            if self.sessions >= self._limit:
                said = "sessions of the link"
                raise overloaded(said, self.sessions + 1, self._limit, retry_after=self._retry_after)
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
        opening.account = account.tag
        passed.up.append(message)

    def _feed(self, message: model_pb2.Up, feed: model_pb2.Feed, passed: Passed) -> None:
        item, now = self._shape.require_feed(feed), self._admission.now()
        kept: dict[int, int] = {}
        for number, part in enumerate(feed.slices):
            session = self._open_sessions.get(require_handle(part.session, "Slice.session"))
            if session is None:
                self._unknown(part.session, passed)
                continue
            try:
                self._shape.require_slice(part)
                session.account.debit(part.count, now)
            except StipError as error:
                self._break_off(error, part.session, passed)
                continue
            kept[number] = part.count
            passed.rows += part.count
        if len(kept) == len(feed.slices):
            passed.up.append(message)
        elif kept:
            left = cut(feed.rows or feed.ids, item, feed.slices, kept)
            slices = [part for number, part in enumerate(feed.slices) if number in kept]
            body = model_pb2.Feed(slices=slices, ids=left) if feed.ids else model_pb2.Feed(slices=slices, rows=left)
            passed.up.append(model_pb2.Up(feed=body))

    def _generate(self, message: model_pb2.Up, generate: model_pb2.Generate, passed: Passed) -> None:
        """Paid for as its ids come down; not begun where not one could be paid for."""
        session = require_handle(generate.session, "Generate.session")
        if session not in self._open_sessions:
            self._unknown(session, passed)
            return
        try:
            self._shape.require_generate(generate)
            self._open_sessions[session].account.require(1, self._admission.now())
        except StipError as error:
            self._break_off(error, session, passed)
            return
        passed.up.append(message)

    def _hand_on(self, message: model_pb2.Up, about: model_pb2.Recall | model_pb2.Halt, passed: Passed) -> None:
        session = require_handle(about.session, "session")
        if session in self._open_sessions:
            passed.up.append(message)
        else:
            self._unknown(session, passed)

    def _close(self, message: model_pb2.Up, close: model_pb2.Close, passed: Passed) -> None:
        session = require_handle(close.session, "Close.session")
        if session in self._open_sessions:
            self._end(session)
            passed.up.append(message)

    def _renew(self, _: model_pb2.Up, renew: model_pb2.Renew, passed: Passed) -> None:
        try:
            self._admit(renew.lease)
        except StipError as error:
            self._refuse(error, passed)

    def _admit(self, lease: bytes) -> Account:
        return self._admission.open(
            lease,
            instance=self._card.instance,
            epoch=self._card.epoch,
            manifest_digest=self._card.manifest_digest,
            link_key=self._link_key,
        )

    # -- downward -------------------------------------------------------------------------------------------------

    def _ids(self, message: model_pb2.Down, passed: Passed) -> None:
        """Debit what was generated. Ids beyond a lease, or of a session that has ended, are not handed on."""
        fed, now = message.fed, self._admission.now()
        kept: dict[int, int] = {}
        endings = Passed()
        for number, part in enumerate(fed.slices):
            session = self._open_sessions.get(part.session)
            if session is None:
                continue
            try:
                session.account.debit(part.count, now)
                kept[number] = part.count
            except LeaseError as error:
                if rest := session.account.debit_rest(now):
                    kept[number] = rest
                self._break_off(error, part.session, endings)
            passed.rows += kept.get(number, 0)
        if kept == {number: part.count for number, part in enumerate(fed.slices)}:
            passed.down.append(message)
        elif kept:
            left = cut(fed.ids.ids, ID_BYTES, fed.slices, kept)
            reply = model_pb2.Down(fed=fed, load=message.load)
            del reply.fed.slices[:]
            for number, count in kept.items():
                part = fed.slices[number]
                done = part.done and count == part.count
                reply.fed.slices.add(session=part.session, position=part.position, count=count, done=done)
            reply.fed.ids.ids = left
            passed.down.append(reply)
        passed.down += endings.down
        passed.up += endings.up
        passed.refusals += endings.refusals

    # -- both -----------------------------------------------------------------------------------------------------

    def _unknown(self, session: bytes, passed: Passed) -> None:
        """Slices that were in flight when their session was closed are dropped without a word. Others are answered and
        counted, but not logged: one frame has hundreds, and nothing of them is worth a line.
        """
        if session not in self._ended:
            self._answer(SessionUnknown("session: not open on this link"), passed, session)
            self._remember(session)

    def _break_off(self, error: StipError, session: bytes, passed: Passed) -> None:
        """End an open session on both sides."""
        self._refuse(error, passed, session, self._open_sessions[session].request_id)
        self._end(session, error.code)
        passed.up.append(model_pb2.Up(close=model_pb2.Close(session=session)))

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
        structlog.get_logger().warning("refused", code=error.code, request_id=request_id, detail=error.message)
        self._answer(error, passed, session)

    def _answer(self, error: StipError, passed: Passed, session: bytes) -> None:
        passed.refusals.append(error.code)
        if session:
            closed = model_pb2.Closed(
                session=session, code=error.code, message=error.message, retry_after_ms=retry_after_ms(error)
            )
            passed.down.append(model_pb2.Down(closed=closed))
