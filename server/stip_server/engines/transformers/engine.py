"""The engine on transformers: continuous batching over embeddings, with ragged sessions joining and leaving."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
import torch
from torch import nn

from stip_protocol.errors import PositionRefused, StipError, Unavailable
from stip_server.config import EngineSettings
from stip_server.engine import Card, Ended, Event, Form, Output, Session, Slice, Stepped
from stip_server.engines.transformers.runner import LogitsRow, Result, Runner
from stip_server.engines.transformers.scheduler import Batch, Scheduler


@dataclass(frozen=True)
class Recall:
    """A full row that was asked for and not answered yet."""

    position: int
    row: LogitsRow
    asked: float


class TransformersEngine:
    """`stip_server.engine.Engine` on a loaded transformers model.

    `model` is a base model and `head` the linear map to logits, or None where a session wants hidden states only
    (see `stip_server.engines.transformers.loading.split`). Both are used as they are, protected or plain, and
    stay unchanged; `card` says what they are (`loading.card_for`). Memory for `card.max_sessions` sessions of
    `card.max_positions` rows is taken here. Raises `CheckpointInvalid` for a model that the
    engine would get wrong (see `family`).
    """

    def __init__(self, model: nn.Module, head: nn.Module | None, card: Card, settings: EngineSettings) -> None:
        self._card = card
        self._runner = Runner(model, head, card)
        self._scheduler = Scheduler(
            card,
            prefill_chunk=settings.prefill_chunk,
            window=settings.gather_window_ms / 1000,
            idle=settings.idle_seconds,
        )
        self._rows: dict[Session, LogitsRow] = {}
        self._recalls: dict[Session, Recall] = {}
        self._ended: list[Event] = []
        self._wake = asyncio.Event()
        self._stopped = False
        threads = settings.threads
        self._worker = ThreadPoolExecutor(
            1, "model", initializer=(lambda: torch.set_num_threads(threads)) if threads else None
        )

    @property
    def card(self) -> Card:
        return self._card

    def open(self, session: Session, *, max_positions: int, output: Form) -> None:
        self._scheduler.open(session, max_positions=max_positions, output=output, now=time.monotonic())
        self._wake.set()

    def feed(self, slices: Sequence[Slice]) -> None:
        now = time.monotonic()
        for piece in slices:
            try:
                self._scheduler.feed(piece, now)
            except StipError as error:
                self._end(piece.session, error)
        self._wake.set()

    def recall(self, session: Session, position: int) -> None:
        try:
            if self._scheduler.recallable(session, position):
                # Each output is good for one recall: asking again and again would keep everybody's steps waiting.
                row = self._rows.pop(session, None)
                if row is None:
                    raise PositionRefused.because("recall position", position, "that of an output, once")
                self._recalls[session] = Recall(position, row, time.monotonic())
        except StipError as error:
            self._end(session, error)
        self._wake.set()

    def close(self, session: Session) -> None:
        self._scheduler.close(session)
        self._rows.pop(session, None)
        self._recalls.pop(session, None)

    async def stop(self) -> None:
        self._stopped = True
        self._wake.set()
        await asyncio.to_thread(self._worker.shutdown)

    async def steps(self) -> AsyncIterator[list[Event]]:
        while not self._stopped:
            if self._ended:
                events, self._ended = self._ended, []
                yield events
            elif self._recalls:
                yield await self._recalled()
            elif await self._gathered():
                yield await self._step()

    async def _gathered(self) -> bool:
        """Wait until a step should start. False where something else turned up, or nothing did."""
        now = time.monotonic()
        for session, error in self._scheduler.idle(now):
            self._end(session, error)
        if self._ended:
            return False
        patience = self._scheduler.patience(now)
        if patience == 0.0:
            return not self._stopped
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._scheduler.next_idle(now) if patience is None else patience):
                await self._wake.wait()
        # Also once the wait is over: the session whose row waited may have been closed meanwhile.
        return False

    async def _step(self) -> list[Event]:
        batch = self._scheduler.next(time.monotonic())
        for work in batch.work:
            self._rows.pop(work.sequence.session, None)
        # Who stays away keeps its own row and not the whole batch that it was computed in.
        self._rows = {session: row.alone() for session, row in self._rows.items()}
        loop = asyncio.get_running_loop()
        try:
            results, seconds = await loop.run_in_executor(self._worker, self._runner.run, batch)
        except Exception as error:  # noqa: BLE001 - whatever a step raises, it ends the sessions in it and no others
            return self._failed(batch, error)
        return self._outputs(batch, results, seconds)

    def _outputs(self, batch: Batch, results: list[Result], seconds: float) -> list[Event]:
        now = time.monotonic()
        due = {id(sequence) for sequence in self._scheduler.computed(batch, seconds=seconds, now=now)}
        rows = sum(work.count for work in batch.work)
        events: list[Event] = [Stepped(len(batch.work), rows, seconds)]
        for work, result in zip(batch.work, results, strict=True):
            sequence = work.sequence
            if result.error is not None and self._scheduler.is_open(sequence):
                self.close(sequence.session)
                events.append(Ended(sequence.session, result.error))
            elif result.out is not None and id(sequence) in due:
                if result.logits is not None:
                    self._rows[sequence.session] = result.logits
                compute, queue = sequence.answer(now)
                events.append(Output(sequence.session, sequence.done - 1, result.out, compute, queue))
        return events

    def _failed(self, batch: Batch, error: Exception) -> list[Event]:
        """A step that raised: what it wrote into the slots of its sessions is wiped with them.

        Where slots were to be moved first, nobody knows how far that came: then no session goes on.
        """
        structlog.get_logger().error("step failed", exc_info=error, sessions=len(batch.work))
        self._scheduler.computed(batch, seconds=0.0, now=time.monotonic())
        ended = self._scheduler.sessions() if batch.moves else [w.sequence for w in batch.work]
        events: list[Event] = []
        for sequence in ended:
            if self._scheduler.is_open(sequence):
                self.close(sequence.session)
                events.append(Ended(sequence.session, Unavailable("the step that held this session failed")))
        return events

    async def _recalled(self) -> list[Event]:
        session, recall = next(iter(self._recalls.items()))
        queue = time.monotonic() - recall.asked
        out = await asyncio.get_running_loop().run_in_executor(self._worker, self._runner.logits, recall.row)
        if self._recalls.get(session) is not recall:  # closed meanwhile
            return []
        del self._recalls[session]
        return [Output(session, recall.position, out, 0.0, queue)]

    def _end(self, session: Session, error: StipError) -> None:
        self.close(session)
        self._ended.append(Ended(session, error))
