"""A runner driven by hand: sessions in slots, ids in, outputs back, as a scheduler would have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stip_server.engine import Form, Hidden, Top
from stip_server.engines.outputs import Result
from stip_server.engines.transformers.parallel import Part
from stip_server.engines.transformers.runner import Runner


@dataclass
class Stepper:
    """`table` holds the rows of all ids; sessions are named by their slots."""

    runner: Runner
    table: torch.Tensor = field(repr=False)
    lengths: dict[int, int] = field(default_factory=dict)

    def part(self, slot: int, ids: Sequence[int], outputs: int, form: Form, back: int = 0) -> Part:
        position = self.lengths.get(slot, 0) - back
        self.lengths[slot] = position + len(ids)
        rows = torch.tensor(ids, dtype=torch.uint32) if form is Form.IDS else self.table[list(ids)].contiguous()
        data = memoryview(rows.view(torch.uint8).numpy().tobytes())
        # In two frames, as rows may come.
        cut = len(data) // len(ids)
        return Part(slot, position, len(ids), [data[:cut], data[cut:]], form, outputs)

    def step(self, *parts: Part) -> list[Result]:
        return self.runner.step([], parts)[0]

    def greedy(
        self, prompts: Sequence[Sequence[int]], count: int, form: Form, model: Any, chunk: int
    ) -> list[list[int]]:
        """`count` ids for every prompt: prompts in chunks, one after the other, then all of them step by step."""
        answers: list[list[int]] = []
        for slot, prompt in enumerate(prompts):
            for start in range(0, len(prompt), chunk):
                piece = prompt[start : start + chunk]
                (result,) = self.step(self.part(slot, piece, 1, form))
            answers.append([pick(result, model)])
        for _ in range(count - 1):
            parts = [self.part(slot, ids[-1:], 1, form) for slot, ids in enumerate(answers)]
            for ids, result in zip(answers, self.step(*parts), strict=True):
                ids.append(pick(result, model))
        return answers


def table_of(model: Any) -> torch.Tensor:
    """The rows of all ids, scaled where the family scales them."""
    with torch.inference_mode():
        table: torch.Tensor = model.get_input_embeddings()(torch.arange(model.config.vocab_size)).clone()
    return table


def numbers(result: Result, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The hidden states of a result, one after the other."""
    assert isinstance(result.out, Hidden)
    return torch.frombuffer(bytearray(result.out.rows), dtype=dtype)


@torch.inference_mode()
def pick(result: Result, model: Any) -> int:
    """The greedy id, from whatever form the result has."""
    assert result.error is None
    if isinstance(result.out, Hidden):
        head = model.get_output_embeddings()
        return int(head(numbers(result, head.weight.dtype)[None])[0].argmax())
    if isinstance(result.out, Top):
        return int.from_bytes(result.out.indices[:4], "little")
    (row,) = result.logits
    return int(row.batch[row.index].argmax())
