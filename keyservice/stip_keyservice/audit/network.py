"""A Transformer that an attacker can run: a server part, a public base, a sibling's server part.

What a server computes on the way (hidden states, attention, keys and values) is its operator's to see.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Inside:
    """What a network computes of one sequence of n rows. L layers, width d."""

    states: Floats
    """[L + 1, n, d]: the rows, and the residual after each layer (after the last one: also normed, as transformers
    gives it)."""
    attentions: Floats
    """[L, heads, n, n] attention probabilities."""
    keys: Floats
    """[L, kv_heads, n, head_dim], rotary applied: as a KV cache holds them."""
    values: Floats
    """[L, kv_heads, n, head_dim]."""


@dataclass(frozen=True)
class Network:
    """A checkpoint folder of transformers, with or without embedding and head."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return content

    @cached_property
    def tensors(self) -> Mapping[str, Floats]:
        """Every stored tensor by its name, as float32. Llama's layout: [out, in]; GPT-2's Conv1D: [in, out]."""
        found: dict[str, Floats] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            found |= {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
        return found

    @cached_property
    def model(self) -> Any:
        """As transformers loads it, in float32, with eager attention (the only one that gives its probabilities)."""
        config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
        made = getattr(transformers, config.architectures[0])
        loaded = made.from_pretrained(
            self.folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        )
        return loaded.train(False)

    @property
    def embedding(self) -> Floats:
        """[V, d]: the stored input table. Zeros, or absent (KeyError), where an instance keeps it in the enclave."""
        weight: Floats = self.model.get_input_embeddings().weight.detach().numpy()
        return weight

    def rows(self, ids: NDArray[np.int64]) -> Floats:
        """[n, d]: what enters the first layer for these ids, learned positions included."""
        with torch.inference_mode():
            result = self.model.base_model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True)
        rows: Floats = result.hidden_states[0][0].numpy()
        return rows

    def inside(self, rows: Floats) -> Inside:
        """Run the blocks on rows [n, d] that enter the first layer, from the first position on."""
        with torch.inference_mode():
            result = self.model.base_model(
                inputs_embeds=torch.from_numpy(np.ascontiguousarray(rows))[None],
                output_hidden_states=True,
                output_attentions=True,
                use_cache=True,
            )
        layers = result.past_key_values.layers
        return Inside(
            states=torch.cat(result.hidden_states).numpy(),
            attentions=torch.cat(result.attentions).numpy(),
            keys=torch.cat([layer.keys for layer in layers]).numpy(),
            values=torch.cat([layer.values for layer in layers]).numpy(),
        )

    def logits(self, rows: Floats) -> Floats:
        """[n, V] of rows [n, d]. Raises `AttributeError` where there is no head."""
        with torch.inference_mode():
            result: Floats = self.model(inputs_embeds=torch.from_numpy(np.ascontiguousarray(rows))[None]).logits[0]
        return np.asarray(result)


@dataclass(frozen=True)
class CompleteModel:
    """A causal model of transformers with its table and its head: what says by itself what comes next."""

    model: Any

    def logits(self, ids: NDArray[np.int64]) -> Floats:
        """[n, V] next-token logits after each of true ids [n], as `claims.Stolen` says them."""
        with torch.inference_mode():
            logits: Floats = self.model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
        return logits
