"""The models that are measured: random weights in known configurations, so that anybody can run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

DEMO_MODEL = Path(__file__).resolve().parent.parent / "stack" / "demo_model"


@dataclass(frozen=True)
class Subject:
    """A model to measure. `build` makes it in float32; it is stored as `dtype`."""

    name: str
    title: str
    dtype: str
    build: Callable[[], Any] | None
    """None: the bundled demo model."""
    protect: tuple[str, ...] = ()
    """Further arguments of `stip-keyservice protect` for the preset `paper`."""

    def checkpoint(self, folder: Path, *, seed: int) -> Path:
        """A local checkpoint: written to `folder`, unless it comes with the repository."""
        if self.build is None:
            return DEMO_MODEL
        torch.manual_seed(seed)
        self.build().to(getattr(torch, self.dtype)).save_pretrained(folder)
        return folder


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config())  # type: ignore[no-untyped-call]


def _llama() -> Any:
    return LlamaForCausalLM(  # type: ignore[no-untyped-call]
        LlamaConfig(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=3328,
            num_hidden_layers=12,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=2048,
        )
    )


SUBJECTS = {
    subject.name: subject
    for subject in (
        # GPT-2's head is its embedding: the preset paper takes that only on request.
        Subject("gpt2", "GPT-2, 124 M parameters, float32", "float32", _gpt2, ("--accept-tied-head",)),
        Subject("llama", "Llama-like, 220 M parameters, bfloat16", "bfloat16", _llama),
        Subject("demo", "bundled demo model, 2.75 M parameters, float32", "float32", None),
    )
}
