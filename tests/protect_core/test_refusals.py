"""What cannot be protected is refused by name, before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from stip_keyservice.protect.matching import TensorHeader
from stip_keyservice.protect.plan import plan
from stip_keyservice.protect.state_dict import StateSource, headers_of, protect_state
from stip_protocol.errors import (
    ArchitectureUnsupported,
    CheckpointInvalid,
    ConfigurationError,
    PresetRefused,
    StipError,
)

if TYPE_CHECKING:
    from .conftest import Plain

ROOT = bytes(range(32))


def refuse(plain: Plain, error: type[StipError], match: str, *, preset: str = "hardened", **changes: Any) -> None:
    """`plan` raises `error` for the plain model's configuration and headers with `changes`."""
    headers = headers_of(plain.state) | changes.pop("headers", {})
    headers = {name: header for name, header in headers.items() if header is not None}
    with pytest.raises(error, match=match):
        plan(plain.config | changes, headers, preset, ROOT)


def first(plain: Plain, ending: str) -> str:
    return next(name for name in plain.state if name.endswith(ending))


@pytest.mark.parametrize("family", ["bert", "mamba", None, 3, ["llama"]])
def test_an_unsupported_architecture_is_refused_with_the_supported_ones(plain: Plain, family: object) -> None:
    refuse(plain, ArchitectureUnsupported, r"allowed: gemma2, gemma3_text, gpt2", model_type=family)


def test_a_quantised_checkpoint_is_refused(plain: Plain) -> None:
    refuse(plain, ArchitectureUnsupported, "quantization_config", quantization_config={"quant_method": "gptq"})


def test_an_unknown_tensor_is_refused(plain: Plain, preset: str) -> None:
    extra = TensorHeader("score.weight", "F64", (2, 2))
    refuse(plain, CheckpointInvalid, r"score\.weight", headers={"score.weight": extra})


def test_each_missing_tensor_is_refused_by_name(plain: Plain) -> None:
    for name in plain.state:
        refuse(plain, CheckpointInvalid, name.replace(".", r"\."), headers={name: None})


def test_each_wrong_shape_is_refused_by_name(plain: Plain) -> None:
    for name, tensor in plain.state.items():
        wrong = TensorHeader(name, "F64", (*tensor.shape[:-1], tensor.shape[-1] + 1))
        refuse(plain, CheckpointInvalid, f"{name} shape".replace(".", r"\."), headers={name: wrong})


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "BOOL", "I64"])
def test_a_dtype_that_cannot_be_keyed_is_refused(plain: Plain, dtype: str) -> None:
    name = first(plain, ".weight")
    header = TensorHeader(name, dtype, tuple(plain.state[name].shape))
    refuse(plain, CheckpointInvalid, rf"dtype: got {dtype}, allowed: F64, F32, F16, BF16", headers={name: header})


def test_a_checkpoint_of_several_dtypes_is_refused(plain: Plain) -> None:
    name = first(plain, "norm.weight") if plain.config["model_type"] == "llama" else first(plain, "ln_f.weight")
    header = TensorHeader(name, "F32", tuple(plain.state[name].shape))
    refuse(plain, CheckpointInvalid, "dtype", headers={name: header})


def test_an_empty_checkpoint_is_refused(plain: Plain) -> None:
    refuse(plain, CheckpointInvalid, "no such tensor", headers=dict.fromkeys(plain.state))


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("llama", {"hidden_size": "36"}, "hidden_size"),
        ("llama", {"hidden_size": 0}, "hidden_size"),
        ("llama", {"hidden_size": 37}, "num_attention_heads must divide hidden_size"),
        ("llama", {"num_key_value_heads": 5}, "num_key_value_heads must divide"),
        ("llama", {"head_dim": 3}, "must be even"),
        ("llama", {"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ("llama", {"hidden_act": "prelu"}, "hidden_act"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama", {"rope_parameters": {"rope_type": "learned", "rope_theta": 1.0}}, "rope_type"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "mixes": 1}}, "mixes"),
        ("llama", {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("gpt2", {"n_embd": 25}, "n_head must divide n_embd"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "softmax"}, "activation_function"),
        ("gpt2", {"n_positions": -1}, "n_positions"),
        ("gpt2", {"vocab_size": None}, "vocab_size"),
    ],
)
def test_configurations_without_a_lossless_form_are_refused(
    models: Any, fixed: dict[str, dict[str, Any]], family: str, changes: dict[str, Any], match: str
) -> None:
    refuse(models.make(fixed[family]), CheckpointInvalid, match, **changes)


