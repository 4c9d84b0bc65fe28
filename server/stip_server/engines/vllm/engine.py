"""The engine on vLLM, which schedules, batches and keeps the KV cache on its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np
import structlog

from stip_protocol.errors import DeadlineExceeded, StipError, Unavailable
from stip_server.engine import Card, Ended, Event, Form, Generation, Ids, Output, Session, Slice, Stepped
from stip_server.engines.acceptance import require_opening
from stip_server.engines.admission import Admission
from stip_server.engines.vllm.head import Answers
from stip_server.engines.vllm.requests import generated, last_state, sampling
from stip_server.engines.vllm.sequence import Ids as HistoryOfIds
from stip_server.engines.vllm.sequence import Rows, Sequence, sequence


class VllmEngine:
    """`stip_server.engine.Engine` over vLLM's `AsyncLLM`.

    `llm` belongs to the running event loop and generates where `card.forms` says ids, otherwise it pools (see
    `starting`); `answers` makes outputs of hidden states. Sessions of `card.max_positions` rows must fit `llm`'s
    longest; open ones hold at most `positions` together, what its KV cache has room for: beyond that vLLM would compute
    them anew in turns. `leave` runs once, when the engine stops.

    A session is a growing history that every request sends whole: vLLM finds what it computed before in its prefix
    cache, under a salt of the session's own. `compute` of an event is what passed from its request, or the ids
    before, until it came, on a clock that stands still while answers gather: those that were computed together say the
    same and leave in one frame. vLLM does not say how long it queued, so `queue` is 0.
    """

    def __init__(
        self,
        llm: Any,
        answers: Answers,
        card: Card,
        *,
        positions: int,
        idle_seconds: float,
        leave: Callable[[], None],
    ) -> None:
        self._llm, self._answers, self._card, self._leave = llm, answers, card, leave
        self._idle = idle_seconds
        self._open: dict[Session, Sequence] = {}
        self._admission = Admission(card.max_sessions, min(positions, card.max_sessions * card.max_positions))
        self._tasks: set[asyncio.Task[None]] = set()
        self._names = itertools.count()
        self._events: list[Event] = []
        self._told = 0.0
        self._wake = asyncio.Event()
        self._stopped = False
        llm.output_handler.add_done_callback(self._broken)

    @property
    def card(self) -> Card:
        return self._card

    def open(self, session: Session, *, max_positions: int, output: Form, account: bytes = b"") -> None:
        require_opening(session, max_positions=max_positions, output=output, card=self._card, opened=self._open)
        now = time.monotonic()
        self._admission.enter(account, max_positions, now)
        self._open[session] = sequence(session, self._card, output, max_positions, account, now)
        self._wake.set()

    def feed(self, slices: Ordered[Slice]) -> None:
        now = time.monotonic()
        for piece in slices:
            if (held := self._open.get(piece.session)) is not None:
                with self._ending(held):
                    held.accept(piece, self._card, now)
                    if held.owed:
                        self._start(held, self._step(held))

    def recall(self, session: Session, position: int) -> None:
        if (held := self._open.get(session)) is not None:
            with self._ending(held):
                row = held.recall(position)
                self._tell(Output(session, position, row.read()))

    def generate(self, session: Session, generation: Generation) -> None:
        if (held := self._open.get(session)) is not None:
            with self._ending(held):
                held.begin(generation, time.monotonic())
                self._start(held, self._decode(held, sampling(generation, self._card.vocabulary)))

    def halt(self, session: Session) -> None:
        """What vLLM decoded and did not hand over yet is no part of the session."""
        held = self._open.get(session)
        if held is not None and held.generation is not None:
            held.stop()
            self._tell(Ids(session, len(held.history), b"", True))

    def close(self, session: Session) -> None:
        held = self._open.pop(session, None)
        if held is None:
            return
        self._admission.leave(held.account, held.capacity, time.monotonic())
        held.stop()
        self._events = [event for event in self._events if getattr(event, "session", None) != session]

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._llm.output_handler.remove_done_callback(self._broken)
        for session in list(self._open):
            self.close(session)
        self._wake.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._answers.stop()
        self._leave()

    async def steps(self) -> AsyncIterator[list[Event]]:
        """Raises `Unavailable` where vLLM died: nothing is left that could be served."""
        while not self._stopped:
            self._expire(time.monotonic())
            if self._events:
                events, self._events = self._events, []
                yield [*_stepped(events), *events]
            elif self._llm.output_handler.done():
                raise Unavailable("vLLM ended")
            else:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._until_idle(time.monotonic())):
                        await self._wake.wait()

    def _start(self, held: Sequence, work: Coroutine[Any, Any, None]) -> None:
        """Run a session's request beside the others."""
        held.request = asyncio.create_task(self._guarded(held, work))
        self._tasks.add(held.request)
        held.request.add_done_callback(self._tasks.discard)

    async def _guarded(self, held: Sequence, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - whatever a request raises, it ends its session and no other
            # Its message may quote the request.
            structlog.get_logger().error("request failed", error=type(error).__name__)
            self._end(held, Unavailable("the request that held this session failed"))

    async def _step(self, held: Sequence) -> None:
        """Answer the last row."""
        history = held.history
        assert isinstance(history, Rows)
        begun, position = held.touched, len(history) - 1
        state = await last_state(self._llm, self._name(), history, held.salt)
        result = await self._answers.answer(held.output, state)
        if result.error is not None or result.out is None:
            self._end(held, result.error or Unavailable("no answer to a row"))
            return
        now = self._now()
        held.owed, held.touched = False, now
        held.top = result.logits[0] if result.logits else None
        self._tell(Output(held.session, position, result.out, compute=now - begun))

    async def _decode(self, held: Sequence, params: Any) -> None:
        """Hand on the ids of a generation as they come."""
        history, since = held.history, held.touched
        assert isinstance(history, HistoryOfIds)
        deltas = generated(self._llm, self._name(), history, held.salt, params)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                now = self._now()
                position = len(history)
                history.extend(delta.ids)
                held.added += len(delta.ids)
                held.touched = now
                if delta.done:
                    held.generation = None
                ids = np.array(delta.ids, "<u4").tobytes()
                compute, since = now - since, now
                self._tell(Ids(held.session, position, ids, delta.done, compute=compute))

    def _now(self) -> float:
        """One time for all answers that leave together."""
        if not self._events:
            self._told = time.monotonic()
        return self._told

    def _name(self) -> str:
        """Of a request: it says nothing."""
        return str(next(self._names))

    def _tell(self, *events: Event) -> None:
        self._events += events
        self._wake.set()

    def _end(self, held: Sequence, error: StipError) -> None:
        if self._open.get(held.session) is held:
            self.close(held.session)
            self._tell(Ended(held.session, error))

    @contextlib.contextmanager
    def _ending(self, held: Sequence) -> Any:
        """A refusal within ends the session."""
        try:
            yield
        except StipError as error:
            self._end(held, error)

    def _expire(self, now: float) -> None:
        for held in [s for s in self._open.values() if not s.busy and now - s.touched >= self._idle]:
            self._end(held, DeadlineExceeded(f"the session was idle for {self._idle:g} s", field="idle"))

    def _until_idle(self, now: float) -> float | None:
        touched = min((s.touched for s in self._open.values() if not s.busy), default=None)
        return None if touched is None else max(0.0, touched + self._idle - now)

    def _broken(self, handler: asyncio.Task[None]) -> None:
        """vLLM's side is gone. Each request hears of it as well; a server without sessions only here."""
        self._wake.set()


def _stepped(events: list[Event]) -> list[Event]:
    """What vLLM computed together, as far as it can be seen: the answers that came together."""
    answers = [event for event in events if isinstance(event, Output | Ids) and event.compute > 0]
    return [Stepped(len(answers), len(answers), max(event.compute for event in answers))] if answers else []
