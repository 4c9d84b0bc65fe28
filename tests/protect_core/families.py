"""The families under test: for each one strategy over its configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Config = dict[str, Any]
Draw = st.DrawFn
ACTIVATIONS = st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])


def presets(config: Config) -> list[str]:
    """The presets that are not refused for a configuration once everything is accepted.

    Learned positions keep `throughput` away, and so does a tied head under a dense key: only Gemma's norms behind
    each block leave signed permutations in place of a dense one.
    """
    learned = config["model_type"] in ("gpt2", "opt")
    tied = config["tie_word_embeddings"] and not config["model_type"].startswith("gemma")
    return ["paper", "hardened", *(() if learned or tied else ("throughput",))]


def ropes(width: int) -> st.SearchStrategy[Config]:
    """Rotary parameters for `width` rotary dimensions; the class divides by width - 2 for dynamic ones."""
    dynamic: list[Config] = [{"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}] if width > 2 else []
    return st.sampled_from(
        [
            {"rope_type": "default", "rope_theta": 100.0},
            {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
            *dynamic,
            {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8},
            _longrope(width),
            {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ]
    )


def _longrope(width: int) -> Config:
    pairs = width // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.5 * pair for pair in range(pairs)],
        "long_factor": [2.0 + pair for pair in range(pairs)],
    }


def _common(draw: Draw, *, tied: bool = True) -> Config:
    return {
        "vocab_size": draw(st.integers(2, 29)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "tie_word_embeddings": draw(st.booleans()) if tied else False,
    }


def _rotary(draw: Draw, *, divides: bool = False, stated: bool = True) -> Config:
    """Llama's fields. `divides`: heads must divide the width. `stated`: head_dim may differ from their quotient."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    width = 2 * draw(st.integers(1, 3))
    own = stated and draw(st.booleans())
    size = heads * (draw(st.integers(1, 4)) if own else width)
    if own and not divides:
        size = draw(st.integers(1, 17))
    return _common(draw) | {
        "hidden_size": size,
        "intermediate_size": draw(st.integers(1, 13)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **({"head_dim": width} if own else {}),
        "max_position_embeddings": 32,
        "rope_parameters": draw(ropes(width)),
    }


def _act(draw: Draw) -> Config:
    return {"hidden_act": draw(ACTIVATIONS)}


def _layer_types(draw: Draw, config: Config) -> Config:
    kinds = st.sampled_from(["full_attention", "sliding_attention"])
    count = config["num_hidden_layers"]
    return {"layer_types": draw(st.lists(kinds, min_size=count, max_size=count))}


def _llama(draw: Draw) -> Config:
    biases = {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    return _rotary(draw, divides=True) | _act(draw) | biases


def _mistral(draw: Draw) -> Config:
    return _rotary(draw) | _act(draw) | {"sliding_window": draw(st.none() | st.integers(1, 9))}


def _windows(draw: Draw, config: Config) -> Config:
    """Qwen's windows: from one layer on, or by kind of layer."""
    if not draw(st.booleans()):
        return {}
    window = {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 9))}
    return window | (_layer_types(draw, config) if draw(st.booleans()) else {"max_window_layers": 1})


def _qwen2(draw: Draw) -> Config:
    config = _rotary(draw) | _act(draw)
    return config | _windows(draw, config)


def _qwen3(draw: Draw) -> Config:
    config = _rotary(draw, stated=False) | _act(draw) | {"attention_bias": draw(st.booleans())}
    config["head_dim"] = 2 * draw(st.integers(1, 3))
    config["rope_parameters"] = draw(ropes(config["head_dim"]))
    return config | _windows(draw, config)


def _gemma(draw: Draw) -> Config:
    config = _rotary(draw, divides=True, stated=False)
    config |= {
        "head_dim": 2 * draw(st.integers(1, 3)),
        "hidden_activation": draw(ACTIVATIONS),
        "attention_bias": draw(st.booleans()),
        "query_pre_attn_scalar": draw(st.integers(1, 9)),
        "sliding_window": draw(st.integers(1, 9)),
        "final_logit_softcapping": draw(st.none() | st.sampled_from([0.5, 3.0, 30.0])),
    }
    return config | _layer_types(draw, config)


def _gemma2(draw: Draw) -> Config:
    config = _gemma(draw)
    config["rope_parameters"] = draw(ropes(config["head_dim"]))
    return config | {"attn_logit_softcapping": draw(st.none() | st.sampled_from([0.5, 50.0]))}


