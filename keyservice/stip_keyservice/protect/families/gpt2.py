"""GPT-2 (Radford et al. 2019) as transformers' GPT2LMHeadModel stores it.

Pre-LayerNorm with biases, learned positions, Conv1D matrices ([in, out]), queries, keys and values fused in
one matrix (three slabs), a head that is tied to the embedding unless the configuration says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from stip_keyservice.protect.architecture import Architecture, Layout, NormKind, Port, Table
from stip_keyservice.protect.families.activations import ACTIVATIONS
from stip_keyservice.protect.families.blocks import Heads, Projection, attention
from stip_keyservice.protect.families.draft import Draft
from stip_keyservice.protect.families.fields import Activation, Dimension, Entries, Epsilon, Fields, Layers

_EMBEDDING, _POSITIONS = "transformer.wte.weight", "transformer.wpe.weight"
_FINAL, _HEAD = "transformer.ln_f", "lm_head"


class GPT2Fields(Fields):
    model_type: Literal["gpt2"]
    vocab_size: Entries
    n_positions: Entries = 1024
    n_embd: Dimension
    n_layer: Layers
    n_head: Dimension
    n_inner: Dimension | None = None
    activation_function: Activation = "gelu_new"
    layer_norm_epsilon: Epsilon = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True

    @property
    def inner(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @model_validator(mode="after")
    def _heads_divide(self) -> GPT2Fields:
        if self.n_embd % self.n_head:
            raise ValueError("n_head must divide n_embd")
        return self


def expand(config: Mapping[str, Any]) -> Architecture:
    """The tables of a GPT-2. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = GPT2Fields.read(config)
    draft = Draft()
    residual = draft.space("residual", fields.n_embd)
    vocabulary = draft.space("vocabulary", fields.vocab_size, Layout.INDEX)
    positions = draft.space("positions", fields.n_positions, Layout.PUBLIC)
    draft.table(Table("embedding", _EMBEDDING, vocabulary.space, residual.space))
    draft.table(Table("positions", _POSITIONS, positions.space, residual.space))
    for number in range(fields.n_layer):
        _layer(draft, f"layers.{number}", f"transformer.h.{number}", fields, residual)
    final = draft.norm(_FINAL, residual, NormKind.LAYER, bias=True)
    draft.dense("head", _HEAD, residual, vocabulary, norm=final)
    return draft.finish(
        family="gpt2",
        prefix="transformer.",
        tied={f"{_HEAD}.weight": _EMBEDDING} if fields.tie_word_embeddings else {},
        entry=residual.space,
        head="head",
        max_positions=fields.n_positions,
        base_class="GPT2Model",
        causal_class="GPT2LMHeadModel",
        config=fields.kept(),
    )


def _layer(draft: Draft, layer: str, module: str, fields: GPT2Fields, residual: Port) -> None:
    d, heads = fields.n_embd, fields.n_head
    width, fused = d // heads, f"{module}.attn.c_attn"
    queries, keys, values = (
        Projection(f"{fused}.weight", f"{fused}.bias", range(first, first + d, width), transposed=True)
        for first in (0, d, 2 * d)
    )
    norm = draft.norm(f"{module}.ln_1", residual, NormKind.LAYER, bias=True)
    shape = Heads(heads, heads, width)
    attended = attention(draft, layer, shape, queries, keys, values, reads=residual, norm=norm)
    draft.dense(f"{layer}.o", f"{module}.attn.c_proj", attended, residual, bias=True, transposed=True)
    norm = draft.norm(f"{module}.ln_2", residual, NormKind.LAYER, bias=True)
    hidden = draft.space(f"{layer}.feed_forward", fields.inner)
    after = ACTIVATIONS[fields.activation_function]
    draft.dense(
        f"{layer}.up", f"{module}.mlp.c_fc", residual, hidden, bias=True, norm=norm, after=after, transposed=True
    )
    draft.dense(f"{layer}.down", f"{module}.mlp.c_proj", hidden, residual, bias=True, transposed=True)
    draft.drop(f"{module}.attn.bias", f"{module}.attn.masked_bias")
