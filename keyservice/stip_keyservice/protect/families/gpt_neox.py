"""GPT-NeoX (Black et al., arXiv 2204.06745) and Pythia as transformers' GPTNeoXForCausalLM stores them.

Pre-LayerNorm with biases, rotary positions on a part of each head, queries, keys and values of one head after
another in one matrix, attention and feed-forward side by side (which changes no table).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stip_keyservice.protect.architecture import Architecture, Layout, NormKind, Port, Table
from stip_keyservice.protect.families.activations import ACTIVATIONS
from stip_keyservice.protect.families.blocks import Heads, Projection, attention
from stip_keyservice.protect.families.draft import Draft
from stip_keyservice.protect.families.fields import Activation, Dimension, Entries, Epsilon, Fields, Layers, Rope

_EMBEDDING, _FINAL, _HEAD = "gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm", "embed_out"
_ROTARY_FACTOR = 0.25
"""Share of a head that rotates where a configuration does not say."""


class GPTNeoXFields(Fields):
    model_type: Literal["gpt_neox"]
    vocab_size: Entries
    hidden_size: Dimension
    intermediate_size: Dimension
    num_hidden_layers: Layers
    num_attention_heads: Dimension
    hidden_act: Activation = "gelu"
    max_position_embeddings: Entries = 2048
    layer_norm_eps: Epsilon = 1e-5
    tie_word_embeddings: bool = False
    use_parallel_residual: bool = True
    attention_bias: bool = True
    rotary_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    rotary_emb_base: float | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None

    @model_validator(mode="after")
    def _heads_fit(self) -> GPTNeoXFields:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide hidden_size")
        if self.heads.rotary < 2 or self.heads.rotary % 2:
            raise ValueError(f"{self.heads.rotary} rotary dimensions of a head: must be even, positions turn pairs")
        return self

    @property
    def heads(self) -> Heads:
        width = self.hidden_size // self.num_attention_heads
        inner = (rope.partial_rotary_factor for rope in (self.rope_scaling, self.rope_parameters) if rope)
        factor = next(filter(None, (*inner, self.rotary_pct)), _ROTARY_FACTOR)
        return Heads(self.num_attention_heads, self.num_attention_heads, width, int(width * factor))


def expand(config: Mapping[str, Any]) -> Architecture:
    """The tables of a GPT-NeoX. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = GPTNeoXFields.read(config)
    draft = Draft()
    residual = draft.space("residual", fields.hidden_size)
    vocabulary = draft.space("vocabulary", fields.vocab_size, Layout.INDEX)
    draft.table(Table("embedding", _EMBEDDING, vocabulary.space, residual.space))
    for number in range(fields.num_hidden_layers):
        _layer(draft, f"layers.{number}", f"gpt_neox.layers.{number}", fields, residual)
    final = draft.norm(_FINAL, residual, NormKind.LAYER, bias=True)
    draft.dense("head", _HEAD, residual, vocabulary, norm=final)
    draft.fuse("lm_head.weight", [f"{_HEAD}.weight"])
    return draft.finish(
        family="gpt_neox",
        prefix="gpt_neox.",
        tied={f"{_HEAD}.weight": _EMBEDDING} if fields.tie_word_embeddings else {},
        entry=residual.space,
        head="head",
        max_positions=fields.max_position_embeddings,
        base_class="GPTNeoXModel",
        causal_class="GPTNeoXForCausalLM",
        config=fields.kept(),
    )


def _layer(draft: Draft, layer: str, module: str, fields: GPTNeoXFields, residual: Port) -> None:
    shape, fused = fields.heads, f"{module}.attention.query_key_value"
    bias = f"{fused}.bias" if fields.attention_bias else None
    queries, keys, values = (
        Projection(f"{fused}.weight", bias, [(3 * head + third) * shape.width for head in range(shape.heads)])
        for third in range(3)
    )
    norm = draft.norm(f"{module}.input_layernorm", residual, NormKind.LAYER, bias=True)
    attended = attention(draft, layer, shape, queries, keys, values, reads=residual, norm=norm)
    draft.dense(f"{layer}.o", f"{module}.attention.dense", attended, residual, bias=fields.attention_bias)
    norm = draft.norm(f"{module}.post_attention_layernorm", residual, NormKind.LAYER, bias=True)
    hidden = draft.space(f"{layer}.feed_forward", fields.intermediate_size)
    after = ACTIVATIONS[fields.hidden_act]
    draft.dense(f"{layer}.up", f"{module}.mlp.dense_h_to_4h", residual, hidden, bias=True, norm=norm, after=after)
    draft.dense(f"{layer}.down", f"{module}.mlp.dense_4h_to_h", hidden, residual, bias=True)
    draft.drop(*(f"{module}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")))
