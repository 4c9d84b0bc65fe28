"""The families that can be protected, by `model_type`. Each is one function from a configuration to tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stip_keyservice.protect.architecture import Architecture
from stip_keyservice.protect.families import gemma, gpt2, gpt_neox, llama, mixtral, opt, phi3, qwen
from stip_protocol.errors import ArchitectureUnsupported

FAMILIES: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    "gemma2": gemma.expand_gemma2,
    "gemma3_text": gemma.expand_gemma3,
    "gpt2": gpt2.expand,
    "gpt_neox": gpt_neox.expand,
    "llama": llama.expand_llama,
    "mistral": llama.expand_mistral,
    "mixtral": mixtral.expand,
    "opt": opt.expand,
    "phi3": phi3.expand,
    "qwen2": qwen.expand_qwen2,
    "qwen2_moe": qwen.expand_qwen2_moe,
    "qwen3": qwen.expand_qwen3,
    "qwen3_moe": qwen.expand_qwen3_moe,
}


def expand(config: Mapping[str, Any]) -> Architecture:
    """The tables of the model that a Hugging Face configuration describes.

    Raises `ArchitectureUnsupported` for another family or a variant that has no tables here, and
    `CheckpointInvalid` for a field that makes no sense.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        inner = " (protect the text model alone, with text_config as its config.json)" * ("text_config" in config)
        raise ArchitectureUnsupported.because("config.model_type", repr(family)[:80], ", ".join(FAMILIES) + inner)
    if config.get("quantization_config") is not None:
        raise ArchitectureUnsupported.because(
            "config.quantization_config", "a quantised checkpoint", "unquantised weights: protect first, quantise after"
        )
    if config.get("per_layer_config"):
        raise ArchitectureUnsupported.because(
            "config.per_layer_config", "layers of different configurations", "one configuration for all layers"
        )
    return FAMILIES[family](config)
