"""A protected model computes what the plain one computes, for any shape of any family, under each preset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from tests.protect_core.families import CONFIGS
from tests.protect_core.fixed import FIXED
from tests.protect_core.models import Float64Throughout, Models, Plain, Protected, unkeyed

ROOTS = st.binary(min_size=32, max_size=32)
ANY_SHAPE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def assert_same_logits(plain: Plain, protected: Protected, tolerance: float) -> None:
    """At every position of a random prompt: logits within `tolerance` of their size, and the same best id."""
    ids = plain.ids()
    expected, got = plain.logits(ids), protected.logits(ids)
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < tolerance, protected.plan.preset
    clear = expected.topk(2).values.diff().abs().squeeze(-1) > 2 * tolerance * expected.abs().max()
    assert (got.argmax(-1) == expected.argmax(-1))[clear].all()


@pytest.mark.parametrize("family", CONFIGS)
@settings(ANY_SHAPE, max_examples=20)
@given(data=st.data(), root=ROOTS, seed=st.integers(0, 1 << 30))
def test_float64_logits_are_identical(models: Models, family: str, data: st.DataObject, root: bytes, seed: int) -> None:
    """Whether the configuration states all fields, or leaves some to the defaults of the class."""
    config = data.draw(CONFIGS[family])
    plain = models.make(config, seed=seed)
    stated = data.draw(st.sampled_from([config, plain.config]))
    for preset in plain.presets:
        protected = type(plain)(stated, plain.model, plain.state).protect(preset, root)
        assert_same_logits(plain, protected, 1e-9)


@pytest.mark.parametrize("family", CONFIGS)
@settings(ANY_SHAPE, max_examples=4)
@given(data=st.data(), root=ROOTS)
def test_float32_logits_are_close(models: Models, family: str, data: st.DataObject, root: bytes) -> None:
    plain = models.make(data.draw(CONFIGS[family]), dtype=torch.float32)
    for preset in plain.presets:
        assert_same_logits(plain, plain.protect(preset, root), 2e-3)


def greedy(model: Plain | Protected, ids: torch.Tensor, count: int = 12) -> torch.Tensor:
    """`ids` and what the model continues them with, one id at a time, everything computed anew for each."""
    for _ in range(count):
        ids = torch.cat([ids, model.logits(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def test_float64_greedy_continuations_are_identical(plain: Plain) -> None:
    ids = plain.ids(rows=3)
    expected = greedy(plain, ids)
    for preset in plain.presets:
        assert torch.equal(greedy(plain.protect(preset), ids), expected)


@pytest.mark.parametrize("name", FIXED)
def test_float32_greedy_continuations_differ_at_ties_only(models: Models, name: str) -> None:
    """Where a continuation leaves the plain one, the plain model's best two were closer than what float32 resolves;
    given the plain one's ids, every other id agrees.

    The bound is twice the largest difference of any logit, which itself stays in the size of float32's rounding.
    """
    plain = models.fixed(name, torch.float32)
    ids = plain.ids(rows=4)
    expected = greedy(plain, ids)
    forced = plain.logits(expected)[:, ids.shape[1] - 1 : -1]
    gaps = forced.topk(2).values.diff().abs().squeeze(-1)
    for preset in plain.presets:
        protected = plain.protect(preset)
        got = protected.logits(expected)[:, ids.shape[1] - 1 : -1]
        bound = float((got - forced).abs().max())
        assert bound < 1e-4 * float(forced.abs().max())
        assert (got.argmax(-1) == expected[:, ids.shape[1] :])[gaps > 2 * bound].all()
        differs = (greedy(protected, ids) != expected)[:, ids.shape[1] :]
        for row in differs.any(1).nonzero().flatten():
            assert gaps[row, int(differs[row].int().argmax())] <= 2 * bound


@pytest.mark.parametrize("name", [name for name in FIXED if not name.startswith(("gpt2", "opt"))])
def test_the_server_decodes_alone_over_permuted_ids(models: Models, name: str) -> None:
    """`generate` of the unmodified class on the server part, with its cache, gives the plain model's ids."""
    plain = models.fixed(name)
    if "throughput" not in plain.presets:
        plain = models.make(FIXED[name] | {"tie_word_embeddings": False})
    protected = plain.protect("throughput")
    order = torch.tensor(protected.plan.keys["vocabulary"].inverse.index)  # type: ignore[union-attr]
    true = torch.tensor(protected.plan.keys["vocabulary"].index)  # type: ignore[union-attr]
    assert not protected.enclave
    ids = plain.ids(rows=3)
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(ids)
    with torch.no_grad(), Float64Throughout():
        expected = _generate(plain.model, ids, mask, settings)
        got = _generate(protected.model(), order[ids], mask, settings)
    assert torch.equal(true[got], expected)
    assert torch.equal(expected, greedy(plain, ids))


