"""OPT (Zhang et al., arXiv 2205.01068) as transformers' OPTForCausalLM stores it.

Learned positions that begin at row 2, ReLU, a tied head; LayerNorms before each block or, in OPT-350m's way,
after it, where they are on the residual itself and leave permutations for its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from stip_keyservice.protect.architecture import Architecture, Layout, NormKind, Port, Table
from stip_keyservice.protect.families.activations import ACTIVATIONS
from stip_keyservice.protect.families.blocks import Heads, attention, projection
from stip_keyservice.protect.families.draft import Draft
from stip_keyservice.protect.families.fields import Activation, Dimension, Entries, Fields, Layers
from stip_protocol.errors import ArchitectureUnsupported

_EMBEDDING, _POSITIONS = "model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"
_FIRST_POSITION = 2
"""Row of position 0 (OPTLearnedPositionalEmbedding.offset)."""


class OPTFields(Fields):
    model_type: Literal["opt"]
    vocab_size: Entries
    hidden_size: Dimension
    ffn_dim: Dimension
    num_hidden_layers: Layers
    num_attention_heads: Dimension
    max_position_embeddings: Entries = 2048
    activation_function: Activation = "relu"
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = Field(default=False, alias="_remove_final_layer_norm")
    word_embed_proj_dim: Dimension | None = None
    enable_bias: bool = True
    layer_norm_elementwise_affine: Literal[True] = True
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> OPTFields:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide hidden_size")
        return self


def expand(config: Mapping[str, Any]) -> Architecture:
    """The tables of an OPT. Raises `CheckpointInvalid` naming a field that is wrong, `ArchitectureUnsupported`
    where rows enter before a projection: positions, added behind it, would have to lie on the server."""
    fields = OPTFields.read(config)
    if fields.word_embed_proj_dim not in (None, fields.hidden_size):
        allowed = f"hidden_size, {fields.hidden_size}: positions are added behind that projection, on the server"
        raise ArchitectureUnsupported.because("config.word_embed_proj_dim", fields.word_embed_proj_dim, allowed)
    draft = Draft()
    residual = draft.space("residual", fields.hidden_size)
    vocabulary = draft.space("vocabulary", fields.vocab_size, Layout.INDEX)
    positions = draft.space("positions", fields.max_position_embeddings, Layout.PUBLIC)
    draft.table(Table("embedding", _EMBEDDING, vocabulary.space, residual.space))
    draft.table(Table("positions", _POSITIONS, positions.space, residual.space, start=_FIRST_POSITION))
    for number in range(fields.num_hidden_layers):
        _layer(draft, f"layers.{number}", f"model.decoder.layers.{number}", fields, residual)
    final = None
    if fields.do_layer_norm_before and not fields.remove_final_layer_norm:
        final = draft.norm("model.decoder.final_layer_norm", residual, NormKind.LAYER, bias=True)
    draft.dense("head", "lm_head", residual, vocabulary, norm=final)
    return draft.finish(
        family="opt",
        prefix="model.",
        tied={"lm_head.weight": _EMBEDDING} if fields.tie_word_embeddings else {},
        entry=residual.space,
        head="head",
        max_positions=fields.max_position_embeddings,
        base_class="OPTModel",
        causal_class="OPTForCausalLM",
        config=fields.kept(),
    )


def _layer(draft: Draft, layer: str, module: str, fields: OPTFields, residual: Port) -> None:
    heads, width, bias = (
        fields.num_attention_heads,
        fields.hidden_size // fields.num_attention_heads,
        fields.enable_bias,
    )
    before = fields.do_layer_norm_before

    def norm(name: str) -> str | None:
        """The norm of a block, and its name where the block reads through it."""
        weight = draft.norm(f"{module}.{name}", residual, NormKind.LAYER, bias=True, scales=not before)
        return weight if before else None

    through = norm("self_attn_layer_norm")
    queries, keys, values = (projection(f"{module}.self_attn.{name}_proj", heads, width, bias=bias) for name in "qkv")
    shape = Heads(heads, heads, width)
    attended = attention(draft, layer, shape, queries, keys, values, reads=residual, norm=through)
    draft.dense(f"{layer}.o", f"{module}.self_attn.out_proj", attended, residual, bias=bias)
    through = norm("final_layer_norm")
    hidden = draft.space(f"{layer}.feed_forward", fields.ffn_dim)
    after = ACTIVATIONS[fields.activation_function]
    draft.dense(f"{layer}.up", f"{module}.fc1", residual, hidden, bias=bias, norm=through, after=after)
    draft.dense(f"{layer}.down", f"{module}.fc2", hidden, residual, bias=bias)
