"""Random models of every family, run by the classes of transformers that a server and a plain user would run."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from stip_keyservice.protect.architecture import Architecture
from stip_keyservice.protect.families import expand
from stip_keyservice.protect.plan import Plan
from stip_keyservice.protect.state_dict import protect_state
from stip_protocol.keys import Permutation
from tests.protect_core.families import presets
from tests.protect_core.fixed import FIXED

ROOT = bytes(range(32))
Config = dict[str, Any]
ACCEPTED = {"accept_tied_head": True, "accept_token_cipher": True}


class Float64Throughout(TorchFunctionMode):
    """Keeps float64 at float64 where the classes of transformers round it to float32 on the way.

    They do in norms, routers and the softmax of attention, whatever the dtype of the model. Nothing else changes,
    and nothing at all for models of other dtypes. Rotary tables begin in float32; they are the same on both sides.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NARROWING and isinstance(args[0], torch.Tensor) and args[0].dtype is torch.float64:
            if func is torch.Tensor.float or (func is torch.Tensor.to and args[1:] == (torch.float32,)):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


_NARROWING = {torch.Tensor.float, torch.Tensor.to, torch.nn.functional.softmax}


def run(model: torch.nn.Module, **inputs: torch.Tensor) -> Any:
    """The model's answer to all positions of its inputs, without a cache."""
    with torch.no_grad(), Float64Throughout():
        return model(**inputs, use_cache=False)


def parse(config: Mapping[str, Any]) -> PretrainedConfig:
    """transformers' form of a configuration; it writes into what it reads, hence the copy.

    Its grouped products of experts have no float64.
    """
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(dict(config)))
    parsed._experts_implementation = "eager"
    return parsed