def test_paper_refuses_a_tied_head_unless_told(plain: Plain) -> None:
    if plain.config["tie_word_embeddings"]:
        refuse(plain, PresetRefused, "accept_tied_head", preset="paper")
        assert plan(plain.config, headers_of(plain.state), "paper", ROOT, accept_tied_head=True).output == "top"
    else:
        assert plan(plain.config, headers_of(plain.state), "paper", ROOT).output == "top"


@pytest.mark.parametrize(
    ("name", "match"), [("none", "paper, hardened, throughput"), ("Paper", "paper, hardened, throughput")]
)
def test_a_preset_that_is_not_there_is_refused(plain: Plain, name: str, match: str) -> None:
    refuse(plain, PresetRefused, match, preset=name)


def test_a_root_secret_of_another_length_is_refused(plain: Plain) -> None:
    with pytest.raises(ConfigurationError, match="32 bytes"):
        plan(plain.config, headers_of(plain.state), "hardened", b"short")


def test_keys_for_spaces_that_are_not_there_are_refused(plain: Plain) -> None:
    key = plain.protect("hardened").plan.keys["residual"]
    with pytest.raises(ValueError, match="unknown spaces"):
        plain.protect("hardened", keys={"residuum": key})


def test_a_tied_head_that_was_stored_must_agree_with_its_table(plain: Plain, preset: str) -> None:
    if not plain.config["tie_word_embeddings"]:
        return
    table = next(t for name, t in plain.state.items() if "embed_tokens" in name or "wte" in name)
    stored = plain.state | {"lm_head.weight": table.clone()}
    expected = plain.protect(preset)
    _, server, enclave = protect_state(plain.config, stored, preset, ROOT, accept_tied_head=True)
    assert all(torch.equal(tensor, (server | enclave)[n]) for n, tensor in (expected.server | expected.enclave).items())
    stored["lm_head.weight"][3, 1] += 1
    with pytest.raises(CheckpointInvalid, match=r"lm_head\.weight.*tied"):
        protect_state(plain.config, stored, preset, ROOT, accept_tied_head=True)


def test_values_that_are_not_finite_are_refused(plain: Plain, preset: str) -> None:
    for value in (float("nan"), float("inf")):
        name = first(plain, "mlp.c_proj.weight" if plain.config["model_type"] == "gpt2" else "mlp.down_proj.weight")
        poisoned = {n: t.clone() for n, t in plain.state.items()}
        poisoned[name][0, 0] = value
        with pytest.raises(CheckpointInvalid, match="not finite"):
            protect_state(plain.config, poisoned, preset, ROOT, accept_tied_head=True)


def test_values_that_no_longer_fit_their_dtype_are_refused(plain: Plain) -> None:
    """A dense key can push a sum of large float16 values over 65504."""
    state = {name: torch.full_like(tensor, 60_000).half() for name, tensor in plain.state.items()}
    with pytest.raises(CheckpointInvalid, match="fit F16"):
        protect_state(plain.config, state, "hardened", ROOT)


def test_checkpoints_of_the_base_class_lack_the_prefix(plain: Plain, preset: str) -> None:
    prefix = {"llama": "model.", "gpt2": "transformer."}[plain.config["model_type"]]
    bare = {name.removeprefix(prefix): tensor for name, tensor in plain.state.items()}
    expected = plain.protect(preset)
    _, server, enclave = protect_state(plain.config, bare, preset, ROOT, accept_tied_head=True)
    assert all(torch.equal(tensor, server[name]) for name, tensor in expected.server.items())
    assert all(torch.equal(tensor, enclave[name]) for name, tensor in expected.enclave.items())


def test_legacy_buffers_are_dropped(plain: Plain, preset: str) -> None:
    if plain.config["model_type"] == "gpt2":
        buffers = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4).bool()}
        buffers["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    else:
        buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    planned = plan(plain.config, headers_of(plain.state | buffers), preset, ROOT, accept_tied_head=True)
    assert planned.server == plain.protect(preset).plan.server
    source = StateSource(plain.state)
    for output in planned.server:
        planned.compute(output, source, slice(0, 1))
