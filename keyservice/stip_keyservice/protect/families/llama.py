"""Llama (Touvron et al., arXiv 2302.13971) and Mistral (Jiang et al., arXiv 2310.06825).

Pre-RMSNorm, rotary positions in half-split pairs, grouped queries, SwiGLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from stip_keyservice.protect.architecture import Architecture
from stip_keyservice.protect.families import rotary
from stip_keyservice.protect.families.fields import Activation, Dimension, Entries, Window


class LlamaFields(rotary.RotaryFields):
    model_type: Literal["llama"]
    hidden_act: Activation = "silu"
    max_position_embeddings: Entries = 2048
    attention_bias: bool = False
    mlp_bias: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> LlamaFields:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide hidden_size")
        return self


class MistralFields(rotary.RotaryFields):
    model_type: Literal["mistral"]
    num_key_value_heads: Dimension | None = 8
    hidden_act: Activation = "silu"
    sliding_window: Window | None = 4096


def expand_llama(config: Mapping[str, Any]) -> Architecture:
    """The tables of a Llama. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = LlamaFields.read(config)
    traits = rotary.Traits(
        "LlamaForCausalLM",
        "LlamaModel",
        fields.hidden_act,
        qkv_bias=fields.attention_bias,
        output_bias=fields.attention_bias,
        mlp_bias=fields.mlp_bias,
    )
    return rotary.expand(fields, traits)


def expand_mistral(config: Mapping[str, Any]) -> Architecture:
    """The tables of a Mistral. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = MistralFields.read(config)
    return rotary.expand(fields, rotary.Traits("MistralForCausalLM", "MistralModel", fields.hidden_act))
