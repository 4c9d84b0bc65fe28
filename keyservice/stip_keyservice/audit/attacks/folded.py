"""A network as its residual sees it: every matrix as [out, in], norms folded into what reads behind them.

An RMSNorm's γ (Zhang and Sennrich 2019), a LayerNorm's γ and β (Ba et al. 2016) go into the next matrix: W·D(γ) and
b + W·β. Two networks that differ by keys alone then differ, matrix by matrix, by the two keys of what it writes and
reads. Only names that the checkpoints of these families share are known here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stip_keyservice.audit.network import Network
from stip_keyservice.audit.view import NotApplicable

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Place:
    """Where a matrix lies: a module, and which of its equal parts along its outputs."""

    module: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Names:
    """How one lineage of checkpoints calls what a layer consists of, without the prefix of its base class."""

    layer: str
    attention_norm: str
    queries: Place
    keys: Place
    values: Place
    output: Place
    feed_forward_norm: str
    gate: Place | None
    up: Place
    down: Place
    final: str
    table: str
    transposed: bool
    """Conv1D: stored as [in, out]."""
    centred: bool
    """Norms subtract the mean."""
    rotary: bool


_LLAMA = Names(
    layer="layers.{}",
    attention_norm="input_layernorm",
    queries=Place("self_attn.q_proj"),
    keys=Place("self_attn.k_proj"),
    values=Place("self_attn.v_proj"),
    output=Place("self_attn.o_proj"),
    feed_forward_norm="post_attention_layernorm",
    gate=Place("mlp.gate_proj"),
    up=Place("mlp.up_proj"),
    down=Place("mlp.down_proj"),
    final="norm",
    table="embed_tokens",
    transposed=False,
    centred=False,
    rotary=True,
)
_GPT2 = Names(
    layer="h.{}",
    attention_norm="ln_1",
    queries=Place("attn.c_attn", 0, 3),
    keys=Place("attn.c_attn", 1, 3),
    values=Place("attn.c_attn", 2, 3),
    output=Place("attn.c_proj"),
    feed_forward_norm="ln_2",
    gate=None,
    up=Place("mlp.c_fc"),
    down=Place("mlp.c_proj"),
    final="ln_f",
    table="wte",
    transposed=True,
    centred=True,
    rotary=False,
)
FAMILIES: Mapping[str, Names] = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "gpt2": _GPT2}
"""By `model_type`."""
HEAD = "lm_head"
_PREFIXES = ("model.", "transformer.")


@dataclass(frozen=True)
class Linear:
    """y = weight·x + bias, with the norm before it folded."""

    weight: Doubles
    """[out, in]."""
    bias: Doubles
    """[out]; zeros where there is none."""


@dataclass(frozen=True)
class Layer:
    """One layer. h query heads, g key-value heads, head width w, feed-forward width f, residual width d."""

    queries: Linear
    """[h·w, d], head after head."""
    keys: Linear
    """[g·w, d]."""
    values: Linear
    """[g·w, d]."""
    output: Linear
    """[d, h·w]."""
    gate: Linear | None
    """[f, d], where the feed-forward is gated."""
    up: Linear
    """[f, d]."""
    down: Linear
    """[d, f]."""

    @property
    def anchor(self) -> Doubles:
        """[f, d]: what reads the residual into a nonlinearity, so that its rows can be reordered and no more."""
        return (self.gate or self.up).weight


@dataclass(frozen=True)
class Folded:
    """A whole network."""

    names: Names
    layers: tuple[Layer, ...]
    heads: int
    kv_heads: int
    gain: Doubles
    """[d] the final norm's γ, and"""
    offset: Doubles
    """[d] its β."""
    head: Linear | None
    """[V, d], the final norm folded; None where there is no head."""

    @property
    def width(self) -> int:
        """d."""
        return int(self.layers[0].up.weight.shape[1])

    @property
    def seen(self) -> Doubles:
        """[d, e] orthonormal: the part of the residual that norms leave. All of it behind RMSNorm, without its mean
        behind LayerNorm."""
        return complement(self.width) if self.names.centred else np.eye(self.width)


