"""Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388), dense and with experts.

Llama's blocks with biases on queries, keys and values (Qwen2) or norms of query and key heads (Qwen3).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stip_keyservice.protect.architecture import Architecture, Layout, Port
from stip_keyservice.protect.families import rotary
from stip_keyservice.protect.families.activations import ACTIVATIONS
from stip_keyservice.protect.families.blocks import experts
from stip_keyservice.protect.families.draft import Draft
from stip_keyservice.protect.families.fields import Activation, Dimension, LayerTypes, Window

Count = Annotated[int, Field(ge=0, le=1 << 12)]


class QwenFields(rotary.RotaryFields):
    hidden_act: Activation = "silu"
    use_sliding_window: bool = False
    sliding_window: Window | None = 4096
    max_window_layers: int = 28
    layer_types: LayerTypes | None = None


class Qwen2Fields(QwenFields):
    model_type: Literal["qwen2"]
    num_key_value_heads: Dimension | None = 32


class Qwen3Fields(QwenFields):
    model_type: Literal["qwen3"]
    num_key_value_heads: Dimension | None = 32
    head_dim: Dimension | None = 128
    attention_bias: bool = False


class MoeFields(QwenFields):
    """Which layers have experts, and how many."""

    decoder_sparse_step: Annotated[int, Field(ge=1)] = 1
    mlp_only_layers: list[int] | None = None
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    """The same, as newer versions of transformers write it for some models."""
    num_experts_per_tok: Annotated[int, Field(ge=1)]
    moe_intermediate_size: Dimension
    norm_topk_prob: bool = False

    experts_default: ClassVar[int]

    @property
    def count(self) -> int:
        """Experts of a layer."""
        stated = self.num_experts if self.num_experts is not None else self.num_local_experts
        return self.experts_default if stated is None else stated

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        stepped = self.count > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return stepped and layer not in (self.mlp_only_layers or [])


class Qwen2MoeFields(MoeFields):
    experts_default = 60
    model_type: Literal["qwen2_moe"]
    num_key_value_heads: Dimension | None = 16
    num_experts_per_tok: Annotated[int, Field(ge=1)] = 4
    moe_intermediate_size: Dimension = 1408
    shared_expert_intermediate_size: Dimension = 5632
    qkv_bias: bool = True


class Qwen3MoeFields(MoeFields):
    experts_default = 128
    model_type: Literal["qwen3_moe"]
    num_key_value_heads: Dimension | None = 4
    num_experts_per_tok: Annotated[int, Field(ge=1)] = 8
    moe_intermediate_size: Dimension = 768
    attention_bias: bool = False


def expand_qwen2(config: Mapping[str, Any]) -> Architecture:
    """The tables of a Qwen2. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = Qwen2Fields.read(config)
    return rotary.expand(fields, rotary.Traits("Qwen2ForCausalLM", "Qwen2Model", fields.hidden_act, qkv_bias=True))


def expand_qwen3(config: Mapping[str, Any]) -> Architecture:
    """The tables of a Qwen3. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = Qwen3Fields.read(config)
    bias = fields.attention_bias
    traits = rotary.Traits(
        "Qwen3ForCausalLM", "Qwen3Model", fields.hidden_act, qkv_bias=bias, output_bias=bias, qk_norm=True
    )
    return rotary.expand(fields, traits)


def expand_qwen2_moe(config: Mapping[str, Any]) -> Architecture:
    """The tables of a Qwen2-MoE. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = Qwen2MoeFields.read(config)
    traits = rotary.Traits(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeModel",
        fields.hidden_act,
        qkv_bias=fields.qkv_bias,
        feed_forward=partial(_with_shared_expert, fields),
    )
    return rotary.expand(fields, traits)


def expand_qwen3_moe(config: Mapping[str, Any]) -> Architecture:
    """The tables of a Qwen3-MoE. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = Qwen3MoeFields.read(config)
    bias = fields.attention_bias
    traits = rotary.Traits(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeModel",
        fields.hidden_act,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        feed_forward=partial(_sparse, fields),
    )
    return rotary.expand(fields, traits)


def _with_shared_expert(fields: Qwen2MoeFields, draft: Draft, layer: rotary.Layer, norm: str) -> None:
    _sparse(fields, draft, layer, norm)
    if not fields.sparse(layer.number):
        return
    rotary.dense_feed_forward(
        draft,
        layer,
        norm,
        name=f"{layer.name}.shared_expert",
        module=f"{layer.module}.mlp.shared_expert",
        size=fields.shared_expert_intermediate_size,
        bias=False,
        after=ACTIVATIONS[fields.hidden_act],
    )
    gate = draft.space(f"{layer.name}.shared_expert.gate", 1, Layout.PUBLIC)
    draft.dense(
        f"{layer.name}.shared_expert_gate",
        f"{layer.module}.mlp.shared_expert_gate",
        layer.residual,
        Port(gate.space),
        norm=norm,
    )


def _sparse(fields: MoeFields, draft: Draft, layer: rotary.Layer, norm: str) -> None:
    """Experts, or one feed-forward in the layers that have none."""
    module, activation = f"{layer.module}.mlp", ACTIVATIONS[fields.hidden_act]
    if not fields.sparse(layer.number):
        rotary.dense_feed_forward(
            draft,
            layer,
            norm,
            name=layer.name,
            module=module,
            size=fields.intermediate_size,
            bias=False,
            after=activation,
        )
        return

    def modules(expert: int) -> tuple[str, str, str]:
        prefix = f"{module}.experts.{expert}"
        return f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj"

    experts(
        draft,
        layer.name,
        fields.count,
        fields.moe_intermediate_size,
        router=f"{module}.gate",
        modules=modules,
        fused=(f"{module}.experts.gate_up_proj", f"{module}.experts.down_proj"),
        residual=layer.residual,
        norm=norm,
        activation=activation,
    )
