"""The engine on transformers: continuous batching over embeddings or ids, with ragged sessions joining and leaving."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
import torch
from torch import nn

from stip_protocol.errors import PositionRefused, StipError, Unavailable
from stip_server.config import TransformersSettings
from stip_server.engine import Card, Ended, Event, Form, Generation, Ids, Output, Session, Slice, Stepped
from stip_server.engines.transformers.parallel import LeadingRunner, Ranks
from stip_server.engines.transformers.picking import Draw, pick
from stip_server.engines.transformers.runner import LogitsRow, Result, Runner
from stip_server.engines.transformers.scheduler import Batch, Scheduler, Work

FAILED_STEPS = 8
"""Steps that fail one after the other, until the engine gives up: a device that is gone fails every step."""


@dataclass(frozen=True)
class Recall:
    """A full row that was asked for and not answered yet."""

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

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module | None,
        card: Card,
        settings: TransformersSettings,
        ranks: Ranks | None = None,
    ) -> None:
        """`ranks`: the processes that the model is cut among, this one the first of them."""
        self._card = card
        self._runner = (
            Runner(model, head, card, settings) if ranks is None else LeadingRunner(model, head, card, ranks, settings)
        )
        self._scheduler = Scheduler(
            card,
            prefill_chunk=settings.prefill_chunk,
            window=settings.gather_window_ms / 1000,
            idle=settings.idle_seconds,
            positions=settings.positions,
        )
        self._rows: dict[Session, dict[int, LogitsRow]] = {}
        """Of the last answer of each session, by position: those that were not recalled yet."""
        self._recalls: dict[tuple[Session, int], Recall] = {}
        self._waiting: list[Event] = []
        """Events that no step brought."""
        self._wake = asyncio.Event()
        self._stopped = False
        self._failures = 0
        """Steps that failed since the last that did not."""
        threads = settings.threads
        self._worker = ThreadPoolExecutor(
            1, "model", initializer=(lambda: torch.set_num_threads(threads)) if threads else None
        )

    @property
    def card(self) -> Card:
        return self._card

    def open(self, session: Session, *, max_positions: int, output: Form, account: bytes = b"") -> None:
        now = time.monotonic()
        self._scheduler.open(session, max_positions=max_positions, output=output, account=account, now=now)
        self._wake.set()

    def feed(self, slices: Sequence[Slice]) -> None:
        now = time.monotonic()
        for piece in slices:
            with self._ending(piece.session):
                self._scheduler.feed(piece, now)

    def recall(self, session: Session, position: int) -> None:
        with self._ending(session):
            if self._scheduler.recallable(session, position):
                # Each output is good for one recall: asking again and again would keep everybody's steps waiting.
                row = self._rows.get(session, {}).pop(position, None)
                if row is None:
                    raise PositionRefused.because("recall position", position, "that of an output, once")
                self._recalls[session, position] = Recall(row, time.monotonic())

    def generate(self, session: Session, generation: Generation) -> None:
        with self._ending(session):
            self._scheduler.generate(session, generation, time.monotonic())

    def halt(self, session: Session) -> None:
        if (end := self._scheduler.halt(session, time.monotonic())) is not None:
            self._waiting.append(end)
            self._wake.set()

    def close(self, session: Session) -> None:
        self._scheduler.close(session, time.monotonic())
        self._rows.pop(session, None)
        for key in [key for key in self._recalls if key[0] == session]:
            del self._recalls[key]
        if self._waiting:
            self._waiting = [e for e in self._waiting if isinstance(e, Stepped) or e.session != session]

    async def stop(self) -> None:
        self._stopped = True
        self._wake.set()
        await asyncio.to_thread(self._worker.shutdown)
        self._runner.close()

    async def steps(self) -> AsyncIterator[list[Event]]:
        while not self._stopped:
            if self._waiting:
                events, self._waiting = self._waiting, []
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
        if self._waiting:
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
        # Who stays away keeps its own rows and not the whole batch that they were computed in.
        self._rows = {s: {at: row.alone() for at, row in rows.items()} for s, rows in self._rows.items()}
        draws = [_draw(work) for work in batch.work]
        loop = asyncio.get_running_loop()
        try:
            results, picks, seconds = await loop.run_in_executor(self._worker, self._compute, batch, draws)
        except Exception as error:  # noqa: BLE001 - whatever a step raises, it ends the sessions in it and no others
            return self._failed(batch, error)
        return self._answers(batch, results, picks, seconds)

    def _compute(self, batch: Batch, draws: list[Draw | None]) -> tuple[list[Result], list[int | None], float]:
        """In the worker: results, the ids picked of those that decode alone, and the seconds of compute."""
        results, seconds = self._runner.run(batch)
        began = time.perf_counter()
        picks: list[int | None] = [None] * len(results)
        due = [(i, draw) for i, draw in enumerate(draws) if draw is not None and results[i].logits]
        if due:
            rows = [results[i].logits[-1] for i, _ in due]
            with torch.inference_mode():
                picked = pick(_gathered(rows), [draw for _, draw in due])
            for (i, _), one in zip(due, picked, strict=True):
                picks[i] = one
        return results, picks, seconds + time.perf_counter() - began

    def _answers(self, batch: Batch, results: list[Result], picks: list[int | None], seconds: float) -> list[Event]:
        now = time.monotonic()
        self._failures = 0
        self._scheduler.computed(batch, seconds=seconds, now=now)
        rows = sum(work.count for work in batch.work)
        events: list[Event] = [Stepped(len(batch.work), rows, seconds)]
        for work, result, picked in zip(batch.work, results, picks, strict=True):
            if not self._scheduler.is_open(work.sequence):
                continue
            if result.error is not None:
                self.close(work.sequence.session)
                events.append(Ended(work.sequence.session, result.error))
            elif picked is not None:
                events.append(_ids(work, picked, now))
            elif result.out is not None:
                events.append(self._output(work, result, now))
        return events

    def _output(self, work: Work, result: Result, now: float) -> Output:
        assert result.out is not None
        session, first = work.sequence.session, work.position + work.count - work.outputs
        if result.logits:
            self._rows[session] = dict(enumerate(result.logits, first))
        compute, queue = work.sequence.answer(now)
        return Output(session, first, result.out, count=work.outputs, compute=compute, queue=queue)

    def _failed(self, batch: Batch, error: Exception) -> list[Event]:
        """A step that raised: what it wrote into the slots of its sessions is wiped with them.

        Where slots were to be moved first, nobody knows how far that came: then no session goes on. Raises `error`
        once it looks as if no step will do better.
        """
        self._failures += 1
        if self._failures == FAILED_STEPS:
            raise error
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
        key, recall = next(iter(self._recalls.items()))
        queue = time.monotonic() - recall.asked
        out = await asyncio.get_running_loop().run_in_executor(self._worker, self._runner.logits, recall.row)
        if self._recalls.get(key) is not recall:  # closed meanwhile
            return []
        del self._recalls[key]
        session, position = key
        return [Output(session, position, out, queue=queue)]

    @contextlib.contextmanager
    def _ending(self, session: Session) -> Iterator[None]:
        """What a message raises ends its session. Then the steps have something to look at."""
        try:
            yield
        except StipError as error:
            self._end(session, error)
        self._wake.set()

    def _end(self, session: Session, error: StipError) -> None:
        self.close(session)
        self._waiting.append(Ended(session, error))


def _gathered(rows: list[LogitsRow]) -> torch.Tensor:
    """Rows of logits [n, V]. Those of one step lie in one tensor: mostly just as they are wanted."""
    batch, indices = rows[0].batch, [row.index for row in rows]
    return batch if indices == list(range(len(batch))) else batch[indices]


def _draw(work: Work) -> Draw | None:
    """How the next id of a session that decodes alone is drawn after this step."""
    generation = work.sequence.generation
    return Draw.of(generation, work.sequence.answered) if generation is not None and work.outputs else None


def _ids(work: Work, picked: int, now: float) -> Ids:
    """The answer to a session that decodes alone."""
    sequence = work.sequence
    position = sequence.fed
    ids, done, compute, queue = sequence.add(picked, now)
    return Ids(sequence.session, position, ids, done=done, compute=compute, queue=queue)
