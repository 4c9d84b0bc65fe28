"""Runs steps on torch: rows in, outputs out. All of it in one worker thread."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stip_protocol.errors import CheckpointInvalid
from stip_server.config import TransformersSettings
from stip_server.engine import Card, Form, Logits
from stip_server.engines.family import shape_of
from stip_server.engines.outputs import LogitsRow, Outputs, Piece, Result
from stip_server.engines.transfer import Transfer
from stip_server.engines.transformers.attention import SLOT_ATTENTION, Run
from stip_server.engines.transformers.cache import Placement, SlotCache
from stip_server.engines.transformers.graphs import Bucket, Buckets, StaticSteps
from stip_server.engines.transformers.layout import Layout
from stip_server.engines.transformers.masks import MaskMaker, Masks
from stip_server.engines.transformers.scheduler import Batch
from stip_server.engines.transformers.sharding import is_cut, own_kv_heads
from stip_server.engines.transformers.slots import Vacate

__all__ = ["LogitsRow", "Result", "Runner"]
EXPERTS = {torch.float64: "eager"}
"""How experts are computed where torch has no grouped product for the dtype."""
GROUPED_EXPERTS = "grouped_mm"
"""One product an expert over its rows: what transformers itself chooses, and the fastest of its choices on CPUs too."""


class Runner:
    """The model, its head and the slot cache.

    `model` is a transformers base model (its output is the hidden state after the final norm), `head` the linear
    map to logits or None. The caller's module is left as it is: the runner works with modules of its own over
    the same weights. With `settings` that ask for it, decoding steps are recorded (see `graphs`).
    """

    def __init__(
        self, model: nn.Module, head: nn.Module | None, card: Card, settings: TransformersSettings | None = None
    ) -> None:
        self._card = card
        self._dtype: torch.dtype = getattr(torch, card.dtype)
        self._model: Any = _own(model)
        self._device: torch.device = next(model.parameters()).device
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
        slots = (card.max_sessions, own_kv_heads(self._model, shape), card.max_positions, shape.head_width)
        self._cache = SlotCache(shape.layers, slots, self._dtype, self._device, shape.layer_windows)
        self._masks = MaskMaker(shape, card.max_positions, self._dtype, self._device)
        self._transfer = Transfer(self._device)
        self._outputs = Outputs(None if head is None else _own(head), shape.logit_cap, self._transfer)
        self._rehearse()
        self._steps = self._record(settings or TransformersSettings())

    def run(self, batch: Batch) -> tuple[list[Result], float]:
        """One result a piece of work, in order, and the seconds of compute."""
        return self.step(batch.moves, batch.work)

    @torch.inference_mode()
    def step(self, moves: Sequence[Vacate], work: Sequence[Piece]) -> tuple[list[Result], float]:
        """The same, of parts that need no scheduler."""
        started = time.perf_counter()
        self._cache.vacate(moves)
        bucket = self._steps.buckets.holding(work) if self._steps else None
        if self._steps and bucket:
            hidden, starts = self._static(self._steps, bucket, work)
        elif len(work) > 1:
            hidden, starts = self._several(work)
        else:
            hidden, starts = self._single(work[0]), [0]
        return self._outputs.results(work, hidden, starts), time.perf_counter() - started

    @torch.inference_mode()
    def logits(self, row: LogitsRow) -> Logits:
        """The full row behind a `Top`."""
        return row.read()

    def close(self) -> None:
        """Nothing runs after this."""

    def _several(self, work: Sequence[Piece]) -> tuple[torch.Tensor, list[int]]:
        """A few rows each of several sessions: hidden states [rows, d], and where in them each session's begin."""
        layout = Layout.of(work, self._card.max_positions)
        positions = self._transfer.up(torch.tensor(layout.positions))
        targets = self._transfer.up(torch.tensor(layout.targets))
        slots = self._transfer.up(torch.tensor(layout.slots)[:, None]) if layout.runs else None
        at = Placement(layout.first, layout.stop, layout.lowest, layout.rows, layout.length, targets, slots)
        self._cache.place(at)
        masks = self._masks.masks(positions, layout.length, layout.lowest, ragged=layout.ragged)
        hidden = self._forward(self._rows(layout.members, layout.rows), positions, masks, layout.runs)
        return hidden.flatten(0, 1), layout.starts

    def _static(self, steps: StaticSteps, bucket: Bucket, work: Sequence[Piece]) -> tuple[torch.Tensor, list[int]]:
        """The same in a bucket."""
        layout = steps.layout(bucket, work)
        hidden = steps.run(bucket, layout, self._rows(layout.members, bucket.rows))
        return hidden.flatten(0, 1), layout.starts

    def _bucketed(
        self, rows: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, length: int
    ) -> torch.Tensor:
        """A step of a fixed shape (see `graphs`): all that is read are tensors on the device."""
        slots, count = positions.shape
        self._cache.place(Placement(0, slots, 0, count, length, targets))
        return self._forward(rows, positions, self._masks.masks(positions, length, 0, ragged=True))

    def _single(self, work: Piece) -> torch.Tensor:
        """One or more rows of one session: hidden states [rows, d]."""
        length = work.position + work.count
        positions = self._masks.steps[None, work.position : length]
        self._cache.place(Placement(work.slot, work.slot + 1, work.position, work.count, length))
        masks = self._masks.masks(positions, length, work.position, ragged=work.count > 1)
        return self._forward(self._rows([work], work.count), positions, masks)[0]

    def _rows(self, span: Sequence[Piece | None], longest: int) -> torch.Tensor:
        """The step's rows [slots, longest, d]; those of nobody are zeros. Ids are embedded by the model's own module,
        which scales them where the family does."""
        rows = self._padded([None if _of_ids(w) else w for w in span], longest, self._dtype, self._card.width)
        if of_ids := [i for i, w in enumerate(span) if _of_ids(w)]:
            # No id reaches the sign bit, and devices know more of int32 than of uint32.
            ids = self._padded([span[i] for i in of_ids], longest, torch.int32, 1)
            rows[of_ids] = self._model.get_input_embeddings()(ids[..., 0].long())
        return rows

    def _padded(self, span: Sequence[Piece | None], longest: int, dtype: torch.dtype, width: int) -> torch.Tensor:
        """What `span` was sent: [slots, longest, width], zeros where nothing was."""
        size = width * dtype.itemsize
        data = bytearray()
        for w in span:
            if w is not None:
                data += b"".join(w.rows)
            data += bytes(size * (longest - (w.count if w else 0)))
        return self._transfer.up(torch.frombuffer(data, dtype=dtype).view(len(span), longest, width))

    def _rehearse(self) -> None:
        """Step a row of zeros, so that a model that does not fit its configuration is refused before it is offered."""
        row = torch.zeros((1, 1, self._shape.width), dtype=self._dtype, device=self._device)
        with torch.inference_mode():
            try:
                self._cache.place(Placement(0, 1, 0, 1, 1))
                self._forward(row, self._masks.steps[None, :1], None)
            except CheckpointInvalid:
                raise
            except Exception as error:
                got = f"a model that does not step ({type(error).__name__})"
                raise CheckpointInvalid.because("server", got, "one that fits its configuration") from error
            self._cache.vacate([Vacate(0, 0, 1, 0)])

    @torch.inference_mode()
    def _record(self, settings: TransformersSettings) -> StaticSteps | None:
        """Decoding steps of fixed shapes, where they are wanted and possible."""
        buckets = Buckets.chosen(settings.graphs, self._shape, self._card, self._device, cut=is_cut(self._model))
        if buckets is None:
            return None
        like = torch.zeros(self._card.width, dtype=self._dtype, device=self._device)
        return StaticSteps(self._bucketed, buckets, like, self._card.max_positions)

    def _forward(
        self, rows: torch.Tensor, positions: torch.Tensor, masks: Masks, runs: Sequence[Run] | None = None
    ) -> torch.Tensor:
        out: torch.Tensor = self._model(
            inputs_embeds=rows,
            position_ids=positions,
            attention_mask=masks,
            past_key_values=self._cache,
            use_cache=True,
            slot_runs=runs,
        ).last_hidden_state
        return out


def _own(module: nn.Module) -> Any:
    """The same weights under modules and configuration of one's own: settings do not reach the caller's module.

    A module that is cut among processes is bound to them by closures, which are not copied: it is the caller's own.
    """
    if is_cut(module):
        return module.eval()
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    own = copy.deepcopy(module, shared)
    return own.eval()


def _of_ids(piece: Piece | None) -> bool:
    return piece is not None and piece.form is Form.IDS
