"""GPT-2 (Radford et al. 2019) as transformers' GPT2LMHeadModel stores it.

Pre-LayerNorm with biases, learned positions, Conv1D matrices ([in, out]), queries, keys and values fused in
one matrix (three slabs), a head that is tied to the embedding unless the configuration says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

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

_EMBEDDING = "transformer.wte.weight"
_POSITIONS = "transformer.wpe.weight"
_FINAL = "transformer.ln_f"
_HEAD = "lm_head.weight"


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
    d, vocabulary = fields.n_embd, fields.vocab_size
    tensors: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (vocabulary, d),
        _POSITIONS: (fields.n_positions, d),
        _HEAD: (vocabulary, d),
    }
    spaces = [
        Space("residual", d),
        Space("vocabulary", vocabulary, Layout.INDEX),
        Space("positions", fields.n_positions, Layout.PUBLIC),
    ]
    norms, linears = [_norm(_FINAL)], []
    for layer in range(fields.n_layer):
        module = f"transformer.h.{layer}"
        spaces += _spaces(fields, f"layers.{layer}")
        norms += [_norm(f"{module}.ln_1"), _norm(f"{module}.ln_2")]
        linears += _linears(fields, f"layers.{layer}", module)
        tensors |= {
            f"{module}.attn.c_attn.weight": (d, 3 * d),
            f"{module}.attn.c_attn.bias": (3 * d,),
            f"{module}.attn.c_proj.weight": (d, d),
            f"{module}.attn.c_proj.bias": (d,),
            f"{module}.mlp.c_fc.weight": (d, fields.inner),
            f"{module}.mlp.c_fc.bias": (fields.inner,),
            f"{module}.mlp.c_proj.weight": (fields.inner, d),
            f"{module}.mlp.c_proj.bias": (d,),
        }
    tensors |= {name: (d,) for norm in norms for name in (norm.weight, norm.bias) if name}
    linears.append(
        Linear("head", Slab(_HEAD, 0, vocabulary), None, Port("residual"), Port("vocabulary"), norm=norms[0].weight)
    )
    return Architecture(
        family="gpt2",
        prefix="transformer.",
        tensors=tensors,
        spaces={space.name: space for space in spaces},
        norms=tuple(norms),
        linears=tuple(linears),
        tables=(
            Table("embedding", _EMBEDDING, "vocabulary", "residual"),
            Table("positions", _POSITIONS, "positions", "residual"),
        ),
        tied={_HEAD: _EMBEDDING} if fields.tie_word_embeddings else {},
        dropped=frozenset(
            f"transformer.h.{layer}.attn.{buffer}"
            for layer in range(fields.n_layer)
            for buffer in ("bias", "masked_bias")
        ),
        entry="residual",
        head="head",
        max_positions=fields.n_positions,
        base_class="GPT2Model",
        causal_class="GPT2LMHeadModel",
        config=fields.kept(),
    )


def _norm(module: str) -> Norm:
    return Norm(f"{module}.weight", f"{module}.bias", "residual", NormKind.LAYER)


def _spaces(fields: GPT2Fields, layer: str) -> list[Space]:
    def heads(name: str) -> Space:
        return Space(
            f"{layer}.{name}",
            fields.n_embd,
            Layout.HEADS,
            kv_heads=fields.n_head,
            head_dim=fields.n_embd // fields.n_head,
            structure=f"{layer}.heads",
        )

    return [heads("query_key"), heads("value_output"), Space(f"{layer}.feed_forward", fields.inner)]


def _linears(fields: GPT2Fields, layer: str, module: str) -> list[Linear]:
    d = fields.n_embd
    residual, hidden = Port("residual"), Port(f"{layer}.feed_forward")
    query_key, values = f"{layer}.query_key", f"{layer}.value_output"

    def linear(
        name: str, tensor: str, start: int, stop: int, reads: Port, writes: Port, norm: str | None, after: After
    ) -> Linear:
        return Linear(
            name=f"{layer}.{name}",
            weight=Slab(f"{module}.{tensor}.weight", start, stop, transposed=True),
            bias=Slab(f"{module}.{tensor}.bias", start, stop),
            reads=reads,
            writes=writes,
            norm=norm and f"{module}.{norm}.weight",
            after=after,
        )

    keys = Port(query_key, Role.DUAL, Width.NARROW)
    nothing = After.NOTHING
    return [
        linear("q", "attn.c_attn", 0, d, residual, Port(query_key), "ln_1", nothing),
        linear("k", "attn.c_attn", d, 2 * d, residual, keys, "ln_1", nothing),
        linear("v", "attn.c_attn", 2 * d, 3 * d, residual, Port(values, width=Width.NARROW), "ln_1", nothing),
        linear("o", "attn.c_proj", 0, d, Port(values), residual, None, nothing),
        linear("up", "mlp.c_fc", 0, fields.inner, residual, hidden, "ln_2", After.ELEMENTWISE),
        linear("down", "mlp.c_proj", 0, d, hidden, residual, None, nothing),
    ]
