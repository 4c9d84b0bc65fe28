"""Phi-3 (arXiv 2404.14219): Llama's blocks with queries, keys and values in one matrix, gate and up in another,
and rotary positions on a part of each head in some sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from stip_keyservice.protect.architecture import Architecture
from stip_keyservice.protect.families import rotary
from stip_keyservice.protect.families.activations import ACTIVATIONS
from stip_keyservice.protect.families.blocks import gated_feed_forward, rows, whole
from stip_keyservice.protect.families.draft import Draft
from stip_keyservice.protect.families.fields import Activation, Entries, Epsilon, Rope, Window


class Phi3Fields(rotary.RotaryFields):
    model_type: Literal["phi3"]
    hidden_act: Activation = "silu"
    rms_norm_eps: Epsilon = 1e-5
    max_position_embeddings: Entries = 4096
    original_max_position_embeddings: Entries = 4096
    sliding_window: Window | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    rope_parameters: Rope | None = None

    @property
    def rotary_factor(self) -> float:
        return next(filter(None, (*self._partial(), self.partial_rotary_factor)), 1.0)


def expand(config: Mapping[str, Any]) -> Architecture:
    """The tables of a Phi-3. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = Phi3Fields.read(config)
    traits = rotary.Traits(
        "Phi3ForCausalLM",
        "Phi3Model",
        fields.hidden_act,
        fused_qkv=True,
        feed_forward=partial(_feed_forward, fields),
    )
    return rotary.expand(fields, traits)


def _feed_forward(fields: Phi3Fields, draft: Draft, layer: rotary.Layer, norm: str) -> None:
    size, fused = fields.intermediate_size, f"{layer.module}.mlp.gate_up_proj.weight"
    gated_feed_forward(
        draft,
        layer.name,
        size,
        rows(fused, 0, size),
        rows(fused, size, 2 * size),
        whole(f"{layer.module}.mlp.down_proj", fields.hidden_size),
        residual=layer.residual,
        norm=norm,
        activation=ACTIVATIONS[fields.hidden_act],
    )
