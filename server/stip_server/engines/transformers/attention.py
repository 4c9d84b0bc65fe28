"""Attention over the slot cache, as an implementation that transformers models can be set to.

The query heads that share one key-value head (grouped-query attention, arXiv:2305.13245) become rows of one
query instead of copies of keys and values: the same sums, without a copy of the whole cache in every layer of
every step (transformers' own sdpa repeats keys and values wherever a mask is given).

Models hand over more than tensors. What changes the result is computed here or refused: transformers' own sdpa
ignores what it does not know, and Gemma 2 without its cap would answer fluently and wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from stip_protocol.errors import CheckpointInvalid
from stip_server.engines.outputs import soft_capped

SLOT_ATTENTION = "stip_slots"
CARRIED_ELSEWHERE = frozenset({"sliding_window", "position_ids", "use_cache", "output_attentions"})
"""Arguments of models that change nothing here: windows are in the mask, positions in queries and keys."""


@dataclass(frozen=True)
class Run:
    """Slots of a step that follow each other in the cache."""

    begin: int
    end: int
    """[begin, end) in the step."""
    slot: int
    """The first of them, counted from the step's first slot."""


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    slot_runs: Sequence[Run] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [batch, heads, rows, width], key and value [slots, kv heads, length, width] to [batch, rows, heads, width].

    Without `slot_runs` slots and batch are the same. With them the batch leaves out slots that lie between its own:
    each run attends over its part of keys and values, where they lie, and nothing is copied.

    `attention_mask` is added to the scores: [batch, 1, groups · rows, length], or [batch, 1, 1, length] for one
    row, or None where every row sees everything. It carries causality and windows; nothing is implied. With a
    `softcap` the scores s become softcap · tanh(s / softcap) before the mask (Gemma 2, arXiv:2408.00118). Raises
    `CheckpointInvalid` for an argument that could change the result and is not known here.
    """
    for name, argument in kwargs.items():
        if name not in CARRIED_ELSEWHERE and argument is not None:
            raise CheckpointInvalid.because("attention", f"an argument {name}", "masks, scaling and softcap")
    if slot_runs is None:
        return _attended(query, key, value, attention_mask, dropout, scaling, softcap), None
    parts = []
    for run in slot_runs:
        batch, slots = slice(run.begin, run.end), slice(run.slot, run.slot + run.end - run.begin)
        mask = None if attention_mask is None else attention_mask[batch]
        parts.append(_attended(query[batch], key[slots], value[slots], mask, dropout, scaling, softcap))
    return torch.cat(parts), None


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    batch, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * rows, width)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout
        )
    else:
        scores = torch.matmul(grouped, key.transpose(2, 3)) * (width**-0.5 if scaling is None else scaling)
        scores = soft_capped(scores, softcap)
        if mask is not None:
            scores = scores + mask
        # In at least float32, as transformers does.
        wide = torch.promote_types(scores.dtype, torch.float32)
        out = torch.matmul(torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype), value)
    return out.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous()


AttentionInterface.register(SLOT_ATTENTION, slot_attention)