def _gemma3(draw: Draw) -> Config:
    config = _gemma(draw)
    kinds = ("full_attention", "sliding_attention")
    return config | {"rope_parameters": {kind: draw(ropes(config["head_dim"])) for kind in kinds}}


def _phi3(draw: Draw) -> Config:
    config = _rotary(draw, stated=False) | _act(draw)
    width = config["hidden_size"] // config["num_attention_heads"]
    turning = 2 * draw(st.integers(1, width // 2))
    rope = draw(st.sampled_from([{"rope_type": "default", "rope_theta": 100.0}, _longrope(turning)]))
    return config | {
        "rope_parameters": rope | {"partial_rotary_factor": turning / width},
        "original_max_position_embeddings": draw(st.sampled_from([4, 32])),
        "sliding_window": draw(st.none() | st.integers(1, 9)),
        "pad_token_id": None,
        "eos_token_id": None,
    }


def _gpt_neox(draw: Draw) -> Config:
    heads, pairs = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    width = 2 * pairs + draw(st.integers(0, 3))
    factor = {"partial_rotary_factor": (2 * pairs + 0.01) / width if width > 2 * pairs else 1.0}
    return _common(draw) | {
        "hidden_size": heads * width,
        "intermediate_size": draw(st.integers(1, 13)),
        "num_attention_heads": heads,
        "hidden_act": draw(ACTIVATIONS),
        "max_position_embeddings": 32,
        "use_parallel_residual": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "rope_parameters": draw(ropes(2 * pairs)) | factor,
    }


def _opt(draw: Draw) -> Config:
    heads = draw(st.integers(1, 4))
    return _common(draw) | {
        "hidden_size": heads * draw(st.integers(1, 4)),
        "ffn_dim": draw(st.integers(1, 13)),
        "num_attention_heads": heads,
        "max_position_embeddings": 16,
        "activation_function": draw(ACTIVATIONS),
        "do_layer_norm_before": draw(st.booleans()),
        "_remove_final_layer_norm": draw(st.booleans()),
        "enable_bias": draw(st.booleans()),
        "word_embed_proj_dim": None,
        "pad_token_id": None,
    }


def _gpt2(draw: Draw) -> Config:
    heads = draw(st.integers(1, 4))
    common = _common(draw)
    return {
        "vocab_size": common["vocab_size"],
        "tie_word_embeddings": common["tie_word_embeddings"],
        "n_positions": 16,
        "n_embd": heads * draw(st.integers(1, 4)),
        "n_layer": common["num_hidden_layers"],
        "n_head": heads,
        "n_inner": draw(st.none() | st.integers(1, 13)),
        "activation_function": draw(st.sampled_from(["gelu_new", "relu", "silu"])),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
    }


def _mixtral(draw: Draw) -> Config:
    config = _rotary(draw) | _act(draw)
    # Without it, the class knows no width for its rotary parameters but the default ones.
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    experts = draw(st.integers(1, 5))
    return config | {
        "num_local_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "sliding_window": draw(st.none() | st.integers(1, 9)),
    }


def _moe(draw: Draw) -> Config:
    config = _rotary(draw) | _act(draw)
    experts = draw(st.integers(1, 5))
    return config | {
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "moe_intermediate_size": draw(st.integers(1, 9)),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.integers(1, 2)),
        "mlp_only_layers": draw(st.sampled_from([[], [0], [1]])),
    }


def _qwen2_moe(draw: Draw) -> Config:
    config = _moe(draw) | {"shared_expert_intermediate_size": draw(st.integers(1, 9)), "qkv_bias": draw(st.booleans())}
    return config | _windows(draw, config)


def _qwen3_moe(draw: Draw) -> Config:
    config = _moe(draw) | {"attention_bias": draw(st.booleans())}
    if draw(st.booleans()):
        config |= {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 9))}
    return config


def _strategy(name: str, of: Callable[[Draw], Config]) -> st.SearchStrategy[Config]:
    @st.composite
    def configs(draw: Draw) -> Config:
        return {"model_type": name} | of(draw)

    return configs()


_CONFIGS: dict[str, Callable[[Draw], Config]] = {
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "opt": _opt,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}
CONFIGS = {name: _strategy(name, of) for name, of in _CONFIGS.items()}
"""For each family any shape that its class allows, as small as it gets."""
