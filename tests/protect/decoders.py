"""Small decoders with every parameter random, a table of them: what is certified for one is certified for all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 131
_LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 80,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_PRESETS = ("paper", "hardened", "throughput")
_POSITIONED = ("paper", "hardened")
"""Learned positions keep a server from decoding alone."""


@dataclass(frozen=True)
class Decoder:
    """One family as it is tested."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    presets: tuple[str, ...] = _PRESETS

    def store(self, folder: Path, dtype: torch.dtype = torch.float32, *, seed: int = 7, **fields: Any) -> Path:
        """The folder of a checkpoint as transformers writes it."""
        config: Any = AutoConfig.for_model(self.model_type, vocab_size=VOCABULARY, **(_NO_IDS | self.fields | fields))
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                scale = name.endswith("weight") and parameter.ndim == 1  # of a norm: around what it starts at
                parameter.copy_(parameter + 0.3 * drawn if scale else 1.2 * drawn / parameter.shape[-1] ** 0.5)
        model.to(dtype).save_pretrained(folder)
        return folder


_NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
DECODERS = {
    "gpt2": Decoder("gpt2", {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 48}, _POSITIONED),
    "llama": Decoder("llama", _LLAMA | {"head_dim": 10, "attention_bias": True, "mlp_bias": True}),
    "mistral": Decoder("mistral", _LLAMA | {"sliding_window": 9}),
    "qwen2": Decoder("qwen2", _LLAMA),
    "qwen3": Decoder("qwen3", _LLAMA | {"head_dim": 10}),
    "gemma2": Decoder(
        "gemma2",
        _LLAMA
        | {
            "head_dim": 10,
            "tie_word_embeddings": True,
            "sliding_window": 9,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gemma3": Decoder("gemma3_text", _LLAMA | {"head_dim": 10, "tie_word_embeddings": True, "sliding_window": 9}),
    "phi3": Decoder("phi3", _LLAMA | {"original_max_position_embeddings": 80}),
    "gpt_neox": Decoder(
        "gpt_neox",
        {
            "hidden_size": 40,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 80,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
            "tie_word_embeddings": False,
        },
    ),
    "opt": Decoder(
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 48,
            "word_embed_proj_dim": 32,
        },
        _POSITIONED,
    ),
    "mixtral": Decoder("mixtral", _LLAMA | {"num_local_experts": 4}),
    "qwen2_moe": Decoder("qwen2_moe", _LLAMA | _EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": Decoder("qwen3_moe", _LLAMA | _EXPERTS | {"head_dim": 10}),
}
"""By name. A tied head keeps `throughput` away, except from Gemma's signed permutations."""
