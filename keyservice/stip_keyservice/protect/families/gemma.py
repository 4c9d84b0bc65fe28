"""Gemma 2 (arXiv 2408.00118) and the text models of Gemma 3 (arXiv 2503.19786).

Norms store γ - 1 and stand before and after each block: the latter scale what is added to the residual, which
leaves signed permutations for its key. The embedding is multiplied by √d, which the enclave's table does already.
Gemma 3 has norms of query and key heads in place of Gemma 2's cap on scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from stip_keyservice.protect.architecture import Architecture
from stip_keyservice.protect.families import rotary
from stip_keyservice.protect.families.fields import Activation, Dimension, LayerTypes, Positive, Window


class GemmaFields(rotary.RotaryFields):
    num_key_value_heads: Dimension | None = 4
    head_dim: Dimension | None = 256
    hidden_activation: Activation = "gelu_pytorch_tanh"
    attention_bias: bool = False
    query_pre_attn_scalar: Dimension = 256
    sliding_window: Window | None = 4096
    layer_types: LayerTypes | None = None
    final_logit_softcapping: Positive | None = None
    attn_logit_softcapping: Positive | None = None
    use_bidirectional_attention: Literal[False] | None = None
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> GemmaFields:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide hidden_size")
        return self


class Gemma2Fields(GemmaFields):
    model_type: Literal["gemma2"]
    final_logit_softcapping: Positive | None = 30.0
    attn_logit_softcapping: Positive | None = 50.0


class Gemma3Fields(GemmaFields):
    model_type: Literal["gemma3_text"]
    rope_local_base_freq: float | None = None
    sliding_window_pattern: int | None = Field(default=None, ge=1)


def expand_gemma2(config: Mapping[str, Any]) -> Architecture:
    """The tables of a Gemma 2. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = Gemma2Fields.read(config)
    return rotary.expand(fields, _traits(fields, "Gemma2ForCausalLM", "Gemma2Model", qk_norm=False))


def expand_gemma3(config: Mapping[str, Any]) -> Architecture:
    """The tables of a Gemma 3 text model. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = Gemma3Fields.read(config)
    return rotary.expand(fields, _traits(fields, "Gemma3ForCausalLM", "Gemma3TextModel", qk_norm=True))


def _traits(fields: GemmaFields, causal_class: str, base_class: str, *, qk_norm: bool) -> rotary.Traits:
    return rotary.Traits(
        causal_class,
        base_class,
        fields.hidden_activation,
        qkv_bias=fields.attention_bias,
        output_bias=fields.attention_bias,
        unit=0.0,
        qk_norm=qk_norm,
        sandwich=True,
        embedding_scale=fields.hidden_size**0.5,
        logit_cap=fields.final_logit_softcapping,
    )
