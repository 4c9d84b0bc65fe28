"""Tiny random models of every family that the engine serves, and of every way in which their layers differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

VOCABULARY, WIDTH, POSITIONS, WINDOW = 211, 48, 96, 9
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GATED = SIZES | {"intermediate_size": 80, "num_key_value_heads": 2}
EXPERTS = GATED | {"num_experts_per_tok": 2}
SOME_SLIDE = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}


def config(name: str, **fields: Any) -> Callable[[], Any]:
    return lambda: getattr(t, name)(**fields)


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": config("GPT2Config", n_positions=POSITIONS, **SIZES),
    "llama": config("LlamaConfig", head_dim=8, attention_bias=True, **GATED),
    "mistral, sliding": config("MistralConfig", sliding_window=WINDOW, head_dim=8, **GATED),
    "mistral, full": config("MistralConfig", sliding_window=None, **GATED),
    "qwen2, some layers slide": config("Qwen2Config", **SOME_SLIDE, **GATED),
    "qwen2, full": config("Qwen2Config", **GATED),
    "qwen3, some layers slide": config("Qwen3Config", head_dim=16, **SOME_SLIDE, **GATED),
    "gemma2": config(
        "Gemma2Config",
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=WINDOW,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
        **GATED,
    ),
    "gemma2, no caps": config(
        "Gemma2Config",
        head_dim=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        **GATED,
    ),
    "gemma3_text": config(
        "Gemma3TextConfig",
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=WINDOW,
        sliding_window_pattern=3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **GATED,
    ),
    "phi3, sliding": config("Phi3Config", sliding_window=WINDOW, **GATED),
    "phi3, longrope": config("Phi3Config", original_max_position_embeddings=72, rope_parameters=LONGROPE, **GATED),
    "gpt_neox": config("GPTNeoXConfig", intermediate_size=80, rotary_pct=0.5, **SIZES),
    "gpt_neox, one after the other": config(
        "GPTNeoXConfig",
        intermediate_size=80,
        rotary_pct=1.0,
        use_parallel_residual=False,
        attention_bias=False,
        **SIZES,
    ),
    "opt": config("OPTConfig", ffn_dim=80, **SIZES),
    "opt, norms after and a projection": config(
        "OPTConfig", ffn_dim=80, do_layer_norm_before=False, word_embed_proj_dim=20, **SIZES
    ),
    "mixtral": config("MixtralConfig", num_local_experts=5, **EXPERTS),
    "mixtral, sliding": config("MixtralConfig", num_local_experts=4, sliding_window=WINDOW, **EXPERTS),
    "qwen2_moe": config(
        "Qwen2MoeConfig",
        num_experts=6,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
        **EXPERTS,
    ),
    "qwen2_moe, some layers slide": config(
        "Qwen2MoeConfig",
        num_experts=6,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        **SOME_SLIDE | {"max_window_layers": 3},
        **EXPERTS,
    ),
    "qwen3_moe": config(
        "Qwen3MoeConfig", num_experts=6, moe_intermediate_size=24, head_dim=16, norm_topk_prob=True, **EXPERTS
    ),
    "qwen3_moe, sliding": config(
        "Qwen3MoeConfig",
        num_experts=6,
        moe_intermediate_size=24,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=WINDOW,
        **EXPERTS,
    ),
}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with a head, every parameter random, computing as transformers computes it: eagerly where its own
    faster attention would leave a cap out."""
    torch.manual_seed(11)
    settings = MODELS[name]()
    model = t.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model = model.to(dtype).eval()
    model.set_attn_implementation("eager" if getattr(settings, "attn_logit_softcapping", None) else "sdpa")
    if dtype is torch.float64 and "num_experts_per_tok" in settings.to_dict():
        model.set_experts_implementation("eager")  # no other knows float64
    return model
