"""Llama (Touvron et al., arXiv 2302.13971) as transformers' LlamaForCausalLM stores it.

Pre-RMSNorm, rotary positions in half-split pairs, grouped queries, SwiGLU. Per layer: queries against keys
(`query_key`), values into the output projection (`value_output`), and one feed-forward space that gate, up
and down share: the gate takes its permutation part only (the paper, §6.1, leaves its permutation off
the gate, which is not lossless).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from stip_keyservice.protect.architecture import (
    After,
    Architecture,
    Layout,
    Linear,
    Norm,
    NormKind,
    Port,
    Role,
    Slab,
    Space,
    Table,
    Width,
)
from stip_keyservice.protect.families.fields import Activation, Dimension, Entries, Epsilon, Fields, Layers

_EMBEDDING = "model.embed_tokens.weight"
_FINAL = "model.norm.weight"
_HEAD = "lm_head.weight"


class Rope(Fields):
    """Rotary parameters, all of which depend on positions only. An unknown one is refused: it could do otherwise."""

    model_config = ConfigDict(extra="forbid")

    rope_type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] | None = None
    type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] | None = None
    rope_theta: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None
    truncate: bool | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None


class LlamaFields(Fields):
    model_type: Literal["llama"]
    vocab_size: Entries
    hidden_size: Dimension
    intermediate_size: Dimension
    num_hidden_layers: Layers
    num_attention_heads: Dimension
    num_key_value_heads: Dimension | None = None
    head_dim: Dimension | None = None
    hidden_act: Activation = "silu"
    max_position_embeddings: Entries = 2048
    rms_norm_eps: Epsilon = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width(self) -> int:
        """Dimensions of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _heads_divide(self) -> LlamaFields:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide hidden_size")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        if self.width % 2:
            raise ValueError("head_dim must be even: rotary positions turn pairs")
        return self


def expand(config: Mapping[str, Any]) -> Architecture:
    """The tables of a Llama. Raises `CheckpointInvalid` naming a field that is wrong."""
    fields = LlamaFields.read(config)
    d, vocabulary = fields.hidden_size, fields.vocab_size
    tensors: dict[str, tuple[int, ...]] = {_EMBEDDING: (vocabulary, d), _FINAL: (d,), _HEAD: (vocabulary, d)}
    spaces = [Space("residual", d), Space("vocabulary", vocabulary, Layout.INDEX)]
    norms, linears = [Norm(_FINAL, None, "residual", NormKind.RMS)], []
    for layer in range(fields.num_hidden_layers):
        spaces += _spaces(fields, f"layers.{layer}")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            norms.append(Norm(f"model.layers.{layer}.{norm}.weight", None, "residual", NormKind.RMS))
            tensors[norms[-1].weight] = (d,)
        linears += _linears(fields, f"layers.{layer}")
    linears.append(Linear("head", Slab(_HEAD, 0, vocabulary), None, Port("residual"), Port("vocabulary"), norm=_FINAL))
    by_name = {space.name: space for space in spaces}
    for linear in linears:
        out = by_name[linear.writes.space].width(linear.writes.width)
        tensors[linear.weight.tensor] = (out, by_name[linear.reads.space].width(linear.reads.width))
        if linear.bias:
            tensors[linear.bias.tensor] = (out,)
    return Architecture(
        family="llama",
        prefix="model.",
        tensors=tensors,
        spaces=by_name,
        norms=tuple(norms),
        linears=tuple(linears),
        tables=(Table("embedding", _EMBEDDING, "vocabulary", "residual"),),
        tied={_HEAD: _EMBEDDING} if fields.tie_word_embeddings else {},
        dropped=frozenset(
            f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(fields.num_hidden_layers)
        ),
        entry="residual",
        head="head",
        max_positions=fields.max_position_embeddings,
        base_class="LlamaModel",
        causal_class="LlamaForCausalLM",
        config=fields.kept(),
    )


def _spaces(fields: LlamaFields, layer: str) -> list[Space]:
    def heads(name: str) -> Space:
        return Space(
            f"{layer}.{name}",
            fields.num_attention_heads * fields.width,
            Layout.HEADS,
            kv_heads=fields.kv_heads,
            head_dim=fields.width,
            structure=f"{layer}.heads",
        )

    return [heads("query_key"), heads("value_output"), Space(f"{layer}.feed_forward", fields.intermediate_size)]


def _linears(fields: LlamaFields, layer: str) -> list[Linear]:
    residual, values = Port("residual"), f"{layer}.value_output"
    attended = Port(values)
    hidden = f"{layer}.feed_forward"
    wide, narrow = fields.num_attention_heads * fields.width, fields.kv_heads * fields.width
    attention = ("self_attn", fields.attention_bias, "input_layernorm")
    feed_forward = ("mlp", fields.mlp_bias, "post_attention_layernorm")

    def linear(
        name: str,
        block: tuple[str, bool, str],
        out: int,
        reads: Port,
        writes: Port,
        after: After = After.NOTHING,
    ) -> Linear:
        module, biased, norm = block
        tensor = f"model.{layer}.{module}.{name}_proj"
        return Linear(
            name=f"{layer}.{name}",
            weight=Slab(f"{tensor}.weight", 0, out),
            bias=Slab(f"{tensor}.bias", 0, out) if biased else None,
            reads=reads,
            writes=writes,
            norm=f"model.{layer}.{norm}.weight" if reads is residual else None,
            after=after,
        )

    query_key = f"{layer}.query_key"
    return [
        linear("q", attention, wide, residual, Port(query_key), After.ROTARY),
        linear("k", attention, narrow, residual, Port(query_key, Role.DUAL, Width.NARROW), After.ROTARY),
        linear("v", attention, narrow, residual, Port(values, width=Width.NARROW)),
        linear("o", attention, fields.hidden_size, attended, residual),
        linear(
            "gate", feed_forward, fields.intermediate_size, residual, Port(hidden, Role.PERMUTATION), After.ELEMENTWISE
        ),
        linear("up", feed_forward, fields.intermediate_size, residual, Port(hidden)),
        linear("down", feed_forward, fields.hidden_size, Port(hidden), residual),
    ]
