"""What the engine must know of a model, read from its configuration: one table, and a refusal for what is not in it.

A model of transformers computes attention through an interface and leaves the cache and the masks to its caller, so
the caller must know the cache's shape and what each layer may see. A family that is not in the table could read its
configuration in another way, and its answers would be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from stip_protocol.errors import CheckpointInvalid


class Reach(Enum):
    """How a family says which earlier positions a layer sees."""

    FULL = "every position"
    WINDOW = "the last `sliding_window`, in every layer, where it is set"
    LAYERS = "`layer_types`: all positions, or the last `sliding_window`"


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers."""

    reach: Reach = Reach.FULL
    width: str = "hidden_size"
    """The field that holds the width of embeddings and final hidden states."""
    experts: bool = False
    """Its feed-forward layers choose among experts."""


FAMILIES: Mapping[str, Family] = {
    "gemma2": Family(Reach.LAYERS),
    "gemma3_text": Family(Reach.LAYERS),
    "gpt2": Family(),
    "gpt_neox": Family(),
    "llama": Family(),
    "mistral": Family(Reach.WINDOW),
    "mixtral": Family(Reach.WINDOW, experts=True),
    "opt": Family(width="word_embed_proj_dim"),
    "phi3": Family(Reach.WINDOW),
    "qwen2": Family(Reach.LAYERS),
    "qwen2_moe": Family(Reach.LAYERS, experts=True),
    "qwen3": Family(Reach.LAYERS),
    "qwen3_moe": Family(Reach.WINDOW, experts=True),
}
EVERY_LAYER = "every layer"
"""The kind of all layers of a family that does not tell them apart."""
LAYER_KINDS = ("full_attention", "sliding_attention")
FIXED_ROPE = ("default", "linear", "llama3", "proportional", "yarn")
"""Rotary scalings whose frequencies are the same at every length. With others the longest sequence of a batch would
change its neighbours' answers."""
SHORT_ROPE = "longrope"
"""LongRoPE (arXiv:2402.13753) has one set of frequencies up to the original length and another beyond it. A cache
that was filled with the first is wrong for the second, so sessions stay within the original length."""
SWITCHED_OFF: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (True, None),
    "use_bidirectional_attention": (False, None),
    "reorder_and_upcast_attn": (False, None),
}
"""Fields that change what attention computes, and the values at which they do not."""


@dataclass(frozen=True)
class Shape:
    """The facts of one model. Counts, but for `logit_cap`."""

    width: int
    """Of a row and of a hidden state after the final norm."""
    layers: int
    groups: int
    """Query heads a key-value head."""
    kv_heads: int
    head_width: int
    positions: int
    """Rows that a session can hold at most."""
    windows: Mapping[str, int | None]
    """By kind of layer: how many positions a row sees, its own included; None for all."""
    layer_windows: tuple[int | None, ...]
    """The same by layer."""
    layered: bool
    """The model takes one mask a kind of layer; otherwise one mask."""
    experts: bool
    unrecordable: str | None
    """What its forward asks the device for on the way, so that no recording can replay it; None: nothing."""
    logit_cap: float | None
    """Logits x leave the head as cap · tanh(x / cap)."""


def shape_of(config: Any) -> Shape:
    """Read a transformers configuration. Raises `CheckpointInvalid` for what the engine would get wrong."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise CheckpointInvalid.because("model_type", config.model_type, ", ".join(FAMILIES))
    for name, harmless in SWITCHED_OFF.items():
        if (value := getattr(config, name, None)) not in harmless:
            raise CheckpointInvalid.because(name, value, " or ".join(map(str, harmless)))
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    windows = _windows(config, family.reach)
    layered = family.reach is Reach.LAYERS
    return Shape(
        width=getattr(config, family.width),
        layers=config.num_hidden_layers,
        groups=heads // kv_heads,
        kv_heads=kv_heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        positions=_positions(config),
        windows=windows,
        layer_windows=tuple(
            windows[config.layer_types[layer] if layered else EVERY_LAYER] for layer in range(config.num_hidden_layers)
        ),
        layered=layered,
        experts=family.experts,
        unrecordable=_unrecordable(config, family),
        logit_cap=getattr(config, "final_logit_softcapping", None),
    )


def _unrecordable(config: Any, family: Family) -> str | None:
    """See `Shape.unrecordable`."""
    if family.experts:
        return "the choice of experts"
    if any(part.get("rope_type") == SHORT_ROPE for part in _ropes(config)):
        return "the largest position, for longrope"
    return None


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters: one set, or one a kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def _positions(config: Any) -> int:
    """The longest session, within which rotary frequencies do not depend on any length."""
    limit: int = config.max_position_embeddings
    for part in _ropes(config):
        kind = part.get("rope_type", "default")
        if kind == SHORT_ROPE:
            limit = min(limit, part["original_max_position_embeddings"])
        elif kind not in FIXED_ROPE:
            raise CheckpointInvalid.because("rope_type", kind, "one that does not depend on the length")
    return limit


def _windows(config: Any, reach: Reach) -> dict[str, int | None]:
    """See `Shape.windows`."""
    if reach is Reach.FULL:
        return {EVERY_LAYER: None}
    if reach is Reach.WINDOW:
        return {EVERY_LAYER: None if config.sliding_window is None else _window(config)}
    kinds = config.layer_types
    if unknown := sorted(set(kinds) - set(LAYER_KINDS)):
        raise CheckpointInvalid.because("layer_types", unknown[0], ", ".join(LAYER_KINDS))
    return {kind: _window(config) if kind == "sliding_attention" else None for kind in sorted(set(kinds))}


def _window(config: Any) -> int:
    window = config.sliding_window
    if not isinstance(window, int) or window < 1:
        raise CheckpointInvalid.because("sliding_window", window, "at least 1")
    return window