def on_disk(architecture: Architecture, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters as tensors of a checkpoint: stacks of experts apart, names as on disk."""
    stored = {name: tensor for name, tensor in state.items() if name not in architecture.fused}
    for name in state.keys() & architecture.fused.keys():
        members = architecture.fused[name]
        rows = state[name].flatten(end_dim=-2).split([architecture.tensors[member][0] for member in members])
        stored |= {member: part.clone() for member, part in zip(members, rows, strict=True)}
    return stored


def in_memory(
    model: torch.nn.Module, architecture: Architecture, stored: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Stored tensors as the parameters of `model`, experts stacked: what a load from a file does by itself."""
    members = {name.removeprefix(_prefix(model, architecture)): of for name, of in architecture.fused.items()}
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name in members:
            rows = [stored[member.removeprefix(_prefix(model, architecture))] for member in members[name]]
            state[name] = torch.cat(rows).reshape(parameter.shape)
        else:
            state[name] = stored[name]
    return state


def _prefix(model: torch.nn.Module, architecture: Architecture) -> str:
    return architecture.prefix if type(model).__name__ == architecture.base_class else ""


@dataclass(frozen=True)
class Protected:
    """What the operator's model and the enclave compute between them."""

    plan: Plan
    server: dict[str, torch.Tensor]
    enclave: dict[str, torch.Tensor]

    def logits(self, ids: torch.Tensor, model: torch.nn.Module | None = None) -> torch.Tensor:
        """Logits by true id, as an enclave puts them together. `model`: that of another protection, to be filled."""
        model = self.model() if model is None else self.fill(model)
        if self.plan.output == "ids":
            permuted = torch.tensor(self._vocabulary.inverse.index)[ids]
            return self._true(run(model, input_ids=permuted).logits)
        rows = self.enclave["embedding"][ids]
        if "positions" in self.enclave:
            rows = rows + self.enclave["positions"][: ids.shape[1]]
        answer = run(model, inputs_embeds=rows)
        if self.plan.output == "top":
            return self._true(answer.logits)
        logits = answer.last_hidden_state @ self.enclave["head"].T + self.enclave.get("head_bias", 0)
        cap = self.plan.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def alone(self, rows: torch.Tensor) -> Any:
        """What the server part makes of rows that no enclave keyed."""
        return run(self.model(), inputs_embeds=rows)

    def model(self) -> PreTrainedModel:
        """The unmodified class of transformers, with the server part and nothing else."""
        kinds = MODEL_MAPPING if self.plan.output == "hidden" else MODEL_FOR_CAUSAL_LM_MAPPING
        config = parse(self.plan.config)
        return self.fill(kinds[type(config)](config).to(getattr(torch, self.plan.dtype)).eval())

    def fill(self, model: Any) -> Any:
        """`model`, of the class and shape of the server part, with its values."""
        model.load_state_dict(in_memory(model, self.plan.architecture, self.server), strict=True)
        return model

    @property
    def _vocabulary(self) -> Permutation:
        key = self.plan.keys["vocabulary"]
        assert isinstance(key, Permutation)
        return key

    def _true(self, permuted: torch.Tensor) -> torch.Tensor:
        return permuted[..., torch.tensor(self._vocabulary.inverse.index)]


@dataclass(frozen=True)
class Plain:
    """A plain model with every parameter random."""

    config: dict[str, Any]
    model: torch.nn.Module
    state: dict[str, torch.Tensor] = field(repr=False)
    """As on disk, without what is tied."""
    _protected: dict[str, Protected] = field(default_factory=dict, repr=False)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = run(self.model, input_ids=ids).logits
        return logits

    def ids(self, length: int = 8, seed: int = 0, rows: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.config["vocab_size"], (rows, length), generator=generator)

    def protect(self, preset: str, root: bytes = ROOT, **options: Any) -> Protected:
        if root == ROOT and not options:
            if preset not in self._protected:
                self._protected[preset] = self._protect(preset, root)
            return self._protected[preset]
        return self._protect(preset, root, **options)

    def _protect(self, preset: str, root: bytes, **options: Any) -> Protected:
        options = ACCEPTED | options
        return Protected(*protect_state(self.config, self.state, preset, root, **options))

    @property
    def presets(self) -> list[str]:
        return presets(self.config)


def unkeyed(plain: Plain, preset: str) -> set[str]:
    """Tensors that no key meets. Gemma 3 stores γ - 1 of query and key heads, where a sign would round: `paper`,
    which moves bits only, leaves it as it is."""
    if preset != "paper" or plain.config["model_type"] != "gemma3_text":
        return set()
    return {name for name in plain.state if name.endswith(("q_norm.weight", "k_norm.weight"))}


class Models:
    """Makes plain models."""

    def make(self, config: Mapping[str, Any], *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Plain:
        """Every parameter is random, norm weights and biases too, and large enough that errors show in the logits."""
        generator = torch.Generator().manual_seed(seed)
        parsed = parse(config)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)](parsed).to(torch.float64).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                parameter.copy_(_values(config["model_type"], name, noise))
        model = model.to(dtype)
        architecture = expand(parsed.to_dict())
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        stored = on_disk(architecture, state)
        return Plain(parsed.to_dict(), model, {name: stored[name] for name in stored.keys() - architecture.tied.keys()})

    @staticmethod
    @cache
    def fixed(name: str, dtype: torch.dtype = torch.float64) -> Plain:
        """One of the fixed models; shared, so not to be written to."""
        return Models().make(FIXED[name], dtype=dtype)


def _values(family: str, name: str, noise: torch.Tensor) -> torch.Tensor:
    """Random values of one parameter. Gemma stores γ - 1; embeddings keep a spread of 1, others about that of sums."""
    if noise.ndim == 1:
        is_gain = not name.endswith("bias") and not family.startswith("gemma")
        return 0.4 * noise + is_gain
    if "embed" in name or "wte" in name or "wpe" in name:
        return noise
    fan_in = noise.shape[0] if family == "gpt2" and name != "lm_head.weight" else noise.shape[-1]
    return 1.5 * fan_in**-0.5 * noise
