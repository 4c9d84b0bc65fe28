"""What cannot be protected is refused by name, before a weight is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from stip_keyservice.protect.families import expand
from stip_keyservice.protect.matching import TensorHeader
from stip_keyservice.protect.plan import plan
from stip_keyservice.protect.state_dict import headers_of, protect_state
from stip_protocol.errors import (
    ArchitectureUnsupported,
    CheckpointInvalid,
    ConfigurationError,
    PresetRefused,
    StipError,
    Unrepresentable,
)
from tests.protect_core.fixed import FIXED
from tests.protect_core.models import ACCEPTED, ROOT, Models, Plain


def refuse(plain: Plain, error: type[StipError], match: str, *, preset: str = "hardened", **changes: Any) -> None:
    """`plan` raises `error` for the plain model's configuration and headers with `changes`."""
    headers = headers_of(plain.state) | changes.pop("headers", {})
    headers = {name: header for name, header in headers.items() if header is not None}
    with pytest.raises(error, match=match):
        plan(plain.config | changes, headers, preset, ROOT, **ACCEPTED)


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
    name = next(name for name, tensor in plain.state.items() if tensor.ndim == 1)
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
        ("qwen3", {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("gemma3 untied", {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary"),
        ("gemma3 untied", {"rope_parameters": {"global": {"rope_theta": 1.0}}}, "global"),
        ("gemma3 untied", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ("phi3", {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "3 rotary dimensions"),
        ("gpt_neox", {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.4}}, "3 rotary dimensions"),
        ("gpt_neox", {"num_attention_heads": 5}, "num_attention_heads must divide"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("opt", {"num_attention_heads": 5}, "num_attention_heads must divide"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("qwen2_moe", {"num_experts": -1}, "num_experts"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ("gpt2", {"n_embd": 25}, "n_head must divide n_embd"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "softmax"}, "activation_function"),
        ("gpt2", {"n_positions": -1}, "n_positions"),
        ("gpt2", {"vocab_size": None}, "vocab_size"),
    ],
)
def test_configurations_without_a_lossless_form_are_refused(
    models: Models, family: str, changes: dict[str, Any], match: str
) -> None:
    refuse(models.fixed(family), CheckpointInvalid, match, **changes)


def test_an_opt_that_projects_its_embedding_is_refused(models: Models) -> None:
    refuse(models.fixed("opt"), ArchitectureUnsupported, "word_embed_proj_dim: got 12", word_embed_proj_dim=12)


def test_layers_that_differ_by_configuration_are_refused(plain: Plain) -> None:
    """transformers can replace any field layer by layer, and leave parts of a layer out."""
    refuse(plain, ArchitectureUnsupported, "per_layer_config", per_layer_config={"0": {"skip": ["mlp"]}})


def test_a_shift_that_nothing_can_take_up_is_refused() -> None:
    """A matrix stored [in, out] that has no bias: its W·β has no place under a dense key. `paper` does not fold."""
    architecture = expand(FIXED["gpt2"])
    linears = tuple(
        replace(linear, bias=None) if linear.name == "layers.0.up" else linear for linear in architecture.linears
    )
    tensors = {name: shape for name, shape in architecture.tensors.items() if name != "transformer.h.0.mlp.c_fc.bias"}
    bare = replace(architecture, linears=linears, tensors=tensors)
    headers = {name: TensorHeader(name, "F32", shape) for name, shape in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stip_keyservice.protect.plan.expand", lambda _: bare)
        with pytest.raises(Unrepresentable, match=r"bias of layers\.0\.up: got none, .*or the preset paper"):
            plan(FIXED["gpt2"], headers, "hardened", ROOT)
        assert plan(FIXED["gpt2"], headers, "paper", ROOT, **ACCEPTED).preset == "paper"


def test_throughput_is_refused_unless_its_token_cipher_is_accepted(models: Models) -> None:
    plain = models.fixed("mistral")
    headers = headers_of(plain.state)
    with pytest.raises(PresetRefused, match=r"substitution cipher.*hardened, or accept_token_cipher"):
        plan(plain.config, headers, "throughput", ROOT)
    assert plan(plain.config, headers, "throughput", ROOT, accept_token_cipher=True).output == "ids"


@pytest.mark.parametrize("name", ["gpt2", "gpt2 untied", "opt", "opt without the last norm, untied"])
def test_throughput_is_refused_where_positions_are_learned(models: Models, name: str) -> None:
    refuse(models.fixed(name), PresetRefused, "learned positions.*hardened and paper", preset="throughput")


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral", "qwen3_moe"])
def test_throughput_is_refused_where_a_dense_key_meets_a_tied_head(models: Models, name: str) -> None:
    """Whatever is accepted."""
    plain = models.make(FIXED[name] | {"tie_word_embeddings": True})
    refuse(plain, PresetRefused, "tied head gives a dense key away.*the preset hardened", preset="throughput")


@pytest.mark.parametrize("preset", ["paper", "throughput"])
def test_a_tied_head_on_the_server_must_be_accepted(models: Models, preset: str) -> None:
    """Gemma 2's key of the residual is no dense one, so that `throughput` leaves the choice."""
    plain = models.fixed("gemma2")
    with pytest.raises(PresetRefused, match=r"tied head.*hardened, or accept_tied_head"):
        plan(plain.config, headers_of(plain.state), preset, ROOT, accept_token_cipher=True)
    assert plan(plain.config, headers_of(plain.state), preset, ROOT, **ACCEPTED).preset == preset


def test_paper_refuses_a_tied_head_unless_told(plain: Plain) -> None:
    if plain.config["tie_word_embeddings"]:
        with pytest.raises(PresetRefused, match="accept_tied_head"):
            plan(plain.config, headers_of(plain.state), "paper", ROOT)
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
    ((head, table),) = expand(plain.config).tied.items()
    stored = plain.state | {head: plain.state[table].clone()}
    expected = plain.protect(preset)
    _, server, enclave = protect_state(plain.config, stored, preset, ROOT, **ACCEPTED)
    assert all(torch.equal(tensor, (server | enclave)[n]) for n, tensor in (expected.server | expected.enclave).items())
    stored[head][3, 1] += 1
    with pytest.raises(CheckpointInvalid, match=rf"{head}.*tied"):
        protect_state(plain.config, stored, preset, ROOT, **ACCEPTED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_in_every_dtype(
    models: Models, value: float, dtype: torch.dtype
) -> None:
    """Also where they would only be moved, in a row that no prompt asks for."""
    plain = models.fixed("llama", dtype)
    state = {name: tensor.clone() for name, tensor in plain.state.items()}
    state["model.embed_tokens.weight"][3, 1] = value
    for preset in ("paper", "hardened"):
        with pytest.raises(CheckpointInvalid, match="not finite"):
            protect_state(plain.config, state, preset, ROOT, **ACCEPTED)


def test_values_that_no_longer_fit_their_dtype_are_refused(plain: Plain) -> None:
    """A dense key can push a sum of large float16 values over 65504."""
    state = {name: torch.full_like(tensor, 60_000).half() for name, tensor in plain.state.items()}
    with pytest.raises(CheckpointInvalid, match="fit F16"):
        protect_state(plain.config, state, "hardened", ROOT)
