"""What the two parts hold: standard checkpoints, no plain values, no names, every bit accounted for."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

from stip_keyservice.protect.folding import TORCH_DTYPE
from stip_keyservice.protect.state_dict import StateSource
from stip_protocol.keys import VOCABULARY_LABEL, Permutation, derive, vocabulary_key

if TYPE_CHECKING:
    from .conftest import Models, Plain, Protected

ROOT = bytes(range(32))
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def write(protected: Protected, folder: Path) -> Path:
    """The server part on disk, as a model server reads it."""
    save_file(protected.server, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(protected.plan.config))
    (folder / "generation_config.json").write_text(json.dumps(protected.plan.generation_config))
    return folder


def source_name(plain: Plain, server_name: str) -> str:
    """The plain tensor that a tensor of the server part is computed from."""
    prefix = {"llama": "model.", "gpt2": "transformer."}[plain.config["model_type"]]
    names = (server_name, prefix + server_name, f"{prefix}{'embed_tokens' if prefix == 'model.' else 'wte'}.weight")
    return next(name for name in names if name in plain.state)


def test_the_server_part_loads_in_the_unmodified_class(plain: Plain, preset: str, tmp_path: Path) -> None:
    protected = plain.protect(preset)
    folder = write(protected, tmp_path)
    loaded = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        kind = AutoModelForCausalLM if preset == "paper" else AutoModel
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(report[finding] for finding in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.dtype == torch.float64
        assert type(model).__name__ == protected.plan.config["architectures"][0]
        loaded.append(model.state_dict())
    assert loaded[0].keys() == loaded[1].keys()
    assert all(torch.equal(tensor, loaded[1][name]) for name, tensor in loaded[0].items())


def test_nothing_in_the_server_part_equals_its_source(plain: Plain, preset: str) -> None:
    for name, tensor in plain.protect(preset).server.items():
        if tensor.unique().numel() == 1:
            continue
        source = plain.state[source_name(plain, name)]
        assert tensor.shape == source.shape
        assert not torch.equal(tensor, source), name


def test_hardened_shows_no_mean_of_what_layer_norms_read(models: Models, fixed: dict[str, dict[str, Any]]) -> None:
    """Means along the residual need no key to be read: of rows, of what writes it, of what reads it."""
    plain = models.make(fixed["gpt2"])
    protected = plain.protect("hardened")
    server, enclave = protected.server, protected.enclave
    written = [enclave["embedding"], enclave["positions"], server["h.0.attn.c_proj.weight"]]
    written += [server["h.1.mlp.c_proj.weight"], server["h.0.mlp.c_proj.bias"]]
    read = [server["h.0.attn.c_attn.weight"].T, server["h.1.mlp.c_fc.weight"].T, enclave["head"]]
    for tensor in (*written, *read):
        assert tensor.mean(-1).abs().max() < 1e-13
    assert plain.state["transformer.wte.weight"].mean(-1).abs().max() > 0.1


def test_no_row_of_the_plain_embedding_is_in_either_part(plain: Plain, preset: str) -> None:
    protected = plain.protect(preset)
    table = plain.state[source_name(plain, "embedding")]
    for name, tensor in (protected.server | protected.enclave).items():
        if tensor.ndim == 2 and tensor.shape[1] == table.shape[1]:
            assert torch.cdist(tensor, table).min() > 1e-6, name


def test_embeddings_and_positions_of_the_server_part_are_zeros(plain: Plain, preset: str) -> None:
    protected = plain.protect(preset)
    tables = {
        name: tensor
        for name, tensor in protected.server.items()
        if any(t in name for t in ("embed_tokens", "wte", "wpe"))
    }
    assert tables
    assert not any(tensor.any() for tensor in tables.values())
    vocabulary = plain.config["vocab_size"] if preset == "paper" else 1
    assert {tensor.shape[0] for name, tensor in tables.items() if "wpe" not in name} == {vocabulary}


def test_norms_are_folded_by_hardened_only(plain: Plain, preset: str) -> None:
    norms = {name: t for name, t in plain.protect(preset).server.items() if "norm" in name or "ln_" in name}
    assert norms
    for name, tensor in norms.items():
        constant = torch.equal(tensor, torch.zeros_like(tensor) if name.endswith("bias") else torch.ones_like(tensor))
        assert constant == (preset == "hardened")


def test_the_enclave_part_holds_what_the_preset_says(plain: Plain, preset: str) -> None:
    protected = plain.protect(preset)
    learned = {"positions"} if plain.config["model_type"] == "gpt2" else set()
    head = {"head"} | ({"head_bias"} if learned else set())
    assert protected.enclave.keys() == {"embedding"} | learned | (head if preset == "hardened" else set())
    assert protected.plan.output == ("hidden" if preset == "hardened" else "top")


def test_the_configuration_names_nothing(models: Models, plain: Plain, preset: str) -> None:
    planted = {
        "_name_or_path": "SENTINEL",
        "tokenizer_class": "SENTINEL",
        "task_specific_params": {"SENTINEL": 1},
        "bos_token_id": 11,
        "eos_token_id": [12, 13],
        "pad_token_id": 14,
        "id2label": {0: "SENTINEL"},
    }
    plan = models.make(plain.config).__class__(plain.config | planted, plain.model, plain.state).protect(preset).plan
    assert "SENTINEL" not in json.dumps([plan.config, plan.generation_config])
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert all(plan.config[name] is None and plan.generation_config[name] is None for name in ids)
    assert plan.config["tie_word_embeddings"] is False


def test_the_plan_states_sizes_as_the_manifest_does(plain: Plain, preset: str) -> None:
    plan = plain.protect(preset).plan
    width = plain.config.get("hidden_size") or plain.config["n_embd"]
    positions = plain.config.get("max_position_embeddings") or plain.config["n_positions"]
    stated = (plan.preset, plan.dtype, plan.residual_width, plan.vocabulary, plan.max_positions)
    assert stated == (preset, "float64", width, plain.config["vocab_size"], positions)


def test_the_vocabulary_key_expands_from_its_seed_alone(plain: Plain) -> None:
    key = plain.protect("paper").plan.keys["vocabulary"]
    assert isinstance(key, Permutation)
    assert (key.index == vocabulary_key(derive(ROOT, VOCABULARY_LABEL), key.size).index).all()


@pytest.mark.parametrize("dtype", BITS)
def test_paper_moves_values_and_flips_signs_of_rotary_pairs_only(
    plain: Plain, models: Models, dtype: torch.dtype
) -> None:
    """Bit for bit, each tensor holds the values of its source; queries and keys under RoPE up to their sign."""
    plain = models.make(plain.config, dtype=dtype)
    protected = plain.protect("paper")
    moved = {name: tensor for name, tensor in protected.server.items() if tensor.unique().numel() > 1}
    assert moved
    for name, tensor in moved.items():
        source = plain.state[source_name(plain, name)]
        if "q_proj" in name or "k_proj" in name:
            tensor, source = tensor.abs(), source.abs()
        bits = [t.contiguous().view(BITS[dtype]).flatten().sort().values for t in (tensor, source)]
        assert torch.equal(*bits), name
    for name, source in (("embedding", "embedding"), ("positions", "wpe.weight")):
        if name in protected.enclave:
            expected = plain.state[source_name(plain, source)]
            assert torch.equal(protected.enclave[name].sort(1).values, expected.sort(1).values)


def test_row_blocks_of_any_size_give_the_same_tensors(plain: Plain, preset: str) -> None:
    protected = plain.protect(preset)
    plan, source = protected.plan, StateSource(plain.state)
    for output in (*plan.server, *plan.enclave):
        whole = (protected.server | protected.enclave)[output.name]
        assert tuple(whole.shape) == output.shape
        assert whole.dtype == TORCH_DTYPE[output.dtype]
        for size in (1, 5, 7):
            starts = range(0, output.shape[0], size)
            blocks = [plan.compute(output, source, slice(s, min(s + size, output.shape[0]))) for s in starts]
            assert torch.allclose(torch.cat(blocks), whole, atol=1e-12, rtol=0), output.name


@pytest.mark.parametrize("rows", [slice(3, 3), slice(0, 4, 2), slice(4, 1)])
def test_rows_that_are_not_a_block_are_refused(plain: Plain, rows: slice) -> None:
    plan = plain.protect("paper").plan
    with pytest.raises(ValueError, match="rows"):
        plan.compute(plan.server[0], StateSource(plain.state), rows)


def test_the_sources_of_an_output_are_what_it_reads(plain: Plain, preset: str) -> None:
    plan = plain.protect(preset).plan
    read: set[str] = set()
    for output in (*plan.server, *plan.enclave):
        needed = {name: plain.state[name] for name in plan.sources(output)}
        plan.compute(output, StateSource(needed), slice(0, output.shape[0]))
        read |= needed.keys()
    assert read == plain.state.keys()


def test_plans_show_no_keys(plain: Plain, preset: str) -> None:
    shown = repr(plain.protect(preset).plan)
    assert "keys" not in shown
    assert "Permutation" not in shown


GOLDEN = {
    "llama": "70cb1fe005bc19b3e9ef29a6044200f12c46933a361401bec6fafa5eaec26fc8",
    "gpt2": "84ef76a57de91b030ac3c1106600549bf149872774aad66a27bb87fe4ee177fc",
}


@pytest.mark.parametrize("family", GOLDEN)
def test_a_root_secret_and_a_checkpoint_determine_the_paper_parts_bit_for_bit(models: Models, family: str) -> None:
    """On any machine and in any version: an instance can be protected again from its root secret."""
    configurations = {
        "llama": {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "attention_bias": True},
        "gpt2": {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 5},
    }
    plain = models.make({"model_type": family, **configurations[family]}, dtype=torch.float32)
    for start, name in enumerate(sorted(plain.state)):
        shape = plain.state[name].shape
        plain.state[name] = 100.0 * start + torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    protected = plain.protect("paper", ROOT)
    digest = hashlib.sha256()
    for name, tensor in sorted((protected.server | protected.enclave).items()):
        digest.update(name.encode() + tensor.numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == GOLDEN[family]
