"""A protected model computes what the plain one computes, for any shape of either family, under both presets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from .conftest import Models, Plain, Protected

ROOTS = st.binary(min_size=32, max_size=32)


def assert_same_logits(plain: Plain, protected: Protected, tolerance: float) -> None:
    """At every position of a random prompt: logits within `tolerance` of their size, and the same best id."""
    ids = plain.ids()
    expected, got = plain.logits(ids), protected.logits(ids)
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < tolerance
    best = expected.max(-1, keepdim=True)
    clear = expected.topk(2).values.diff().abs().squeeze(-1) > 2 * tolerance * expected.abs().max()
    assert (got.argmax(-1) == best.indices.squeeze(-1))[clear].all()


@pytest.mark.parametrize("preset", ["paper", "hardened"])
@pytest.mark.parametrize("family", ["llamas", "gpt2s"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), root=ROOTS, seed=st.integers(0, 1 << 30))
def test_float64_logits_are_identical(
    models: Models, family: str, preset: str, data: st.DataObject, root: bytes, seed: int
) -> None:
    plain = models.make(data.draw(getattr(models, family)()), seed=seed)
    assert_same_logits(plain, plain.protect(preset, root), 1e-9)


@pytest.mark.parametrize("preset", ["paper", "hardened"])
@pytest.mark.parametrize("family", ["llamas", "gpt2s"])
@settings(max_examples=10, deadline=None)
@given(data=st.data(), root=ROOTS)
def test_float32_logits_are_close(models: Models, family: str, preset: str, data: st.DataObject, root: bytes) -> None:
    plain = models.make(data.draw(getattr(models, family)()), dtype=torch.float32)
    assert_same_logits(plain, plain.protect(preset, root), 2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_continuations_are_identical(plain: Plain, models: Models, preset: str, dtype: torch.dtype) -> None:
    plain = models.make(plain.config, dtype=dtype)
    protected = plain.protect(preset)
    expected = got = plain.ids()
    for _ in range(12):
        expected = torch.cat([expected, plain.logits(expected)[:, -1:].argmax(-1)], dim=1)
        got = torch.cat([got, protected.logits(got)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_costs_no_more_than_it_costs_the_plain_model(
    plain: Plain, models: Models, preset: str, dtype: torch.dtype
) -> None:
    """The error against float64 over several prompts stays near that of the plain model in the same dtype."""
    rounded = models.make(plain.config, dtype=dtype)
    protected = rounded.protect(preset)
    errors = {"plain": 0.0, "protected": 0.0}
    for seed in range(6):
        ids = plain.ids(seed=seed)
        truth = plain.logits(ids)
        errors["plain"] += float((rounded.logits(ids).double() - truth).square().mean())
        errors["protected"] += float((protected.logits(ids).double() - truth).square().mean())
    assert errors["protected"] ** 0.5 < 1.5 * errors["plain"] ** 0.5


def test_the_operator_alone_computes_nonsense(plain: Plain, preset: str) -> None:
    """Without the keyed tables and the keyed head, plain rows into the server part give other logits."""
    protected = plain.protect(preset)
    names = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
    stolen = plain.state[names[protected.plan.family]]
    ids = plain.ids(length=24)
    with torch.no_grad():
        answer = protected.model()(inputs_embeds=stolen[ids])
    head = plain.state.get("lm_head.weight", stolen)
    logits = answer.last_hidden_state @ head.T if preset == "hardened" else answer.logits
    assert (logits.argmax(-1) == plain.logits(ids).argmax(-1)).double().mean() < 0.5


def test_leaving_out_a_key_anywhere_breaks_the_model(plain: Plain, preset: str) -> None:
    """The identity in place of the key at one (tensor, space) incidence shows, for each incidence.

    One incidence cannot show: without rotary positions a bias on keys adds the same to every score of a query,
    and softmax does not see it. There the logits must stay.
    """
    ids = plain.ids(length=10)
    expected = plain.logits(ids)
    incidences = plain.protect(preset).plan.incidences
    assert len(incidences) == len(set(incidences))
    for incidence in incidences:
        error = (plain.protect(preset, mutate=incidence).logits(ids) - expected).abs().max() / expected.std()
        if incidence.tensor.endswith("c_attn.bias") and incidence.part.endswith(".k"):
            assert error < 1e-9
        else:
            assert error > 1e-3, incidence


def test_every_tensor_is_keyed(plain: Plain, preset: str) -> None:
    """Every tensor of the plain model is at an incidence, unless the preset folds it away."""
    protected = plain.protect(preset)
    keyed = {incidence.tensor for incidence in protected.plan.incidences}
    norms = {name for name in plain.state if "norm" in name or ".ln_" in name}
    assert keyed >= plain.state.keys() - (norms if preset == "hardened" else set())


def test_every_space_has_a_key_that_is_not_the_identity(plain: Plain, preset: str) -> None:
    keys = plain.protect(preset).plan.keys
    public = {"positions"} | ({"vocabulary"} if preset == "hardened" else set())
    faces = {name: [getattr(key, face, key) for face in ("wide", "narrow")] for name, key in keys.items()}
    assert {name for name, (wide, narrow) in faces.items() if wide.identity or narrow.identity} == public & keys.keys()


def test_the_same_root_gives_the_same_parts_and_another_gives_others(plain: Plain, preset: str) -> None:
    """All but the constants, and the bias of the head, which is in the enclave under no key (logits are true)."""
    one, two, other = plain.protect(preset), plain.protect(preset), plain.protect(preset, bytes(32))
    for name, tensor in (one.server | one.enclave).items():
        assert torch.equal(tensor, (two.server | two.enclave)[name])
        if tensor.unique().numel() > 1 and name != "head_bias":
            assert not torch.equal(tensor, (other.server | other.enclave)[name]), name
