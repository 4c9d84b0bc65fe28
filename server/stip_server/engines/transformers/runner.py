"""Runs steps on torch: rows in, outputs out. All of it in one worker thread."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stip_protocol.errors import CheckpointInvalid, TensorInvalid
from stip_protocol.tensor import row_bytes
from stip_server.engine import TOP_COUNT, Card, Form, Hidden, Logits, Top
from stip_server.engines.transformers.attention import SLOT_ATTENTION, soft_capped
from stip_server.engines.transformers.cache import Placement, SlotCache
from stip_server.engines.transformers.family import EVERY_LAYER, shape_of
from stip_server.engines.transformers.scheduler import Batch, Work
from stip_server.engines.transformers.slots import Vacate

Masks = torch.Tensor | dict[str, torch.Tensor | None] | None
"""What a model takes as `attention_mask`: one for all layers, or one a kind of layer."""
EXPERTS = {torch.float64: "eager"}
"""How experts are computed where torch has no grouped product for the dtype."""
GROUPED_EXPERTS = "grouped_mm"
"""One product an expert over its rows: what transformers itself chooses, and the fastest of its choices on CPUs too."""


@dataclass(frozen=True)
class LogitsRow:
    """The full row behind a `Top`, where it was computed."""

    batch: torch.Tensor = field(repr=False)
    index: int

    def alone(self) -> LogitsRow:
        """The row in memory of its own."""
        return self if len(self.batch) == 1 else LogitsRow(self.batch[self.index : self.index + 1].clone(), 0)


@dataclass(frozen=True)
class Result:
    """What one session got from a step: an output, an error that ends it, or nothing yet."""

    out: Hidden | Top | None = None
    logits: LogitsRow | None = None
    error: TensorInvalid | None = None


class Runner:
    """The model, its head and the slot cache.

    `model` is a transformers base model (its output is the hidden state after the final norm), `head` the linear
    map to logits or None. The caller's module is left as it is: the runner works with modules of its own over
    the same weights.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None, card: Card) -> None:
        self._card = card
        self._dtype: torch.dtype = getattr(torch, card.dtype)
        self._row_bytes = row_bytes(card.dtype, card.width)
        self._model: Any = _own(model)
        self._device: torch.device = next(model.parameters()).device
        self._head = None if head is None else _own(head)
        self._shape = shape = shape_of(self._model.config)
        for name, got, allowed in (
            ("width", card.width, shape.width),
            ("max_positions", card.max_positions, min(card.max_positions, shape.positions)),
        ):
            if got != allowed:
                raise CheckpointInvalid.because(f"card {name}", got, allowed)
        self._model.set_attn_implementation(SLOT_ATTENTION)
        if shape.experts:
            self._model.set_experts_implementation(EXPERTS.get(self._dtype, GROUPED_EXPERTS))
        slots = (card.max_sessions, shape.kv_heads, card.max_positions, shape.head_width)
        self._cache = SlotCache(shape.layers, slots, self._dtype, self._device)
        self._steps = torch.arange(card.max_positions, device=self._device)
        self._rehearse()

    @torch.inference_mode()
    def run(self, batch: Batch) -> tuple[list[Result], float]:
        """One result a piece of work, in order, and the seconds of compute."""
        started = time.perf_counter()
        self._cache.vacate(batch.moves)
        work = batch.work
        several = len(work) > 1
        hidden = self._decode(work) if several else self._single(work[0])
        finite = torch.isfinite(hidden).all(dim=-1)
        finite = finite if several else finite.all(dim=0, keepdim=True)
        results = self._results(work, hidden[-len(work) :], finite.tolist())
        return results, time.perf_counter() - started

    @torch.inference_mode()
    def logits(self, row: LogitsRow) -> Logits:
        """The full row behind a `Top`."""
        return Logits(_bytes(row.batch[row.index]))

    def _decode(self, work: Sequence[Work]) -> torch.Tensor:
        """One row each of several sessions: hidden states [len(work), d]."""
        first = min(w.slot for w in work)
        stop = max(w.slot for w in work) + 1
        by_slot = {w.slot: w for w in work}
        span = [by_slot.get(slot) for slot in range(first, stop)]
        blank = bytes(self._row_bytes)
        rows = bytearray().join(w.rows[0] if w else blank for w in span)
        positions = torch.tensor([w.position if w else 0 for w in span], device=self._device)
        index = torch.tensor([w.slot - first for w in work], device=self._device)
        length = max(w.position for w in work) + 1
        members = (index, index + first, positions[index])
        ragged = any(w is None or w.position + 1 != length for w in span)
        masks = self._masks(positions[:, None], length, ragged=ragged)
        self._cache.place(Placement(first, stop, 0, 1, length, members))
        return self._forward(self._tensor(rows)[:, None], positions[:, None], masks)[index, 0]

    def _single(self, work: Work) -> torch.Tensor:
        """One or more rows of one session: hidden states [rows, d]."""
        length = work.position + work.count
        positions = self._steps[work.position : length]
        masks = self._masks(positions[None], length, ragged=work.count > 1)
        self._cache.place(Placement(work.slot, work.slot + 1, work.position, work.count, length))
        rows = self._tensor(bytearray().join(work.rows))
        return self._forward(rows[None], positions[None], masks)[0]

    def _rehearse(self) -> None:
        """Step a row of zeros, so that a model that does not fit its configuration is refused before it is offered."""
        self._cache.place(Placement(0, 1, 0, 1, 1))
        row = torch.zeros((1, 1, self._shape.width), dtype=self._dtype, device=self._device)
        with torch.inference_mode():
            try:
                self._forward(row, self._steps[None, :1], self._masks(self._steps[None, :1], 1, ragged=False))
            except CheckpointInvalid:
                raise
            except Exception as error:
                got = f"a model that does not step ({type(error).__name__})"
                raise CheckpointInvalid.because("server", got, "one that fits its configuration") from error
            self._cache.vacate([Vacate(0, 0, 1, 0)])

    def _forward(self, rows: torch.Tensor, positions: torch.Tensor, masks: Masks) -> torch.Tensor:
        out: torch.Tensor = self._model(
            inputs_embeds=rows,
            position_ids=positions,
            attention_mask=masks,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return out

    def _masks(self, positions: torch.Tensor, length: int, *, ragged: bool) -> Masks:
        """What rows at `positions` [batch, rows] see of `length` positions, for every kind of layer.

        Not `ragged`: every row sees all of them wherever a window does not hide the first ones.
        """
        full = self._mask(positions, length, None) if ragged else None
        masks = {
            kind: full if window is None or length <= window else self._mask(positions, length, window)
            for kind, window in self._shape.windows.items()
        }
        return masks if self._shape.layered else masks[EVERY_LAYER]

    def _mask(self, positions: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
        """What is added to the scores: 0 at a row's own position and before it, as far as the window reaches, and
        -inf elsewhere. [batch, 1, groups · rows, length], or [batch, 1, 1, length] for one row."""
        hidden = self._steps[:length] > positions[..., None]
        if window is not None:
            hidden |= self._steps[:length] <= positions[..., None] - window
        mask = torch.zeros_like(hidden, dtype=self._dtype).masked_fill_(hidden, -math.inf)
        rows = positions.shape[-1]
        return (mask if rows == 1 else mask.repeat(1, self._shape.groups, 1))[:, None]

    def _tensor(self, rows: bytearray) -> torch.Tensor:
        return torch.frombuffer(rows, dtype=self._dtype).view(-1, self._card.width).to(self._device)

    def _results(self, work: Sequence[Work], hidden: torch.Tensor, finite: list[bool]) -> list[Result]:
        """From the hidden state of each one's last row."""
        results = [Result() if good else Result(error=_overflow()) for good in finite]
        due = [i for i, w in enumerate(work) if w.answer and finite[i]]
        for form, answer in ((Form.HIDDEN, self._hidden), (Form.TOP, self._top)):
            chosen = [i for i in due if work[i].answer is form]
            if chosen:
                rows = hidden if len(chosen) == len(work) else hidden[chosen]
                for i, result in zip(chosen, answer(rows), strict=True):
                    results[i] = result
        return results

    def _hidden(self, hidden: torch.Tensor) -> list[Result]:
        data = _bytes(hidden)
        return [Result(Hidden(piece)) for piece in _cut(data, self._row_bytes)]

    def _top(self, hidden: torch.Tensor) -> list[Result]:
        assert self._head is not None
        logits = self._head(hidden)
        if (cap := self._shape.logit_cap) is not None:
            logits = soft_capped(logits, cap)
        count = min(TOP_COUNT, logits.shape[-1])
        values, indices = torch.topk(logits, count)
        wide = logits if self._dtype is torch.float64 else logits.float()
        sums = torch.logsumexp(wide, dim=-1).float()
        good = torch.isfinite(sums).tolist()
        value_rows = _cut(_bytes(values), values.shape[-1] * values.element_size())
        index_rows = _cut(_bytes(indices.to(torch.uint32)), 4 * count)
        sum_rows = _cut(_bytes(sums), 4)
        return [
            Result(Top(count, i, v, s), LogitsRow(logits, row)) if good[row] else Result(error=_overflow())
            for row, (i, v, s) in enumerate(zip(index_rows, value_rows, sum_rows, strict=True))
        ]


def _overflow() -> TensorInvalid:
    return TensorInvalid.because("hidden state", "a value that is not finite", "rows in the model's range")


def _own(module: nn.Module) -> Any:
    """The same weights under modules and configuration of one's own: settings do not reach the caller's module."""
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    own = copy.deepcopy(module, shared)
    return own.eval()


def _bytes(tensor: torch.Tensor) -> bytes:
    """Row-major bytes in native dtype."""
    return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]
