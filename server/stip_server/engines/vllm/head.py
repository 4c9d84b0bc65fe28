"""Answers to hidden states that vLLM hands back: as they are, or through the head of the checkpoint.

vLLM's pooling runner ends at the final norm, so the head of the preset `paper` is applied here, on the CPU of this
process. Rows that come back together go through it together: its weights are read once for all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from torch import nn

from stip_protocol.errors import CheckpointInvalid
from stip_server.checkpoint import Checkpoint
from stip_server.engine import Card, Form
from stip_server.engines.outputs import Outputs, Result
from stip_server.engines.transfer import Transfer

HEADS = ("lm_head.weight", "embed_out.weight")
"""What families call the matrix [vocabulary, d] that is no embedding."""


def load_head(checkpoint: Checkpoint) -> nn.Linear:
    """The head of a checkpoint that says its own. Raises `CheckpointInvalid` where it has none, or another size."""
    manifest = checkpoint.manifest
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in set(HEADS) & set(file.keys()):
                weight = file.get_tensor(name)
                if tuple(weight.shape) != (manifest.vocabulary, manifest.width):
                    allowed = f"[{manifest.vocabulary}, {manifest.width}]"
                    raise CheckpointInvalid.because(name, list(weight.shape), allowed)
                head = nn.Linear(manifest.width, manifest.vocabulary, bias=False, device="meta", dtype=weight.dtype)
                head.weight = nn.Parameter(weight, requires_grad=False)
                return head
    raise CheckpointInvalid.because("head", "no such tensor", " or ".join(HEADS))


@dataclass(frozen=True)
class Row:
    """One hidden state: a `Piece` of one row."""

    form: Form
    state: torch.Tensor = field(repr=False)
    slot: int = 0
    position: int = 0
    count: int = 1
    rows: Sequence[memoryview] = ()
    outputs: int = 1


class Answers:
    """Turns hidden states into answers, off the event loop, all that wait at once."""

    def __init__(self, card: Card, head: nn.Linear | None, cap: float | None, threads: int | None) -> None:
        self._outputs = Outputs(head, cap, Transfer(torch.device("cpu")))
        self._dtype: torch.dtype = getattr(torch, card.dtype)
        self._waiting: list[tuple[Row, asyncio.Future[Result]]] = []
        self._draining: asyncio.Task[None] | None = None
        self._worker = ThreadPoolExecutor(
            1, "head", initializer=(lambda: torch.set_num_threads(threads)) if threads else None
        )

    async def answer(self, form: Form, state: torch.Tensor) -> Result:
        """The answer to a hidden state [d] of any dtype: `Result.error` where it is not finite."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((Row(form, state.to(self._dtype)), future))
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await future

    def stop(self) -> None:
        self._worker.shutdown(wait=False)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                taken, self._waiting = self._waiting, []
                try:
                    results = await loop.run_in_executor(self._worker, self._compute, [row for row, _ in taken])
                except Exception as error:  # noqa: BLE001 - it belongs to those who wait
                    for _, future in taken:
                        if not future.done():
                            future.set_exception(error)
                    continue
                for (_, future), result in zip(taken, results, strict=True):
                    if not future.done():  # its session may have been closed
                        future.set_result(result)
        finally:
            self._draining = None

    @torch.inference_mode()
    def _compute(self, rows: list[Row]) -> list[Result]:
        return self._outputs.results(rows, torch.stack([row.state for row in rows]), range(len(rows)))
