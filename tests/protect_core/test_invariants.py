"""What keys leave as it is, shown by recovering it: docs/security.md admits each of these, and no more is claimed."""

from __future__ import annotations

import pytest
import torch

from stip_protocol.keys import Orthogonal, Permutation
from tests.protect_core.fixed import FIXED
from tests.protect_core.models import Models, Plain, Protected


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Up to the rounding of float64."""
    return torch.allclose(left, right, rtol=1e-9, atol=1e-12)


def values(tensor: torch.Tensor) -> torch.Tensor:
    """The multiset of a tensor's values."""
    return tensor.flatten().sort().values


def qk_norms(plain: Plain, protected: Protected) -> list[torch.Tensor]:
    """γ of queries and of keys: in the source, then on the server."""
    names = [f"layers.0.self_attn.{side}_norm.weight" for side in "qk"]
    unit = 1.0 if plain.config["model_type"].startswith("gemma") else 0.0
    stored = [plain.state[f"model.{name}"] for name in names]
    return [gamma + unit for gamma in stored + [protected.server[name] for name in names]]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gemma3 untied"])
def test_the_products_of_query_and_key_norms_stay(name: str) -> None:
    """Item 7: "for every dimension of a head, the product of the two norms' weights"."""
    plain = Models.fixed(name)
    queries, keys, keyed_queries, keyed_keys = qk_norms(plain, plain.protect("hardened"))
    assert equal(keyed_queries * keyed_keys, queries * keys)
    assert not equal(keyed_queries, queries)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gemma3 untied"])
def test_the_ratio_of_a_rotary_pairs_norm_weights_stays(name: str) -> None:
    """Item 7: "and the ratio of a rotary pair's"."""
    plain = Models.fixed(name)
    queries, keys, keyed_queries, keyed_keys = qk_norms(plain, plain.protect("hardened"))
    for source, keyed in ((queries, keyed_queries), (keys, keyed_keys)):
        first, second = source.chunk(2)
        keyed_first, keyed_second = keyed.chunk(2)
        assert equal(keyed_first / keyed_second, first / second)
        assert not equal(keyed_first, first)


def test_row_sums_of_an_absorbing_head_and_the_public_weights_give_the_vocabulary_permutation() -> None:
    """Item 7: "W·β as row sums, which with known W and β gives the vocabulary permutation without any traffic"."""
    plain = Models.fixed("gpt_neox")
    keyed = plain.protect("throughput")
    level = keyed.server["gpt_neox.final_layer_norm.bias"][0]
    absorbed = keyed.server["embed_out.weight"].sum(1) * level
    public = plain.state["embed_out.weight"] @ plain.state["gpt_neox.final_layer_norm.bias"]
    places = (public[:, None] - absorbed[None, :]).abs().argmin(1)
    key = keyed.plan.keys["vocabulary"]
    assert isinstance(key, Permutation)
    assert places.tolist() == list(key.inverse.index)


def test_row_sums_of_an_absorbing_matrix_give_w_beta() -> None:
    """Item 7: "(GPT-NeoX under `throughput`, models without biases)"."""
    plain = Models.fixed("gpt_neox one after another, without biases")
    keyed = plain.protect("hardened")
    layer = "layers.0.attention.query_key_value.weight"
    absorbed = keyed.server[layer].sum(1) * keyed.server["layers.0.input_layernorm.bias"][0]
    shifted = plain.state[f"gpt_neox.{layer}"] @ plain.state["gpt_neox.layers.0.input_layernorm.bias"]
    heads, width = 3, 8
    values_of_head = [slice(width * (3 * head + 2), width * (3 * head + 3)) for head in range(heads)]
    lengths = [torch.stack([rows[part].norm() for part in values_of_head]) for rows in (absorbed, shifted)]
    assert equal(values(lengths[0]), values(lengths[1]))  # the values' own key turns each head's part, and heads move


@pytest.mark.parametrize("preset", ["hardened", "throughput"])
def test_the_length_of_a_shared_experts_gate_stays(preset: str) -> None:
    """Item 7: "the length of a shared expert's gate"."""
    plain = Models.fixed("qwen2_moe")
    gates = [name for name in plain.state if name.endswith("shared_expert_gate.weight")]
    assert gates
    server = plain.protect(preset).server
    for name in gates:
        folded = plain.state[name] * plain.state[name.replace("mlp.shared_expert_gate", "post_attention_layernorm")]
        keyed = server[name if preset == "throughput" else name.removeprefix("model.")]
        assert equal(keyed.norm(), folded.norm())
        assert not equal(values(keyed), values(folded))


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("llama", "paper"),
        ("gpt2", "paper"),
        ("gemma2", "hardened"),
        ("gemma3 untied", "throughput"),
        ("opt with norms behind", "hardened"),
    ],
)
def test_norm_weights_that_move_along_keep_their_values_as_a_set(name: str, preset: str) -> None:
    """Item 7: "a norm's weights wherever they move along with a key"."""
    plain = Models.fixed(name)
    keyed = plain.protect(preset)
    prefix = keyed.plan.architecture.prefix if keyed.plan.output == "hidden" else ""
    moved = [norm for norm in keyed.plan.architecture.norms if norm.gain is None]
    assert moved
    for norm in moved:
        source, server = plain.state[norm.weight], keyed.server[norm.weight.removeprefix(prefix)]
        assert equal(values(server), values(source))
        assert not equal(server, source)


def tied_llama() -> Plain:
    """More rows than dimensions, as every vocabulary has."""
    return Models().make(FIXED["llama"] | {"tie_word_embeddings": True, "vocab_size": 97})


def residual_key(keyed: Protected) -> torch.Tensor:
    key = keyed.plan.keys["residual"]
    assert isinstance(key, Orthogonal)
    return torch.tensor(key.matrix())


def test_both_tables_of_a_tied_model_give_the_residual_key_by_least_squares() -> None:
    """Presets against the known attacks, "tied table under a dense key (N)": whoever breaks one enclave of a tied
    model "has its residual key, up to signs and order"."""
    plain = tied_llama()
    keyed = plain.protect("hardened")
    embedding, head = keyed.enclave["embedding"], keyed.enclave["head"]
    found = torch.linalg.lstsq(embedding, head).solution  # K·Γ·Kᵀ
    gains, axes = torch.linalg.eigh((found + found.T) / 2)
    key = residual_key(keyed)
    met = (axes.T @ key).abs()
    assert (met.max(0).values > 1 - 1e-6).all()
    assert met.argmax(0).unique().numel() == len(key)
    rows = embedding @ axes  # the plain embedding, columns in another order, some turned round
    plain_rows = plain.state["model.embed_tokens.weight"]
    assert torch.allclose(rows.abs()[:, met.argmax(0)], plain_rows.abs(), atol=1e-6)
    assert equal(gains, values(plain.state["model.norm.weight"]))


def test_a_public_norm_gives_the_order_of_that_keys_axes_too() -> None:
    """The same row: "or all of it if the norm is public", but for signs, which the rows of the public table give."""
    plain = tied_llama()
    keyed = plain.protect("hardened")
    embedding, head = keyed.enclave["embedding"], keyed.enclave["head"]
    found = torch.linalg.lstsq(embedding, head).solution
    _, axes = torch.linalg.eigh((found + found.T) / 2)
    guessed = torch.empty_like(axes)
    guessed[:, plain.state["model.norm.weight"].argsort()] = axes
    key = residual_key(keyed)
    assert torch.allclose(guessed.abs(), key.abs(), atol=1e-6)