def fold(network: Network) -> Folded:
    """`network` folded, in float64. Raises `NotApplicable` for a family whose names are not known here."""
    names = names_of(network)
    tensors = {_bare(name): tensor for name, tensor in network.tensors.items()}
    config = network.model.config
    heads = int(config.num_attention_heads)
    gain, offset = _norm(tensors, names.final)
    head = _head(tensors, names)
    return Folded(
        names,
        tuple(_layer(tensors, names, names.layer.format(number)) for number in range(int(config.num_hidden_layers))),
        heads,
        int(getattr(config, "num_key_value_heads", None) or heads),
        gain,
        offset,
        None if head is None else Linear(head * gain, head @ offset),
    )


def names_of(network: Network) -> Names:
    """The names of its family. Raises `NotApplicable` where they are not known here."""
    family = network.config["model_type"]
    if family not in FAMILIES:
        raise NotApplicable(f"matrices are compared for {', '.join(FAMILIES)} here, not for {family}")
    return FAMILIES[family]


def complement(width: int) -> Doubles:
    """[d, d - 1]: an orthonormal basis of what is orthogonal to the all-ones vector. Householder's reflection that
    exchanges it with the first axis, without its first column."""
    axis = np.full(width, width**-0.5) - np.eye(width)[0]
    basis: Doubles = (np.eye(width) - 2 * np.outer(axis, axis) / (axis @ axis))[:, 1:]
    return basis


def unfold(folded: Folded, like: Network) -> Any:
    """A transformers model as `like`'s, with these layers behind norms of γ = 1 and β = 0; embedding, final norm and
    head stay those of `like`."""
    model, names = copy.deepcopy(like.model), folded.names
    state = {_bare(name): tensor for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for number, layer in enumerate(folded.layers):
            module = names.layer.format(number)
            for norm in (names.attention_norm, names.feed_forward_norm):
                state[f"{module}.{norm}.weight"].fill_(1.0)
                if f"{module}.{norm}.bias" in state:
                    state[f"{module}.{norm}.bias"].zero_()
            for place, linear in _placed(names, layer):
                _put(state, names, f"{module}.{place.module}", place, linear)
    return model


def _placed(names: Names, layer: Layer) -> Iterator[tuple[Place, Linear]]:
    yield from zip(
        (names.queries, names.keys, names.values, names.output, names.up, names.down),
        (layer.queries, layer.keys, layer.values, layer.output, layer.up, layer.down),
        strict=True,
    )
    if names.gate and layer.gate:
        yield names.gate, layer.gate


def _put(state: Mapping[str, torch.Tensor], names: Names, module: str, place: Place, linear: Linear) -> None:
    stored = state[f"{module}.weight"].T if names.transposed else state[f"{module}.weight"]
    rows = slice(place.part * len(linear.weight), (place.part + 1) * len(linear.weight))
    stored[rows] = torch.from_numpy(linear.weight).to(stored.dtype)
    if f"{module}.bias" in state:
        state[f"{module}.bias"][rows] = torch.from_numpy(linear.bias).to(stored.dtype)


def _layer(tensors: Mapping[str, Any], names: Names, module: str) -> Layer:
    attention = _norm(tensors, f"{module}.{names.attention_norm}")
    feed_forward = _norm(tensors, f"{module}.{names.feed_forward_norm}")

    def linear(place: Place, norm: tuple[Doubles, Doubles] | None = None) -> Linear:
        stored = tensors[f"{module}.{place.module}.weight"].astype(np.float64)
        weight = np.split(stored.T if names.transposed else stored, place.parts)[place.part]
        whole = tensors.get(f"{module}.{place.module}.bias")
        bias = np.zeros(len(weight)) if whole is None else np.split(whole.astype(np.float64), place.parts)[place.part]
        return Linear(weight, bias) if norm is None else Linear(weight * norm[0], bias + weight @ norm[1])

    return Layer(
        linear(names.queries, attention),
        linear(names.keys, attention),
        linear(names.values, attention),
        linear(names.output),
        linear(names.gate, feed_forward) if names.gate else None,
        linear(names.up, feed_forward),
        linear(names.down),
    )


def _norm(tensors: Mapping[str, Any], module: str) -> tuple[Doubles, Doubles]:
    gain = tensors[f"{module}.weight"].astype(np.float64)
    offset = tensors.get(f"{module}.bias")
    return gain, np.zeros_like(gain) if offset is None else offset.astype(np.float64)


def _head(tensors: Mapping[str, Any], names: Names) -> Doubles | None:
    """A tied head is the table; an instance that keeps both in its enclave has zeros there."""
    found = tensors.get(f"{HEAD}.weight", tensors.get(f"{names.table}.weight"))
    return found.astype(np.float64) if found is not None and found.any() else None


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
