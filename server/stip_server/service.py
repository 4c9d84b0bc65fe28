"""The gRPC service over an engine: links, their sessions, and who gets which event."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import grpc.aio
import structlog

from stip_protocol.errors import (
    Draining,
    FrameInvalid,
    InstanceRefused,
    ReplicaLost,
    RequestInvalid,
    SessionUnknown,
    StipError,
    Unavailable,
)
from stip_protocol.fields import require_handle
from stip_protocol.rpc import EPOCH_KEY, INSTANCE_KEY, REPLICA_KEY
from stip_protocol.telemetry import LINKS, ROWS, SESSIONS, STEP_SESSIONS, Telemetry
from stip_protocol.wire import model_pb2 as wire
from stip_protocol.wire import model_pb2_grpc
from stip_server.engine import Ended, Engine, Event, Form, Stepped
from stip_server.messages import (
    Answer,
    card_message,
    closed,
    form_of,
    generation_of,
    slices_of,
)
from stip_server.peer import Member, Peer


class ModelService(model_pb2_grpc.ModelServicer):
    """`Describe` and `Link` (wire/model.proto) over one engine. `name` is this replica's."""

    def __init__(self, engine: Engine, telemetry: Telemetry, *, name: str, drain_seconds: float) -> None:
        self._engine = engine
        self._card = engine.card
        self._telemetry = telemetry
        self._compute, self._queue = telemetry.stage("compute"), telemetry.stage("queue")
        self._step_sessions, self._rows = telemetry.histogram(STEP_SESSIONS), telemetry.counter(ROWS)
        self._name = name
        self._drain_seconds = drain_seconds
        self._links: dict[int, Peer] = {}
        self._numbers = itertools.count(1)
        self._sessions = 0
        self._draining = False
        self._quiet = asyncio.Event()
        self._log = structlog.get_logger()
        self._handlers: dict[str, Callable[[Peer, Any], None]] = {
            "open": self._open,
            "feed": self._feed,
            "close": self._close,
            "recall": self._recall,
            "generate": self._generate,
            "halt": self._halt,
            # A lease is the gateway's business; an enclave that links without one loses nothing by renewing.
            "renew": lambda peer, message: None,
        }
        self._count()

    @property
    def sessions(self) -> int:
        """Open now."""
        return self._sessions

    def register(self, server: grpc.aio.Server) -> None:
        """Add the service to a server."""
        model_pb2_grpc.add_ModelServicer_to_server(self, server)

    async def Describe(  # noqa: N802 - the wire's name
        self, request: wire.InstanceRef, context: grpc.aio.ServicerContext[Any, Any]
    ) -> wire.Card:
        """Raises `InstanceRefused` for any instance or epoch but the one served."""
        self._require_instance(request.instance, request.epoch)
        return card_message(self._card, self._name)

    async def Link(  # type: ignore[override]  # noqa: N802 - the wire's name; the stubs know iterators alone
        self, _: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Raises `FrameInvalid`, `InstanceRefused`, `ReplicaLost` or `Draining` before, `FrameInvalid` or
        `TensorInvalid` after the stream began: a malformed frame ends it."""
        self._admit(dict(context.invocation_metadata() or ()))
        peer = Peer(next(self._numbers))
        self._links[peer.number] = peer
        self._count()
        # Besides `finally`, which an unread reply delays.
        context.add_done_callback(lambda _: self._detach(peer))  # type: ignore[arg-type]  # the stubs are wrong
        reader = asyncio.create_task(self._read(peer, context))
        reader.add_done_callback(peer.read_to_the_end)
        try:
            while (parcel := await peer.outbox.next()) is not None:
                for message in parcel.messages():
                    message.load = self._sessions
                    await context.write(message)
                peer.outbox.sent(parcel)
            if reader.done():
                await reader
        finally:
            reader.cancel()
            self._detach(peer)

    async def pump(self) -> None:
        """Hand the engine's events to the links, until the engine stops. Where it fails, so does this, and no session
        waits for what will not come."""
        try:
            async for events in self._engine.steps():
                self._dispatch(events)
                # What was dispatched leaves first: before it is counted, and before the engine looks for its next step.
                await asyncio.sleep(0)
                self._observe(events)
        except Exception:
            self._draining = True
            for peer in self._links.values():
                for handle in list(peer.sessions):
                    self._end(peer, handle, Unavailable("the engine of this replica failed"))
            self._count()
            raise

    async def drain(self) -> None:
        """No new sessions; returns when the open ones have ended."""
        self._draining = True
        self._count()
        for peer in self._links.values():
            peer.outbox.put(wire.Down(drain=wire.Drain(seconds=round(self._drain_seconds))))
        await self._quiet.wait()
        for peer in self._links.values():
            peer.outbox.finish()

    async def _read(self, peer: Peer, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        # Read and written through the context: iterators would cost two more turns of the loop a message.
        while (message := await context.read()) is not grpc.aio.EOF:
            body = message.WhichOneof("body")
            if body is None:
                raise FrameInvalid.because("body", "none that is known", ", ".join(self._handlers))
            self._handlers[body](peer, getattr(message, body))
            await peer.outbox.room()

    def _open(self, peer: Peer, message: wire.Open) -> None:
        handle = require_handle(message.session, "session")
        try:
            if self._draining:
                raise Draining("this replica takes no new sessions")
            if handle in peer.sessions:
                raise RequestInvalid.because("session", "a handle that is open", "a fresh one")
            form = form_of(message)
            self._engine.open(
                (peer.number, handle), max_positions=message.max_positions, output=form, account=message.account
            )
        except StipError as error:
            self._end(peer, handle, error)
            return
        peer.admit(handle, Member(message.request_id, form))
        peer.outbox.put(wire.Down(opened=wire.Opened(session=handle)))
        self._count()
        with structlog.contextvars.bound_contextvars(request_id=message.request_id):
            self._log.info("session opened", link=peer.number, sessions=self.sessions)

    def _feed(self, peer: Peer, message: wire.Feed) -> None:
        of_ids, accepted = bool(message.ids), []
        for piece in slices_of(message, peer.number, self._card):
            handle = piece.session[1]
            if not self._holds(peer, handle):
                continue
            if (peer.sessions[handle].form is Form.IDS) is of_ids:
                accepted.append(piece)
            else:
                came, allowed = ("ids", "rows") if of_ids else ("rows", "ids")
                self._end(peer, handle, FrameInvalid.because("frame", came, f"{allowed}, by the session's output"))
        self._engine.feed(accepted)
        self._rows.inc(sum(piece.count for piece in accepted))

    def _recall(self, peer: Peer, message: wire.Recall) -> None:
        handle = require_handle(message.session, "session")
        if self._holds(peer, handle):
            self._engine.recall((peer.number, handle), message.position)

    def _generate(self, peer: Peer, message: wire.Generate) -> None:
        handle = require_handle(message.session, "session")
        if not self._holds(peer, handle):
            return
        try:
            self._engine.generate((peer.number, handle), generation_of(message, self._card))
        except RequestInvalid as error:
            self._end(peer, handle, error)

    def _halt(self, peer: Peer, message: wire.Halt) -> None:
        handle = require_handle(message.session, "session")
        if self._holds(peer, handle):
            self._engine.halt((peer.number, handle))

    def _close(self, peer: Peer, message: wire.Close) -> None:
        handle = require_handle(message.session, "session")
        if handle in peer.sessions:
            self._end(peer, handle, None)

    def _holds(self, peer: Peer, handle: bytes) -> bool:
        """Whether the link has the session. One that it never had is refused, one that ended is passed over."""
        if handle in peer.sessions:
            return True
        if not peer.had(handle):
            self._end(peer, handle, SessionUnknown.because("session", "a handle of no session", "one of this link"))
        return False

    def _end(self, peer: Peer, handle: bytes, error: StipError | None) -> None:
        """End a session (or refuse what would have been one): by the peer where there is no error."""
        self._engine.close((peer.number, handle))
        request_id = peer.drop(handle)
        self._count()
        code = "closed" if error is None else error.code
        if error is not None:
            self._telemetry.refused(code)
            peer.outbox.put(closed(handle, error))
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            self._log.info("session ended", link=peer.number, code=code, sessions=self.sessions)

    def _dispatch(self, events: list[Event]) -> None:
        answers: dict[int, list[Answer]] = {}
        for event in events:
            if isinstance(event, Stepped):
                continue
            peer = self._links.get(event.session[0])
            if peer is None or event.session[1] not in peer.sessions:
                continue
            if isinstance(event, Ended):
                self._end(peer, event.session[1], event.error)
            else:
                answers.setdefault(peer.number, []).append(event)
        for number, group in answers.items():
            self._links[number].answer(group)

    def _observe(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Stepped):
                self._compute.observe(event.compute)
                self._step_sessions.observe(event.sessions)
            elif not isinstance(event, Ended):
                self._queue.observe(event.queue)

    def _detach(self, peer: Peer) -> None:
        """Free what a stream held. Idempotent."""
        if self._links.pop(peer.number, None) is None:
            return
        for handle in list(peer.sessions):
            self._engine.close((peer.number, handle))
        peer.sessions.clear()
        self._count()

    def _count(self) -> None:
        self._sessions = open_now = sum(len(peer.sessions) for peer in self._links.values())
        self._telemetry.gauge(SESSIONS).set(open_now)
        self._telemetry.gauge(LINKS).set(len(self._links))
        if self._draining and not open_now:
            self._quiet.set()

    def _admit(self, metadata: dict[str, str | bytes]) -> None:
        instance, epoch = metadata.get(INSTANCE_KEY), metadata.get(EPOCH_KEY)
        if not isinstance(instance, str) or not isinstance(epoch, str) or not epoch.isdecimal() or len(epoch) > 10:
            raise FrameInvalid.because("metadata", "no instance and epoch", f"{INSTANCE_KEY} and {EPOCH_KEY}")
        self._require_instance(instance, int(epoch))
        if metadata.get(REPLICA_KEY, self._name) != self._name:
            raise ReplicaLost.because(REPLICA_KEY, "another replica", self._name)
        if self._draining:
            raise Draining("this replica takes no new links")

    def _require_instance(self, instance: str, epoch: int) -> None:
        if instance != self._card.instance:
            raise InstanceRefused.because("instance", "another instance", self._card.instance)
        if epoch != self._card.epoch:
            raise InstanceRefused.because("epoch", epoch, self._card.epoch)
