"""The control: the server's engine with the plain weights, called directly, in a process of its own.

The caller lives in the engine's event loop and answers every output at once with the next row: nothing is
serialized, nothing is waited for. No way to serve this engine could be faster.
"""

from __future__ import annotations

import asyncio
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

from benchmarks.samples import Samples
from stip_server.config import EngineSettings
from stip_server.engine import Ended, Form, Output, Slice, Top
from stip_server.engines.transformers import TransformersEngine, card_for, split


@dataclass(frozen=True)
class Order:
    """One run: a stream a prompt, all begun together, `tokens` tokens each or until the first stream has so many."""

    prompts: list[list[int]]
    tokens: int
    output: str
    """Form the engine is asked for: `top` (base model, head, largest logits) or `hidden` (base model alone)."""


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

    def run(self, order: Order) -> Samples:
        """Raises `EOFError` where the process died."""
        self._pipe.send(order)
        answer = self._pipe.recv()
        assert isinstance(answer, Samples)
        return answer


def _serve(pipe: Connection, checkpoint: Path, dtype: str, settings: dict[str, Any]) -> None:
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype), local_files_only=True)
    asyncio.run(_work(pipe, model, EngineSettings(**settings)))


async def _work(pipe: Connection, model: Any, settings: EngineSettings) -> None:
    base, head = split(model)
    engine = TransformersEngine(base, head, card_for(base, head, settings), settings)
    table = base.get_input_embeddings().weight.detach().view(torch.uint8).numpy()
    caller = _Caller(engine, table)
    pump = asyncio.create_task(caller.pump())
    try:
        while True:
            order = await asyncio.to_thread(pipe.recv)
            pipe.send(await caller.run(order))
    except EOFError:
        await engine.stop()
        await pump


class _Caller:
    """Closes the loop around the engine: from outputs to rows."""

    def __init__(self, engine: TransformersEngine, table: np.ndarray[Any, Any]) -> None:
        self._engine, self._table = engine, table
        self._order = Order([], 0, "top")
        self._fed: list[int] = []
        self._times: list[list[float]] = []
        self._ids: list[list[int]] = []
        self._begun = 0.0
        self._done = asyncio.Event()
        self._round = 0

    async def run(self, order: Order) -> Samples:
        streams = range(len(order.prompts))
        self._round += 1
        self._order, self._done = order, asyncio.Event()
        self._fed = [len(prompt) for prompt in order.prompts]
        self._times, self._ids = [[] for _ in streams], [[] for _ in streams]
        for stream in streams:
            positions = len(order.prompts[stream]) + order.tokens
            self._engine.open(self._key(stream), max_positions=positions, output=Form(order.output))
        self._begun = time.perf_counter()
        self._engine.feed([
            Slice(self._key(stream), 0, len(prompt), True, self._rows(prompt))
            for stream, prompt in enumerate(order.prompts)
        ])  # fmt: skip
        await self._done.wait()
        for stream in streams:
            self._engine.close(self._key(stream))
        return Samples(self._times, self._ids)

    async def pump(self) -> None:
        async for events in self._engine.steps():
            slices = []
            for event in events:
                if isinstance(event, Ended):
                    raise event.error
                if isinstance(event, Output) and event.session[0] == self._round and not self._done.is_set():
                    slices.append(self._answered(event))
            if slices and not self._done.is_set():
                self._engine.feed(slices)

    def _answered(self, output: Output) -> Slice:
        stream = int.from_bytes(output.session[1], "big")
        self._times[stream].append(time.perf_counter() - self._begun)
        if isinstance(output.out, Top):
            chosen = int.from_bytes(output.out.indices[:4], "little")
        else:
            # Without a head nobody knows the next token; any row takes the same time.
            prompt = self._order.prompts[stream]
            chosen = prompt[len(self._times[stream]) % len(prompt)]
        self._ids[stream].append(chosen)
        if len(self._times[stream]) == self._order.tokens:
            self._done.set()
        position = self._fed[stream]
        self._fed[stream] += 1
        return Slice(output.session, position, 1, True, self._rows([chosen]))

    def _key(self, stream: int) -> tuple[int, bytes]:
        return self._round, stream.to_bytes(16, "big")

    def _rows(self, ids: Sequence[int]) -> bytes:
        return self._table[list(ids)].tobytes()
