"""Pre-norm decoders with rotary positions, grouped queries and a gated feed-forward: the Llama lineage.

Their checkpoints share one set of names. `Traits` says where a family differs; the rest is here once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from pydantic import model_validator

from stip_keyservice.protect.architecture import After, Architecture, Layout, NormKind, Port, Table
from stip_keyservice.protect.families.activations import ACTIVATIONS
from stip_keyservice.protect.families.blocks import (
    Gains,
    Heads,
    Projection,
    attention,
    gated_feed_forward,
    projection,
    whole,
)
from stip_keyservice.protect.families.draft import Draft
from stip_keyservice.protect.families.fields import Dimension, Entries, Epsilon, Fields, LayeredRope, Layers, Rope

EMBEDDING, FINAL, HEAD = "model.embed_tokens", "model.norm", "lm_head"


class RotaryFields(Fields):
    """What every family here has; a family adds its own, and its defaults."""

    vocab_size: Entries
    hidden_size: Dimension
    intermediate_size: Dimension
    num_hidden_layers: Layers
    num_attention_heads: Dimension
    num_key_value_heads: Dimension | None = None
    head_dim: Dimension | None = None
    max_position_embeddings: Entries
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | LayeredRope | None = None

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        _ = self.heads
        if self.rotary_factor == 1.0 and any(factor not in (None, 1.0) for factor in self._partial()):
            raise ValueError("partial_rotary_factor: this family turns whole heads, so 1 or none")
        return self

    @property
    def heads(self) -> Heads:
        """The shape of attention. Raises `ValueError` where sizes do not fit, before anybody else asks."""
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide hidden_size")
        if self.num_attention_heads % kv_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        width = self.head_dim or self.hidden_size // self.num_attention_heads
        rotary = int(width * self.rotary_factor)
        if rotary < 1 or rotary % 2:
            raise ValueError(f"{rotary} rotary dimensions of a head: must be even, positions turn pairs")
        return Heads(self.num_attention_heads, kv_heads, width, rotary)

    @property
    def rotary_factor(self) -> float:
        """Share of a head's dimensions that rotary positions turn."""
        return 1.0

    def _partial(self) -> Iterator[float | None]:
        """What the rotary parameters say of that share."""
        layered = self.rope_parameters if isinstance(self.rope_parameters, LayeredRope) else LayeredRope()
        for rope in (self.rope_scaling, self.rope_parameters, layered.full_attention, layered.sliding_attention):
            if isinstance(rope, Rope):
                yield rope.partial_rotary_factor


@dataclass(frozen=True)
class Layer:
    """One layer of a draft: its name in tables, its module in checkpoints, the residual."""

    name: str
    module: str
    number: int
    residual: Port


FeedForward = Callable[[Draft, Layer, str], None]
"""Writes the feed-forward of a layer behind the norm of that name."""


@dataclass(frozen=True)
class Traits:
    """Where one family differs from another."""

    causal_class: str
    base_class: str
    activation: str
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    unit: float = 1.0
    """Stored norm weight that means γ = 1."""
    qk_norm: bool = False
    sandwich: bool = False
    """Norms after attention and feed-forward too, before they are added to the residual."""
    embedding_scale: float = 1.0
    logit_cap: float | None = None
    fused_qkv: bool = False
    """Queries, keys and values one after another in one matrix."""
    feed_forward: FeedForward | None = None
    """In place of gate_proj, up_proj and down_proj."""

    @property
    def after(self) -> After:
        return ACTIVATIONS[self.activation]


def expand(fields: RotaryFields, traits: Traits) -> Architecture:
    """The tables of a model. Raises `CheckpointInvalid` naming a field that is wrong."""
    draft = Draft()
    residual = draft.space("residual", fields.hidden_size)
    vocabulary = draft.space("vocabulary", fields.vocab_size, Layout.INDEX)
    draft.table(
        Table("embedding", f"{EMBEDDING}.weight", vocabulary.space, residual.space, scale=traits.embedding_scale)
    )
    for number in range(fields.num_hidden_layers):
        _layer(draft, Layer(f"layers.{number}", f"model.layers.{number}", number, residual), fields, traits)
    final = draft.norm(FINAL, residual, NormKind.RMS, unit=traits.unit)
    draft.dense("head", HEAD, residual, vocabulary, norm=final)
    kept: dict[str, Any] = fields.kept()
    return draft.finish(
        family=kept["model_type"],
        prefix="model.",
        tied={f"{HEAD}.weight": f"{EMBEDDING}.weight"} if fields.tie_word_embeddings else {},
        entry=residual.space,
        head="head",
        max_positions=fields.max_position_embeddings,
        base_class=traits.base_class,
        causal_class=traits.causal_class,
        logit_cap=traits.logit_cap,
        config=kept,
    )


def dense_feed_forward(
    draft: Draft, layer: Layer, norm: str, *, name: str, module: str, size: int, bias: bool, after: After
) -> None:
    """gate_proj, up_proj and down_proj under `module`."""
    gated_feed_forward(
        draft,
        name,
        size,
        whole(f"{module}.gate_proj", size, bias=bias),
        whole(f"{module}.up_proj", size, bias=bias),
        whole(f"{module}.down_proj", draft.width(layer.residual), bias=bias),
        residual=layer.residual,
        norm=norm,
        activation=after,
    )


def _layer(draft: Draft, layer: Layer, fields: RotaryFields, traits: Traits) -> None:
    module, residual = layer.module, layer.residual

    def norm(name: str, *, scales: bool = False) -> str:
        return draft.norm(f"{module}.{name}", residual, NormKind.RMS, unit=traits.unit, scales=scales)

    queries, keys, values = _projections(f"{module}.self_attn", fields.heads, traits)
    attended = attention(
        draft,
        layer.name,
        fields.heads,
        queries,
        keys,
        values,
        reads=residual,
        norm=norm("input_layernorm"),
        gains=Gains(f"{module}.self_attn.q_norm", f"{module}.self_attn.k_norm", traits.unit)
        if traits.qk_norm
        else None,
    )
    draft.dense(f"{layer.name}.o", f"{module}.self_attn.o_proj", attended, residual, bias=traits.output_bias)
    draft.drop(f"{module}.self_attn.rotary_emb.inv_freq")
    behind = norm("post_attention_layernorm", scales=traits.sandwich)
    if traits.sandwich:
        behind = norm("pre_feedforward_layernorm")
        norm("post_feedforward_layernorm", scales=True)
    if traits.feed_forward:
        traits.feed_forward(draft, layer, behind)
    else:
        dense_feed_forward(
            draft,
            layer,
            behind,
            name=layer.name,
            module=f"{module}.mlp",
            size=fields.intermediate_size,
            bias=traits.mlp_bias,
            after=traits.after,
        )


def _projections(module: str, shape: Heads, traits: Traits) -> tuple[Projection, Projection, Projection]:
    counts = (shape.heads, shape.kv_heads, shape.kv_heads)
    if traits.fused_qkv:
        firsts = (0, shape.heads, shape.heads + shape.kv_heads)
        queries, keys, values = (
            Projection(f"{module}.qkv_proj.weight", None, [(first + head) * shape.width for head in range(count)])
            for first, count in zip(firsts, counts, strict=True)
        )
    else:
        queries, keys, values = (
            projection(f"{module}.{name}_proj", count, shape.width, bias=traits.qkv_bias)
            for name, count in zip("qkv", counts, strict=True)
        )
    return queries, keys, values
