"""Fixed configurations of each family: small, with something at every place where a key can be."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]
_SIZES: Config = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 13,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
_LLAMA: Config = _SIZES | {
    "model_type": "llama",
    "hidden_size": 36,
    "intermediate_size": 29,
    "num_attention_heads": 12,
    "attention_bias": True,
    "mlp_bias": True,
}
_GPT2: Config = {
    "model_type": "gpt2",
    "vocab_size": 37,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 29,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GEMMA: Config = _SIZES | {
    "attention_bias": True,
    "query_pre_attn_scalar": 6,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_NEOX: Config = {
    "model_type": "gpt_neox",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 13,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
_OPT: Config = {
    "model_type": "opt",
    "vocab_size": 37,
    "hidden_size": 24,
    "ffn_dim": 13,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 24,
    "pad_token_id": 1,
}
_SMALL: Config = _SIZES | {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
_MOE: Config = _SMALL | {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 5,
    "decoder_sparse_step": 2,
}
FIXED: dict[str, Config] = {
    "llama": _LLAMA,
    "llama without biases, tied": _LLAMA
    | {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "num_hidden_layers": 1},
    "gpt2": _GPT2,
    "gpt2 untied": _GPT2 | {"tie_word_embeddings": False, "n_layer": 1},
    "mistral": _SIZES | {"model_type": "mistral", "hidden_size": 23, "sliding_window": 4},
    "qwen2": _SIZES | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": _SIZES | {"model_type": "qwen3", "head_dim": 10, "attention_bias": True, "num_hidden_layers": 1},
    "gemma2": _GEMMA | {"model_type": "gemma2", "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3 untied": _GEMMA | {"model_type": "gemma3_text", "tie_word_embeddings": False},
    "phi3": _SIZES
    | {
        "model_type": "phi3",
        "pad_token_id": None,
        "eos_token_id": None,
        "head_dim": 6,
        "partial_rotary_factor": 0.7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.7},
    },
    "gpt_neox": _NEOX,
    "gpt_neox one after another, without biases": _NEOX
    | {"use_parallel_residual": False, "attention_bias": False, "num_hidden_layers": 1},
    "opt": _OPT,
    "opt with norms behind": _OPT | {"do_layer_norm_before": False, "num_hidden_layers": 1},
    "opt without the last norm, untied": _OPT
    | {"_remove_final_layer_norm": True, "tie_word_embeddings": False, "num_hidden_layers": 1},
    "mixtral": _SMALL
    | {"model_type": "mixtral", "num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _MOE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 7},
    "qwen3_moe": _MOE | {"model_type": "qwen3_moe", "head_dim": 10, "norm_topk_prob": True, "attention_bias": True},
}
