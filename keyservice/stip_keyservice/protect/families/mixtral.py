"""Mixtral (Jiang et al., arXiv 2401.04088): Mistral's blocks with experts in place of the feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from stip_keyservice.protect.architecture import Architecture
from stip_keyservice.protect.families import rotary
from stip_keyservice.protect.families.activations import ACTIVATIONS
from stip_keyservice.protect.families.blocks import experts
from stip_keyservice.protect.families.draft import Draft
from stip_keyservice.protect.families.fields import Activation, Dimension, Epsilon, Window


class MixtralFields(rotary.RotaryFields):
    model_type: Literal["mixtral"]
    num_key_value_heads: Dimension | None = 8
    hidden_act: Activation = "silu"
    rms_norm_eps: Epsilon = 1e-5
    sliding_window: Window | None = None
    num_local_experts: Annotated[int, Field(ge=1, le=1 << 12)] = 8
    num_experts_per_tok: Annotated[int, Field(ge=1)] = 2


def expand(config: Mapping[str, Any]) -> Architecture:
    """The tables of a Mixtral. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = MixtralFields.read(config)
    traits = rotary.Traits(
        "MixtralForCausalLM", "MixtralModel", fields.hidden_act, feed_forward=partial(_experts, fields)
    )
    return rotary.expand(fields, traits)


def _experts(fields: MixtralFields, draft: Draft, layer: rotary.Layer, norm: str) -> None:
    stored, module = f"{layer.module}.block_sparse_moe", f"{layer.module}.mlp"

    def modules(expert: int) -> tuple[str, str, str]:
        prefix = f"{stored}.experts.{expert}"
        return f"{prefix}.w1", f"{prefix}.w3", f"{prefix}.w2"

    experts(
        draft,
        layer.name,
        fields.num_local_experts,
        fields.intermediate_size,
        router=f"{stored}.gate",
        modules=modules,
        fused=(f"{module}.experts.gate_up_proj", f"{module}.experts.down_proj"),
        residual=layer.residual,
        norm=norm,
        activation=ACTIVATIONS[fields.hidden_act],
    )
    draft.fuse(f"{module}.gate.weight", [f"{stored}.gate.weight"])
