"""Relatives of a model that somebody might call its public base, tiny models of other families, and their instances."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stip_keyservice.audit import truth
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.traffic import observe
from stip_keyservice.audit.truth import Truth
from stip_keyservice.audit.view import Entry, Ids, View
from stip_keyservice.protect.instance import protect

SEED, PROMPT, STEPS, BATCH, RATE = 11, 6, 20, 8, 1e-3
VOCABULARY, LENGTH = 131, 20


def drifted(plain: Network, folder: Path, drift: float) -> Network:
    """Every weight moved by Gaussian noise of `drift` times its tensor's standard deviation."""
    generator, model = torch.Generator().manual_seed(SEED), copy.deepcopy(plain.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * drift)
    model.save_pretrained(folder)
    return Network(folder)


def trained_further(plain: Network, folder: Path, texts: Sequence[Ids]) -> Network:
    """A short training run on texts in another language: the same ids, renamed."""
    torch.manual_seed(SEED)
    renamed = torch.randperm(plain.config["vocab_size"])
    fed, model = renamed[torch.from_numpy(np.stack(texts))], copy.deepcopy(plain.model).train(True)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for step in range(STEPS):
        batch = fed[torch.arange(step * BATCH, (step + 1) * BATCH) % len(fed)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return Network(folder)


def unrelated(plain: Network, folder: Path) -> Network:
    """The same shape, other weights."""
    torch.manual_seed(SEED)
    type(plain.model)(plain.model.config).save_pretrained(folder)
    return Network(folder)


MODELS: dict[str, Callable[[bool, int], Any]] = {
    "llama": lambda tied, vocabulary: cast(Any, LlamaForCausalLM)(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=8,
            attention_bias=True,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
    ),
    "gpt2": lambda tied, vocabulary: cast(Any, GPT2LMHeadModel)(
        GPT2Config(vocab_size=vocabulary, n_embd=48, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=tied)
    ),
}


def tiny(
    family: str,
    folder: Path,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    vocabulary: int = VOCABULARY,
) -> Network:
    """A model of random weights, norms included."""
    torch.manual_seed(SEED)
    model = MODELS[family](tied, vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.2)
    model.to(dtype).save_pretrained(folder)
    return Network(folder)


def protected(ground: Any, plain: Network, folder: Path, preset: str) -> Truth:
    """The truth about a new instance of it."""
    made = protect(
        plain.folder,
        folder,
        preset=preset,  # type: ignore[arg-type]
        developer=ground.home.developer,
        seal_to=ground.home.sealing.public_key(),
        accept_tied_head=True,
        accept_token_cipher=True,
        samples=1,
    )
    return truth.read(made.directory, plain.folder, ground.home)


def texts(count: int) -> list[Ids]:
    """Random ids."""
    return list(np.random.default_rng(SEED).integers(VOCABULARY, size=(count, LENGTH)))


def view(known: Truth, said: Sequence[Ids], **more: Any) -> View:
    """What the server of that instance sees, and what else its operator holds."""
    return View(
        preset=known.manifest.preset,
        server=known.server,
        victims=[observe(known, text, PROMPT).seen for text in said],
        public_text=[],
        vocabulary=known.manifest.vocabulary,
        seed=SEED,
        **{"entry": Entry(known.entry.rows, known.entry.positions, 0.0), "surrogate": known.plain, **more},
    )


def cosine(claimed: Any, true: Any) -> float:
    """Mean cosine of columns, with its sign: a key of the wrong sign opens nothing."""
    lengths = np.linalg.norm(claimed, axis=0) * np.linalg.norm(true, axis=0)
    return float(((claimed * true).sum(axis=0) / lengths).mean())


def read(tokens: Sequence[Ids], said: Sequence[Ids]) -> float:
    """Share of positions whose first guess is right."""
    return float(np.mean(np.concatenate([guess[:, 0] == text[:-1] for guess, text in zip(tokens, said, strict=True)])))


def commonest(said: Sequence[Ids]) -> float:
    """Share of the commonest token: what one lucky hit of a wrong dictionary can come to."""
    return float(np.bincount(np.concatenate([text[:-1] for text in said])).max() / sum(len(text) - 1 for text in said))
