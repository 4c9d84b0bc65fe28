"""What the two parts hold: standard checkpoints, no plain values, no names, every bit accounted for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

from stip_keyservice.protect.architecture import After
from stip_keyservice.protect.families import expand
from stip_keyservice.protect.folding import TORCH_DTYPE
from stip_keyservice.protect.state_dict import StateSource
from stip_protocol.keys import VOCABULARY_LABEL, Orthogonal, Permutation, derive, vocabulary_key
from tests.protect_core.fixed import FIXED
from tests.protect_core.models import Models, Plain, Protected, in_memory, unkeyed

ROOT = bytes(range(32))
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def write(protected: Protected, folder: Path) -> Path:
    """The server part on disk, as a model server reads it."""
    save_file(protected.server, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(protected.plan.config))
    (folder / "generation_config.json").write_text(json.dumps(protected.plan.generation_config))
    return folder


def keyed(plain: Plain, protected: Protected) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, tensor, the plain tensor it is computed from) for all of the server part that is no constant."""
    for output in protected.plan.server:
        if sources := protected.plan.sources(output):
            yield output.name, protected.server[output.name], plain.state[sources[0]]


def table(plain: Plain, number: int = 0) -> torch.Tensor:
    """The plain embedding, or a later table."""
    return plain.state[expand(plain.config).tables[number].tensor]


def test_the_server_part_loads_in_the_unmodified_class(plain: Plain, preset: str, tmp_path: Path) -> None:
    protected = plain.protect(preset)
    folder = write(protected, tmp_path)
    loaded = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        kind = AutoModel if preset == "hardened" else AutoModelForCausalLM
        model, report = kind.from_pretrained(folder, output_loading_info=True, experts_implementation="eager")
        assert not any(report[finding] for finding in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.dtype == torch.float64
        assert type(model).__name__ == protected.plan.config["architectures"][0]
        loaded.append(model.state_dict())
    assert loaded[0].keys() == loaded[1].keys()
    assert all(torch.equal(tensor, loaded[1][name]) for name, tensor in loaded[0].items())
    expected = in_memory(model, protected.plan.architecture, protected.server)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded[0].items())


def test_nothing_in_the_server_part_equals_its_source(plain: Plain, preset: str) -> None:
    """Nor what the source has under its name. Gemma 3's γ of heads is the exception that `unkeyed` explains."""
    for name, tensor, source in keyed(plain, plain.protect(preset)):
        if name in unkeyed(plain, preset):
            continue
        assert tensor.shape == source.shape
        assert not torch.equal(tensor, source), name
        namesake = plain.state.get(name)
        assert namesake is None or not torch.equal(tensor, namesake), name


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
    assert table(plain).mean(-1).abs().max() > 0.1


def test_no_row_of_the_plain_embedding_is_in_either_part(plain: Plain, preset: str) -> None:
    protected = plain.protect(preset)
    scale = protected.plan.architecture.tables[0].scale
    for name, tensor in (protected.server | protected.enclave).items():
        if tensor.ndim == 2 and tensor.shape[1] == table(plain).shape[1]:
            assert torch.cdist(tensor, table(plain)).min() > 1e-6, name
            assert torch.cdist(tensor, scale * table(plain)).min() > 1e-6, name


def test_tables_of_the_server_part_are_zeros_unless_it_decodes_alone(plain: Plain, preset: str) -> None:
    protected = plain.protect(preset)
    plan, architecture = protected.plan, protected.plan.architecture
    prefix = architecture.prefix if preset == "hardened" else ""
    tables = {tensor.name: protected.server[tensor.tensor.removeprefix(prefix)] for tensor in architecture.tables}
    assert tables.keys() >= {"embedding"}
    assert all(bool(tensor.any()) == (preset == "throughput") for tensor in tables.values())
    assert tables["embedding"].shape[0] == (1 if preset == "hardened" else plan.vocabulary)
    assert plan.config["vocab_size"] == tables["embedding"].shape[0]


