"""Configurations of the sizes that people run, written down from the fields of each class."""

from __future__ import annotations

from typing import Any


def _sizes(d: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": d,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        **more,
    }


REALISTIC: dict[str, dict[str, Any]] = {
    "GPT-2 124M": {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12}
    | {"n_head": 12},
    "Llama 2 7B": {"model_type": "llama"} | _sizes(4096, 11008, 32, 32, 32, 32000),
    "Mistral 7B": {"model_type": "mistral", "head_dim": 128} | _sizes(4096, 14336, 32, 32, 8, 32000),
    "Qwen2 7B": {"model_type": "qwen2"} | _sizes(3584, 18944, 28, 28, 4, 152064),
    "Qwen3 8B": {"model_type": "qwen3", "head_dim": 128} | _sizes(4096, 12288, 36, 32, 8, 151936),
    "Gemma 2 9B": {"model_type": "gemma2", "head_dim": 256} | _sizes(3584, 14336, 42, 16, 8, 256000),
    "Gemma 3 4B, text": {"model_type": "gemma3_text", "head_dim": 256} | _sizes(2560, 10240, 34, 8, 4, 262208),
    "Phi-3 mini": {"model_type": "phi3"} | _sizes(3072, 8192, 32, 32, 32, 32064),
    "Pythia 1.4B": {"model_type": "gpt_neox", "rotary_pct": 0.25} | _sizes(2048, 8192, 24, 16, 16, 50304),
    "OPT 1.3B": {"model_type": "opt", "ffn_dim": 8192, "word_embed_proj_dim": 2048}
    | {name: size for name, size in _sizes(2048, 0, 24, 32, 0, 50272).items() if size},
    "Mixtral 8x7B": {"model_type": "mixtral", "head_dim": 128, "num_local_experts": 8}
    | _sizes(4096, 14336, 32, 32, 8, 32000),
    "Qwen1.5-MoE A2.7B": {"model_type": "qwen2_moe", "num_experts": 60, "moe_intermediate_size": 1408}
    | {"shared_expert_intermediate_size": 5632}
    | _sizes(2048, 5632, 24, 16, 16, 151936),
    "Qwen3 30B A3B": {"model_type": "qwen3_moe", "num_experts": 128, "moe_intermediate_size": 768, "head_dim": 128}
    | _sizes(2048, 6144, 48, 32, 4, 151936),
}
