"""The attacker's own model: small, trained from scratch on public text, with the victims' tokenizer.

It proposes what comes next, and its table stands in where an attacker has no better one; so it is as wide as the
instance, and otherwise unrelated to it. Always a Llama, whatever is attacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stip_keyservice.audit.attacks.training import batches, descend, next_token_loss
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.view import Ids

LAYERS, HEAD_WIDTH = 2, 32
BATCH = 16
RATE = 3e-3
WORK = 3e12
"""Floating-point operations at most: half a minute of one slow core. A wide model learns in fewer steps, and worse."""


def train(
    text: Sequence[Ids],
    folder: Path,
    *,
    width: int,
    vocabulary: int,
    positions: int,
    passes: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Network:
    """A model of residual width `width` trained on `text`, so many passes, written to `folder` as a checkpoint.

    The same arguments and library versions give the same model.
    """
    length = min(len(each) for each in text)
    model = _fresh(width, vocabulary, positions, seed)
    generator = np.random.default_rng([seed, *b"surrogate"])
    most = _most_steps(model, BATCH * length)
    order = batches(text, generator, most=most, passes=passes, size=BATCH, length=length)
    steps = len(order.order)

    def loss(step: int) -> torch.Tensor:
        progress(step, steps)
        return next_token_loss(lambda ids: model(input_ids=ids, use_cache=False).logits, order[step])

    descend(model.parameters(), loss, steps=steps, rate=RATE)
    model.train(False).save_pretrained(folder)
    return Network(folder)


def _fresh(width: int, vocabulary: int, positions: int, seed: int) -> Any:
    heads = max(count for count in range(1, width // HEAD_WIDTH + 2) if width % (2 * count) == 0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(Any, LlamaForCausalLM)(config)


def _most_steps(model: Any, tokens: int) -> int:
    """Steps of so many tokens within `WORK`: six operations a weight and token (Kaplan et al., arXiv 2001.08361, §2.1),
    of which a tied table is one weight."""
    weights = sum(each.numel() for each in model.parameters())
    return max(1, int(WORK / (6 * weights * tokens)))