def _generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
    model.generation_config = settings
    out: torch.Tensor = model.generate(ids, attention_mask=mask, generation_config=settings)
    return out


def test_the_operator_alone_computes_nonsense(plain: Plain) -> None:
    """Without the keyed tables and the keyed head, plain rows into the server part give other logits."""
    for preset in ("paper", "hardened"):
        protected = plain.protect(preset)
        architecture = protected.plan.architecture
        stolen = plain.state[architecture.tables[0].tensor]
        ids = plain.ids(length=24)
        answer = protected.alone(stolen[ids] * architecture.tables[0].scale)
        head = plain.state.get(architecture.linear(architecture.head).weight.tensor, stolen)
        logits = answer.last_hidden_state @ head.T if preset == "hardened" else answer.logits
        expected = plain.logits(ids)
        # A model whose tied table outweighs its blocks repeats its prompt, and so does anything: there look closer.
        guessed = expected.argmax(-1) != ids
        assert (logits.argmax(-1) == expected.argmax(-1))[guessed].double().sum() <= 0.5 * guessed.sum()
        if protected.plan.logit_cap:
            logits = protected.plan.logit_cap * torch.tanh(logits / protected.plan.logit_cap)
        assert (logits - expected).abs().mean() > 0.1 * expected.std()


def test_every_tensor_is_keyed(plain: Plain) -> None:
    """Every tensor of the plain model is at an incidence, unless the preset folds it away."""
    for preset in plain.presets:
        plan = plain.protect(preset).plan
        architecture = plan.architecture
        keyed = {incidence.tensor for incidence in plan.incidences}
        norms = [norm for norm in architecture.norms if norm.weight in plan.folded]
        left = {name for norm in norms for name in (norm.weight, norm.bias) if name} | unkeyed(plain, preset)
        assert keyed >= plan.stored.keys() - left


def test_every_space_has_a_key_that_is_not_the_identity(plain: Plain) -> None:
    for preset in plain.presets:
        keys = plain.protect(preset).plan.keys
        public = {"positions"} | ({"vocabulary"} if preset == "hardened" else set())
        public |= {name for name in keys if name.endswith(".shared_expert.gate")}
        public |= {name for name in keys if name.endswith("_gain")} if unkeyed(plain, preset) else set()
        faces = {name: [getattr(key, face, key) for face in ("wide", "narrow")] for name, key in keys.items()}
        found = {name for name, (wide, narrow) in faces.items() if wide.identity or narrow.identity}
        assert found == public & keys.keys()


def test_the_same_root_gives_the_same_parts_and_another_gives_others(plain: Plain) -> None:
    """All but the constants, and the bias of the head, which is in the enclave under no key (logits are true)."""
    for preset in plain.presets:
        one, two, other = plain.protect(preset), plain.protect(preset), plain.protect(preset, bytes(32))
        for name, tensor in (one.server | one.enclave).items():
            assert torch.equal(tensor, (two.server | two.enclave)[name])
            if tensor.unique().numel() > 1 and name not in {"head_bias"} | unkeyed(plain, preset):
                assert not torch.equal(tensor, (other.server | other.enclave)[name]), name
