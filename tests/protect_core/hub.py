"""Configurations as `config.json` files of published checkpoints state them, old forms included, made small.

Only fields that such files have. Sizes, windows and bases are small, so that each shows within a few positions, and
differ from the defaults of the class wherever its absence should be noticed.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

Config = dict[str, Any]
_SIZES: Config = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.01,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
}
_LLAMA: Config = _SIZES | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
}
_LLAMA3: Config = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}
_MISTRAL: Config = _SIZES | {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_QWEN: Config = _SIZES | {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_window_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": 3,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
_QWEN2: Config = _QWEN | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
_QWEN3: Config = _QWEN | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 8,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
}
_GEMMA2: Config = _SIZES | {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 5.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 3.0,
    "head_dim": 8,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "sliding_window": 3,
    "sliding_window_size": 3,
}
_GEMMA3: Config = _SIZES | {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 8,
    "rms_norm_eps": 1e-5,
    "rope_local_base_freq": 100,
    "rope_scaling": None,
    "rope_theta": 30000,
    "sliding_window": 3,
}
_GEMMA3_1B: Config = _GEMMA3 | {"cache_implementation": "hybrid", "sliding_window_pattern": 3}
_PHI3: Config = _SIZES | {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3"},
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 64,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 100.0,
    "sliding_window": 5,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LONG: Config = {"long_factor": [1.5, 2.5], "short_factor": [1.0, 1.25], "type": "longrope"}
_NEOX: Config = {name: value for name, value in _SIZES.items() if name != "num_key_value_heads"} | {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_size": 32,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "rotary_emb_base": 100,
    "rotary_pct": 0.5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
}
_OPT: Config = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "_name_or_path": "facebook/opt-125m",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 20,
    "hidden_size": 16,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 29,
    "word_embed_proj_dim": 16,
}
_GPT2: Config = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "bos_token_id": 28,
    "embd_pdrop": 0.1,
    "eos_token_id": 28,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-6,
    "n_ctx": 32,
    "n_embd": 16,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 32,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 29,
}
_MIXTRAL: Config = _SIZES | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "num_experts_per_tok": 3,
    "num_local_experts": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "num_hidden_layers": 2,
}
_EXPERTS: Config = {
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 6,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.002,
}
_QWEN2_MOE: Config = (
    _QWEN
    | _EXPERTS
    | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 10,
    }
)
_QWEN3_MOE: Config = (
    _QWEN3
    | _EXPERTS
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
)


def _without(config: Config, *names: str) -> Config:
    return {name: value for name, value in config.items() if name not in names}


_HUB: dict[str, Config] = {
    "Llama 1": _without(_LLAMA, "num_key_value_heads", "pretraining_tp") | {"max_sequence_length": 2048},
    "Llama 2": _LLAMA | {"num_key_value_heads": 4, "rope_scaling": None},
    "Code Llama": _LLAMA | {"rope_theta": 1000000, "rope_scaling": None},
    "Llama 3.1": _LLAMA
    | {"attention_bias": False, "mlp_bias": False, "rope_scaling": _LLAMA3, "rope_theta": 500000.0}
    | {"eos_token_id": [1, 2]},
    "Llama 3.2": _LLAMA
    | {"head_dim": 8, "tie_word_embeddings": True, "rope_theta": 500000.0}
    | {"rope_scaling": _LLAMA3 | {"factor": 32.0}},
    "Llama, linear": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "Llama, dynamic": _LLAMA | {"max_position_embeddings": 6, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "Llama, yarn": _LLAMA
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
    | {"rope_theta": 100.0},
    "Mistral 7B v0.1": _MISTRAL | {"rope_theta": 100.0, "sliding_window": 3},
    "Mistral 7B v0.3": _MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None, "attention_dropout": 0.0},
    "Mistral Nemo": _MISTRAL | {"head_dim": 8, "rope_theta": 1000000.0, "sliding_window": None},
    "Mistral, head_dim null": _MISTRAL | {"head_dim": None, "sliding_window": 4},
    "Qwen2.5 0.5B": _QWEN2 | {"tie_word_embeddings": True, "use_mrope": False},
    "Qwen2, windows on": _QWEN2 | {"use_sliding_window": True},
    "Qwen2.5, yarn": _QWEN2 | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"}},
    "Qwen2, kinds of layers": _QWEN2
    | {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "Qwen2, head_dim": _QWEN2 | {"head_dim": 8},
    "Qwen3 0.6B": _QWEN3 | {"tie_word_embeddings": True},
    "Qwen3 8B": _QWEN3,
    "Qwen3, biases, yarn": _QWEN3
    | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 3}
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "Gemma 2 2B": _GEMMA2,
    "Gemma 2, no caps": _GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "Gemma 3 1B": _GEMMA3_1B,
    "Gemma 3 4B, text": _without(_GEMMA3_1B, "cache_implementation")
    | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "Gemma 3 270M": _GEMMA3
    | {"_sliding_window_pattern": 6, "use_bidirectional_attention": False}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "Gemma 3, as transformers 5 writes it": _without(_GEMMA3, "rope_theta", "rope_local_base_freq", "rope_scaling")
    | {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 30000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "Phi-3 mini 4k": _PHI3,
    "Phi-3.5 mini": _PHI3 | {"original_max_position_embeddings": 6, "rope_scaling": _LONG, "sliding_window": 262144},
    "Phi-4 mini": _PHI3
    | {
        "hidden_size": 32,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 6,
        "partial_rotary_factor": 0.75,
        "rope_scaling": _LONG | {"long_factor": [1, 2.5, 3], "short_factor": [1, 1, 1.25]},
        "tie_word_embeddings": True,
    },
    "Phi-4": _PHI3 | {"num_key_value_heads": 2, "rope_theta": 250000, "sliding_window": None},
    "Pythia": _without(_NEOX, "torch_dtype")
    | {"classifier_dropout": 0.1, "rotary_emb_base": 10000, "rotary_pct": 0.25},
    "RedPajama INCITE": _NEOX | {"hidden_act": "gelu_new", "rotary_pct": 1.0, "use_parallel_residual": False},
    "GPT-NeoX, another base": _NEOX | {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
    "GPT-NeoX, linear": _NEOX | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "GPT-NeoX, no rotary fields": _without(_NEOX, "rotary_emb_base", "rotary_pct"),
    "OPT": _OPT,
    "OPT, Galactica": _OPT | {"activation_function": "gelu", "enable_bias": False, "learned_embeddings": True},
    "OPT, norms behind": _OPT | {"do_layer_norm_before": False},
    "GPT-2": _GPT2,
    "GPT-2, ReLU, scaled by layer": _GPT2
    | {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, "n_inner": 24},
    "Mixtral 8x7B": _MIXTRAL,
    "Mixtral, window": _MIXTRAL | {"head_dim": 8, "sliding_window": 3},
    "Qwen1.5 MoE": _QWEN2_MOE,
    "Qwen2 MoE, windows on": _QWEN2_MOE
    | {"decoder_sparse_step": 2, "use_sliding_window": True, "mlp_only_layers": [1], "qkv_bias": False},
    "Qwen3 30B A3B": _QWEN3_MOE,
    "Qwen3 MoE, some layers dense": _QWEN3_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": None},
}
NAMES = list(_HUB)


def published(name: str) -> Config:
    """One of the table, the caller's own: transformers writes into what it reads."""
    return deepcopy(_HUB[name])
