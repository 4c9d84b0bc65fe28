"""Random models of both families, run by the classes of transformers that a server and a plain user would run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stip_keyservice.protect.plan import Plan
from stip_keyservice.protect.state_dict import protect_state
from stip_protocol.keys import Permutation

ROOT = bytes(range(32))
_CAUSAL = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}
_BASE = {"llama": LlamaModel, "gpt2": GPT2Model}
_CONFIG = {"llama": LlamaConfig, "gpt2": GPT2Config}


def _rms_norm(self: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """transformers' LlamaRMSNorm, but for rounding float64 down to float32 on the way."""
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * wide.to(hidden_states.dtype)


@pytest.fixture(autouse=True, scope="module")
def float64_norms() -> Iterator[None]:
    """Let float64 models be float64 throughout, and keep the small products here on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", _rms_norm)
        yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Protected:
    """What the operator's model and the enclave compute between them."""

    plan: Plan
    server: dict[str, torch.Tensor]
    enclave: dict[str, torch.Tensor]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits by true id: keyed rows in, hidden states or permuted logits out, as an enclave does it."""
        rows = self.enclave["embedding"][ids]
        if "positions" in self.enclave:
            rows = rows + self.enclave["positions"][: ids.shape[1]]
        with torch.no_grad():
            answer = self.model()(inputs_embeds=rows)
        if self.plan.output == "hidden":
            return answer.last_hidden_state @ self.enclave["head"].T + self.enclave.get("head_bias", 0)
        key = self.plan.keys["vocabulary"]
        assert isinstance(key, Permutation)
        return answer.logits[..., torch.tensor(key.inverse.index)]

    def model(self) -> torch.nn.Module:
        """The unmodified class of transformers, with the server part and nothing else."""
        kind = (_CAUSAL if self.plan.output == "top" else _BASE)[self.plan.family]
        dtype = getattr(torch, self.plan.dtype)
        model = kind(_CONFIG[self.plan.family].from_dict(self.plan.config)).to(dtype).eval()
        model.load_state_dict(self.server, strict=True)
        return model


@dataclass(frozen=True)
class Plain:
    """A plain model with every parameter random."""

    config: dict[str, Any]
    model: torch.nn.Module
    state: dict[str, torch.Tensor]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(ids).logits
        return logits

    def ids(self, length: int = 8, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.config["vocab_size"], (1, length), generator=generator)

    def protect(self, preset: str, root: bytes = ROOT, **options: Any) -> Protected:
        options.setdefault("accept_tied_head", True)
        return Protected(*protect_state(self.config, self.state, preset, root, **options))


class Models:
    """Makes plain models."""

    def make(self, config: Mapping[str, Any], *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Plain:
        """Every parameter is random, norm weights and biases too, and large enough that errors show in the logits."""
        generator = torch.Generator().manual_seed(seed)
        parsed = _CONFIG[config["model_type"]].from_dict(dict(config))
        model = _CAUSAL[config["model_type"]](parsed).to(torch.float64).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                is_gain = parameter.ndim == 1 and not name.endswith("bias")
                fan_in = parameter.shape[-1] if config["model_type"] == "llama" else parameter.shape[0]
                spread = 1.0 if "embed" in name or "wte" in name or "wpe" in name else 1.5 * fan_in**-0.5
                parameter.copy_(1 + 0.4 * noise if is_gain else 0.4 * noise if parameter.ndim == 1 else spread * noise)
        model = model.to(dtype)
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        if parsed.tie_word_embeddings:
            del state["lm_head.weight"]
        return Plain(parsed.to_dict(), model, state)

    @staticmethod
    @st.composite
    def llamas(draw: st.DrawFn) -> dict[str, Any]:
        kv_heads = draw(st.integers(1, 3))
        heads = kv_heads * draw(st.integers(1, 3))
        return {
            "model_type": "llama",
            "vocab_size": draw(st.integers(2, 29)),
            "hidden_size": heads * draw(st.integers(1, 4)),
            "intermediate_size": draw(st.integers(1, 13)),
            "num_hidden_layers": draw(st.integers(1, 2)),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 2 * draw(st.integers(1, 3)),
            "attention_bias": draw(st.booleans()),
            "mlp_bias": draw(st.booleans()),
            "tie_word_embeddings": draw(st.booleans()),
            "hidden_act": draw(st.sampled_from(["silu", "gelu"])),
            "max_position_embeddings": 32,
            "rope_parameters": draw(st.sampled_from(ROPES)),
        }

    @staticmethod
    @st.composite
    def gpt2s(draw: st.DrawFn) -> dict[str, Any]:
        heads = draw(st.integers(1, 4))
        return {
            "model_type": "gpt2",
            "vocab_size": draw(st.integers(2, 29)),
            "n_positions": 16,
            "n_embd": heads * draw(st.integers(1, 4)),
            "n_layer": draw(st.integers(1, 2)),
            "n_head": heads,
            "n_inner": draw(st.none() | st.integers(1, 13)),
            "activation_function": draw(st.sampled_from(["gelu_new", "relu", "silu"])),
            "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
            "tie_word_embeddings": draw(st.booleans()),
        }


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
    {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 36,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "attention_bias": True,
    "mlp_bias": True,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 37,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 29,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FIXED: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama without biases, tied": LLAMA
    | {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "num_hidden_layers": 1},
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | {"tie_word_embeddings": False, "n_layer": 1},
}


@pytest.fixture(scope="session")
def models() -> Models:
    return Models()


@pytest.fixture(scope="module", params=list(FIXED))
def plain(request: pytest.FixtureRequest, models: Models) -> Plain:
    """Each of the fixed models in float64."""
    return models.make(FIXED[request.param])


@pytest.fixture(params=["paper", "hardened"])
def preset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def fixed() -> dict[str, dict[str, Any]]:
    return FIXED