def test_norms_are_folded_where_a_dense_key_leaves_no_other_way(plain: Plain, preset: str) -> None:
    """What is left of a folded one: γ = 1 as it is stored, and β = 0, or a power of two where no bias takes it up."""
    protected = plain.protect(preset)
    architecture = protected.plan.architecture
    prefix = architecture.prefix if preset == "hardened" else ""
    for norm in architecture.norms:
        weight = protected.server[norm.weight.removeprefix(prefix)]
        dense = isinstance(protected.plan.keys[norm.space], Orthogonal)
        assert dense <= (preset != "paper" and not norm.scales)
        folded = dense and norm.gain is None
        assert bool((weight == norm.unit).all()) == folded, norm
        if norm.bias:
            bias = protected.server[norm.bias.removeprefix(prefix)]
            assert bool((bias == bias[0]).all()) == folded
            assert not folded or float(bias[0]) in (0.0, 0.5, 0.25)


def test_the_enclave_part_holds_what_the_preset_says(plain: Plain, preset: str) -> None:
    protected = plain.protect(preset)
    tables = {table.name for table in protected.plan.architecture.tables}
    learned = plain.config["model_type"] in ("gpt2", "opt")
    shifted = protected.plan.architecture.linear("head").norm is not None
    layer_norm = learned or plain.config["model_type"] == "gpt_neox"
    head = {"head"} | ({"head_bias"} if shifted and layer_norm else set())
    assert tables == {"embedding"} | ({"positions"} if learned else set())
    expected = {"paper": tables, "hardened": tables | head, "throughput": set()}
    assert protected.enclave.keys() == expected[preset]
    assert protected.plan.output == {"paper": "top", "hardened": "hidden", "throughput": "ids"}[preset]


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
@pytest.mark.parametrize("name", FIXED)
def test_paper_moves_values_and_flips_signs_of_rotary_pairs_only(models: Models, name: str, dtype: torch.dtype) -> None:
    """Bit for bit, each tensor holds the values of its source; queries and keys under rotary positions, and the γ
    of query and key heads, up to their sign. The enclave's rows are moved too, after Gemma's factor."""
    plain = models.fixed(name, dtype)
    protected = plain.protect("paper")
    architecture = protected.plan.architecture
    signed = {linear.weight.tensor for linear in architecture.linears if linear.after is After.ROTARY}
    signed |= {linear.bias.tensor for linear in architecture.linears if linear.after is After.ROTARY and linear.bias}
    signed |= {norm.weight for norm in architecture.norms if norm.gain}
    moved = list(keyed(plain, protected))
    assert moved
    for output, tensor, source in moved:
        pair = (tensor.abs(), source.abs()) if output in signed else (tensor, source)
        bits = [t.contiguous().view(BITS[dtype]).flatten().sort().values for t in pair]
        assert torch.equal(*bits), output
    for number, described in enumerate(architecture.tables):
        scale = torch.tensor(described.scale, dtype=torch.float32).to(dtype)
        expected = table(plain, number)[described.start :] * scale
        assert torch.equal(protected.enclave[described.name].sort(1).values, expected.sort(1).values)


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
    "mixtral": "f62fe96febafc1a824f2e415b38a429450c7ed8e13bc0e6d529897b183f81915",
    "gpt_neox": "8ccf375e0de7fd03495af18ff427fbb75d29fe602f5c19eb6638d6dbd4f0d996",
}


@pytest.mark.parametrize("family", GOLDEN)
def test_a_root_secret_and_a_checkpoint_determine_the_paper_parts_bit_for_bit(models: Models, family: str) -> None:
    """On any machine and in any version: an instance can be protected again from its root secret."""
    configurations = {
        "llama": {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "attention_bias": True},
        "gpt2": {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 5},
        "mixtral": {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 5},
        "gpt_neox": {"vocab_size": 11, "hidden_size": 24, "intermediate_size": 6, "num_hidden_layers": 1}
        | {"num_attention_heads": 3, "rotary_pct": 0.5},
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
