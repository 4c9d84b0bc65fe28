"""Small models of every family with their real structure, and how plain and protected ones are run.

Checkpoints are written to disk and loaded by transformers' own `from_pretrained`, plain and server part alike, as a
user and an operator would load them; what is the enclave's (tables, head, order of the vocabulary) is done here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

from stip_keyservice.protect.families import expand
from stip_keyservice.protect.plan import EMBEDDING, HEAD, HEAD_BIAS, POSITIONS, Incidence, Plan
from stip_keyservice.protect.state_dict import protect_state
from stip_protocol.keys import Permutation

WEIGHTS = "model.safetensors"
VOCABULARY = 1000
LEFT_OUT = ("layers.0.o", "reads")
"""The control: the first layer's attention output reads the values of the heads without their key."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
_GATED = _SIZES | {"num_key_value_heads": 2, "intermediate_size": 176, "tie_word_embeddings": False}
_SLIDES = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = _GATED | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GEMMA = _GATED | _SLIDES | {"head_dim": 16, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "llama": _GATED
    | {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": _GATED | {"sliding_window": 12},
    "qwen2": _GATED | {"use_sliding_window": True} | _SLIDES,
    "qwen3": _GATED | {"head_dim": 16},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "phi3": _GATED
    | {
        "head_dim": 16,
        "sliding_window": 20,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
    "gpt_neox": _SIZES | {"intermediate_size": 256, "num_attention_heads": 4, "rotary_pct": 0.25},
    "opt": _SIZES | {"ffn_dim": 256, "word_embed_proj_dim": 64},
    "mixtral": _GATED | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 96, "mlp_only_layers": [1]},
    "qwen3_moe": _EXPERTS | {"head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 1},
}
"""By `model_type`; everything that is not here is the default of the family's class."""


class Model(Protocol):
    """Something that predicts."""

    def last(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] logits by true id, in the model's dtype, of the last position of ids [n, length]."""
        ...


@dataclass(frozen=True)
class PlainModel:
    """The checkpoint in transformers."""

    model: Any

    def last(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits

    def margins(self, ids: torch.Tensor) -> torch.Tensor:
        """float64 [n, decisions]: in each router, at each position of ids [n, length], how far the last chosen
        expert is above the first that is not, in the router's own units; no decisions where there are no experts."""
        chosen = getattr(self.model.config, "num_experts_per_tok", None)
        if chosen is None:
            return torch.empty(len(ids), 0, dtype=torch.float64)
        answer = self.model(input_ids=ids, use_cache=False, logits_to_keep=1, output_router_logits=True)
        scores = torch.stack(answer.router_logits, dim=1).double()
        last, next_one = scores.topk(chosen + 1).values[..., -2:].unbind(-1)
        return (last - next_one).view(len(ids), -1)


@dataclass(frozen=True)
class HeadInEnclave:
    """Output `hidden`: keyed rows in, the last hidden state out, the keyed head in the enclave."""

    model: Any
    enclave: Mapping[str, torch.Tensor]
    cap: float | None

    def last(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model(inputs_embeds=_rows(self.enclave, ids), use_cache=False).last_hidden_state[:, -1]
        logits = torch.nn.functional.linear(hidden, self.enclave[HEAD], self.enclave.get(HEAD_BIAS))
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@dataclass(frozen=True)
class HeadOnServer:
    """Output `top`: keyed rows in, permuted logits out."""

    model: Any
    enclave: Mapping[str, torch.Tensor]
    order: torch.Tensor

    def last(self, ids: torch.Tensor) -> torch.Tensor:
        answer = self.model(inputs_embeds=_rows(self.enclave, ids), use_cache=False, logits_to_keep=1)
        logits: torch.Tensor = answer.logits[:, -1, self.order]
        return logits


@dataclass(frozen=True)
class AllOnServer:
    """Output `ids`: permuted ids in, permuted logits out."""

    model: Any
    order: torch.Tensor

    def last(self, ids: torch.Tensor) -> torch.Tensor:
        answer = self.model(input_ids=self.order[ids], use_cache=False, logits_to_keep=1)
        logits: torch.Tensor = answer.logits[:, -1, self.order]
        return logits


@dataclass(frozen=True)
class Checkpoint:
    """A plain checkpoint on disk."""

    family: str
    directory: Path
    dtype: torch.dtype
    """As it is stored."""
    parameters: int

    def plain(self, dtype: torch.dtype) -> PlainModel:
        """The model, computing in `dtype`."""
        model = _load(AutoModelForCausalLM, self.family, self.directory, dtype)
        if dtype is torch.float64 and "num_experts_per_tok" in CONFIGURATIONS[self.family]:
            model.set_experts_implementation("eager")  # no other knows float64
        return PlainModel(model)

    def protect(self, preset: str, seed: int, into: Path, *, mutate: Incidence | None = None) -> ProtectedCheckpoint:
        """A protected copy, its server part in the empty folder `into`.

        Raises `PresetRefused` where `preset` is not lossless or not safe for this model, whatever is accepted.
        """
        config = json.loads((self.directory / "config.json").read_text())
        plan, server, enclave = protect_state(
            config,
            load_file(self.directory / WEIGHTS),
            preset,
            hashlib.sha256(f"benchmarks.accuracy {seed}".encode()).digest(),
            accept_tied_head=True,
            accept_token_cipher=True,
            mutate=mutate,
        )
        save_file(server, into / WEIGHTS, metadata={"format": "pt"})
        (into / "config.json").write_text(json.dumps(plan.config))
        (into / "generation_config.json").write_text(json.dumps(plan.generation_config))
        return ProtectedCheckpoint(plan, into, enclave)


@dataclass(frozen=True)
class ProtectedCheckpoint:
    """A server part on disk and an enclave part in memory."""

    plan: Plan
    directory: Path
    enclave: Mapping[str, torch.Tensor]

    def model(self, dtype: torch.dtype) -> Model:
        """Both parts together, computing in `dtype`."""
        plan, enclave = self.plan, {name: tensor.to(dtype) for name, tensor in self.enclave.items()}
        kind = AutoModel if plan.output == "hidden" else AutoModelForCausalLM
        model = _load(kind, plan.family, self.directory, dtype)
        if plan.output == "hidden":
            return HeadInEnclave(model, enclave, plan.logit_cap)
        key = plan.keys["vocabulary"]
        assert isinstance(key, Permutation)
        order = torch.tensor(key.inverse.index)
        return HeadOnServer(model, enclave, order) if plan.output == "top" else AllOnServer(model, order)

    @property
    def left_out(self) -> Incidence:
        """Where the control leaves a key out."""
        return next(each for each in self.plan.incidences if (each.part, each.side) == LEFT_OUT)


def checkpoint(family: str, seed: int, dtype: torch.dtype, into: Path) -> Checkpoint:
    """A model of `family` with every parameter random, stored in `dtype` in the empty folder `into`.

    Matrices have a standard deviation of 1.5/√(inputs), so that logits, scores and routing spread; norm weights
    vary around 1 by 0.4 and biases around 0 by 0.1: larger ones would make predictions that depend little on the ids.
    """
    config = AutoConfig.for_model(family, **CONFIGURATIONS[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    (unit,) = {norm.unit for norm in expand(config.to_dict()).norms}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                inputs = parameter.shape[0 if _is_conv1d(model, name) else -1]
                parameter.copy_(1.5 * inputs**-0.5 * noise)
            else:
                parameter.copy_(0.1 * noise if name.endswith("bias") else unit + 0.4 * noise)
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    model.to(dtype).save_pretrained(into)
    return Checkpoint(family, into, dtype, model.num_parameters())


def _is_conv1d(model: Any, name: str) -> bool:
    """Whether a parameter is stored [in, out], as GPT-2's matrices are."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)


def _rows(enclave: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    rows = enclave[EMBEDDING][ids]
    return rows + enclave[POSITIONS][: ids.shape[1]] if POSITIONS in enclave else rows


def _load(kind: Any, family: str, directory: Path, dtype: torch.dtype) -> Any:
    """The unmodified class; eager attention where the faster ones would leave out a cap on scores."""
    eager = {"attn_implementation": "eager"} if CONFIGURATIONS[family].get("attn_logit_softcapping") else {}
    model, info = kind.from_pretrained(directory, dtype=dtype, local_files_only=True, output_loading_info=True, **eager)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(f"{family}: {what} {sorted(map(str, info[what]))[:3]}")
    return model.eval()
