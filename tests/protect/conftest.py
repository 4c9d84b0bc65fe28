"""Tiny plain checkpoints with every parameter random, made by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

MODEL_NAME = "Quartz-Sphinx-7b"
SENTINEL = "xylophonic"
"""A word of the tokenizer that must not travel to the operator."""
_GPT2: Any = GPT2LMHeadModel
_LLAMA: Any = LlamaForCausalLM
MODELS: dict[str, Callable[[bool], Any]] = {
    "gpt2": lambda tied: _GPT2(
        GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=151, n_positions=48, tie_word_embeddings=tied)
    ),
    "llama": lambda tied: _LLAMA(
        LlamaConfig(
            hidden_size=48,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=10,
            vocab_size=173,
            max_position_embeddings=80,
            tie_word_embeddings=tied,
            attention_bias=True,
            mlp_bias=True,
            eos_token_id=[2, 7],
        )
    ),
}


@dataclass(frozen=True)
class Case:
    """One way to store one model."""

    family: str
    tied: bool
    dtype: torch.dtype = torch.float32
    sharded: bool = False

    def __str__(self) -> str:
        words = (self.family, "tied" if self.tied else "untied", str(self.dtype).removeprefix("torch."))
        return "-".join((*words, "sharded" if self.sharded else "whole"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on several threads, and the processes that tests start inherit the limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The folder of a case's checkpoint, made on first use."""
    made: dict[Case, Path] = {}

    def make(case: Case) -> Path:
        if case not in made:
            made[case] = _store(case, tmp_path_factory.mktemp(str(case)) / MODEL_NAME)
        return made[case]

    return make


def _store(case: Case, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(7)
    model = MODELS[case.family](case.tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = name.endswith("weight") and parameter.ndim == 1  # of a norm: about 1, as in trained models
            parameter.copy_(1 + 0.3 * drawn if scale else 1.2 * drawn / parameter.shape[-1] ** 0.5)
    model.to(case.dtype).save_pretrained(folder, max_shard_size="40KB" if case.sharded else "1GB")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": f"acme/{MODEL_NAME}"}))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "</s>": 2, SENTINEL: 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "name_or_path": MODEL_NAME}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 7, 100000], "temperature": 0.6, "do_sample": True, "transformers_version": "5"})
    )
    return folder
