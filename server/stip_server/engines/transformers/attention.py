"""Attention over the slot cache, as an implementation that transformers models can be set to.

The query heads that share one key-value head (grouped-query attention, arXiv:2305.13245) become rows of one
query instead of copies of keys and values: the same sums, without a copy of the whole cache in every layer of
every step (transformers' own sdpa repeats keys and values wherever a mask is given).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

SLOT_ATTENTION = "stip_slots"


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [batch, heads, rows, width], key and value [batch, kv heads, length, width] to [batch, rows, heads, width].

    `attention_mask` is added to the scores: [batch, 1, groups · rows, length], or [batch, 1, 1, length] for one
    row, or None where every row sees everything. It carries causality; nothing is implied.
    """
    batch, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * rows, width)
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling, dropout_p=dropout
    )
    return out.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(SLOT_ATTENTION, slot_attention)
