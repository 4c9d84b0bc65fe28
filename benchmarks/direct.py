"""The control: the server's engine with the plain weights, called directly, in a process of its own.

The caller lives in the engine's event loop and answers every output at once with the next row: nothing is
serialized, nothing is waited for. No way to serve this engine could be faster.
"""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.samples import Order, Runner, Samples
from stip_server.config import TransformersSettings
from stip_server.engine import Ended, Event, Form, Generation, Ids, Output, Slice, Top
from stip_server.engines.transformers import TransformersEngine, card_for, split

ENDLESS = 1 << 30
"""Ids that a generation may add; the run's own bound comes first."""


@dataclass(frozen=True)
class _Job:
    order: Order
    form: Form


class DirectEngine:
    """The process, from outside. A context manager."""

    def __init__(self, checkpoint: Path, dtype: str, engine: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, checkpoint, dtype, engine), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def arm(self, form: Form) -> Runner:
        """`top`: base model, head and largest logits; `hidden`: base model alone; `ids`: the engine decodes alone."""

        async def run(order: Order) -> Samples:
            return await asyncio.to_thread(self._run, form, order)

        return run

    def _run(self, form: Form, order: Order) -> Samples:
        """Raises `EOFError` where the process died."""
        self._pipe.send(_Job(order, form))
        answer = self._pipe.recv()
        assert isinstance(answer, Samples)
        return answer


def _serve(pipe: Connection, checkpoint: Path, dtype: str, settings: dict[str, Any]) -> None:
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype), local_files_only=True)
    asyncio.run(_work(pipe, model, TransformersSettings(**settings)))


async def _work(pipe: Connection, model: Any, settings: TransformersSettings) -> None:
    base, head = split(model)
    card = dataclasses.replace(card_for(base, head, settings), forms=(Form.HIDDEN, Form.TOP, Form.IDS))
    engine = TransformersEngine(base, head, card, settings)
    table = base.get_input_embeddings().weight.detach().view(torch.uint8).numpy()
    caller = _Caller(engine, table)
    pump = asyncio.create_task(caller.pump())
    try:
        while True:
            job = await asyncio.to_thread(pipe.recv)
            running = asyncio.create_task(caller.run(job))
            await asyncio.wait((running, pump), return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                running.cancel()
                await pump
            pipe.send(await running)
    except EOFError:
        await engine.stop()
        await pump


class _Caller:
    """Closes the loop around the engine: from outputs to rows, or from ids to times."""

    def __init__(self, engine: TransformersEngine, table: np.ndarray[Any, Any]) -> None:
        self._engine, self._table = engine, table
        self._form = Form.TOP
        self._round = 0
        self._lengths: list[int] = []
        self._times: list[list[float]] = []
        self._ids: list[list[int]] = []
        self._bound = 0
        self._begun = 0.0
        self._done = asyncio.Event()

    async def run(self, job: _Job) -> Samples:
        order, streams = job.order, range(len(job.order.prompts))
        self._round += 1
        self._form = job.form
        self._lengths = [0 for _ in streams]
        for stream in streams:
            positions = len(order.prompts[stream]) + len(order.seconds[stream]) + order.tokens + 2
            self._engine.open(self._key(stream), max_positions=positions, output=job.form)
        first, first_ids = await self._turn(order.prompts, 1)
        # The token of the first turn is the caller's word, so it goes in with the prompt of the second.
        alone = job.form is Form.IDS
        pending = [[] if alone else ids for ids in first_ids]
        times, ids = await self._turn([[*had, *new] for had, new in zip(pending, order.seconds, strict=True)],
                                      order.tokens)  # fmt: skip
        for stream in streams:
            self._engine.close(self._key(stream))
        return Samples([each[0] for each in first], times, [[*a, *b] for a, b in zip(first_ids, ids, strict=True)])

    async def _turn(self, prompts: Sequence[list[int]], tokens: int) -> tuple[list[list[float]], list[list[int]]]:
        """Times and ids by stream. A turn of one token ends with the last stream's, another with the first stream
        that has all."""
        self._times, self._ids = [[] for _ in prompts], [[] for _ in prompts]
        self._bound, self._done = tokens, asyncio.Event()
        self._begun = time.perf_counter()
        self._engine.feed([self._slice(stream, ids) for stream, ids in enumerate(prompts)])
        if self._form is Form.IDS:
            for stream in range(len(prompts)):
                generation = Generation(self._lengths[stream], tokens, frozenset())
                self._engine.generate(self._key(stream), generation)
        await self._done.wait()
        return self._times, self._ids

    async def pump(self) -> None:
        async for events in self._engine.steps():
            slices: list[Slice] = []
            for event in events:
                if isinstance(event, Ended):
                    raise event.error
                slices += self._answered(event)
            if slices and not self._done.is_set():
                self._engine.feed(slices)

    def _answered(self, event: Event) -> list[Slice]:
        """What follows on an event: the next row of its stream."""
        if not isinstance(event, Output | Ids) or event.session[0] != self._round or self._done.is_set():
            return []
        stream, now = int.from_bytes(event.session[1], "big"), time.perf_counter() - self._begun
        chosen = self._chosen(stream, event)
        self._times[stream] += [now] * len(chosen)
        self._ids[stream] += chosen
        counts = [len(times) for times in self._times]
        if min(counts) >= self._bound or max(counts) >= self._bound > 1:
            self._done.set()
        if isinstance(event, Ids):
            self._lengths[stream] += len(chosen)
            return []
        return [self._slice(stream, chosen)] if counts[stream] < self._bound else []

    def _chosen(self, stream: int, event: Output | Ids) -> list[int]:
        if isinstance(event, Ids):
            return [int(each) for each in np.frombuffer(event.ids, "<u4")]
        if isinstance(event.out, Top):
            return [int.from_bytes(event.out.indices[:4], "little")]
        # Without a head nobody knows the next token; any row takes the same time.
        return [(self._lengths[stream] * 7919) % len(self._table)]

    def _slice(self, stream: int, ids: list[int]) -> Slice:
        position = self._lengths[stream]
        self._lengths[stream] += len(ids)
        rows = np.asarray(ids, "<u4").tobytes() if self._form is Form.IDS else self._table[ids].tobytes()
        return Slice(self._key(stream), position, len(ids), 0 if self._form is Form.IDS else 1, rows)

    def _key(self, stream: int) -> tuple[int, bytes]:
        return self._round, stream.to_bytes(16, "big")
