"""The models that are measured: random weights in known configurations, so that anybody can run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

DEMO_MODEL = Path(__file__).resolve().parent.parent / "stack" / "demo_model"
ACCEPTED = {"paper": (), "hardened": (), "throughput": ("--accept-token-cipher",)}
"""Arguments of `stip-keyservice protect` that a preset needs, whatever the model."""


@dataclass(frozen=True)
class Subject:
    """A model to measure. `build` makes it in float32; it is stored as `dtype`."""

    name: str
    title: str
    dtype: str
    build: Callable[[], Any] | None
    """None: the bundled demo model."""
    tied: bool = False
    """Its head is its embedding: the preset paper takes that only on request, throughput not at all."""

    def checkpoint(self, folder: Path, *, seed: int) -> Path:
        """A local checkpoint: written to `folder`, unless it comes with the repository."""
        if self.build is None:
            return DEMO_MODEL
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        torch.manual_seed(seed)
        self.build().to(getattr(torch, self.dtype)).save_pretrained(folder)
        return folder

    def protection(self, preset: str) -> tuple[str, ...]:
        """Further arguments of `stip-keyservice protect`."""
        return ACCEPTED[preset] + (("--accept-tied-head",) if self.tied and preset == "paper" else ())


@dataclass(frozen=True)
class Shape:
    """A Llama by what its cost grows with: heads of 64, an inner width of 8/3 of the width, no grouped queries."""

    vocabulary: int = 8192
    width: int = 256
    depth: int = 4
    positions: int = 2048

    def build(self) -> Any:
        heads = self.width // 64
        return LlamaForCausalLM(  # type: ignore[no-untyped-call]
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                intermediate_size=-(-self.width * 8 // 3 // 64) * 64,
                num_hidden_layers=self.depth,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=self.positions,
            )
        )

    def subject(self) -> Subject:
        """In float32."""
        name = f"v{self.vocabulary}-d{self.width}-l{self.depth}"
        title = f"Llama-like, vocabulary {self.vocabulary}, width {self.width}, depth {self.depth}"
        return Subject(name, title, "float32", self.build)


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


_GPT2 = partial(Subject, title="GPT-2, 124 M parameters", build=_gpt2, tied=True)
_LLAMA = partial(Subject, title="Llama-like, 220 M parameters", build=_llama)
SUBJECTS = {
    subject.name: subject
    for subject in (
        _GPT2("gpt2", dtype="float32"),
        _GPT2("gpt2-bf16", dtype="bfloat16"),
        _LLAMA("llama", dtype="bfloat16"),
        _LLAMA("llama-fp32", dtype="float32"),
        Subject("demo", "bundled demo model, 2.75 M parameters", "float32", None),
    )
}
