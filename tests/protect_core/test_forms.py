"""The forms in which one checkpoint can lie on disk: all give the same parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stip_keyservice.protect.families import expand
from stip_keyservice.protect.matching import TensorHeader
from stip_keyservice.protect.plan import plan
from stip_keyservice.protect.state_dict import StateSource, headers_of, protect_state
from stip_protocol.errors import CheckpointInvalid
from tests.protect_core.fixed import FIXED
from tests.protect_core.models import ACCEPTED, ROOT, Models, Plain

WITH_EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe"]


def assert_same_parts(plain: Plain, state: Mapping[str, torch.Tensor], preset: str, **changes: Any) -> None:
    """`state`, another form of the plain model's tensors, is protected to the same values: bit for bit where keys
    only move them, and else up to the order of summing, which depends on where tensors lie in memory."""
    expected = plain.protect(preset)
    planned, server, enclave = protect_state(plain.config | changes, state, preset, ROOT, **ACCEPTED)
    assert planned.server == expected.plan.server
    for name, tensor in (expected.server | expected.enclave).items():
        tolerance = 0.0 if preset == "paper" else 1e-12
        assert torch.allclose(tensor, (server | enclave)[name], rtol=0, atol=tolerance), name


def in_memory_form(plain: Plain) -> dict[str, torch.Tensor]:
    """What the class itself holds: experts in stacks, Mixtral's router and GPT-NeoX's head under other names."""
    state = {name: tensor.detach() for name, tensor in plain.model.state_dict().items()}
    if plain.config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    return state


def test_names_and_stacks_of_the_class_in_memory_give_the_same_parts(plain: Plain, preset: str) -> None:
    assert_same_parts(plain, in_memory_form(plain), preset)


def test_checkpoints_of_the_base_class_lack_the_prefix(plain: Plain, preset: str) -> None:
    prefix = expand(plain.config).prefix
    for state in (plain.state, in_memory_form(plain)):
        assert_same_parts(plain, {name.removeprefix(prefix): tensor for name, tensor in state.items()}, preset)


@pytest.mark.parametrize("name", FIXED)
def test_what_save_pretrained_writes_is_the_form_on_disk(models: Models, name: str, tmp_path: Path) -> None:
    """transformers writes one tensor an expert, under the names of the tables, and the configuration it reads."""
    plain = models.fixed(name)
    plain.model.save_pretrained(tmp_path)  # type: ignore[operator]
    written = load_file(tmp_path / "model.safetensors")
    tied = expand(plain.config).tied
    assert {name: tuple(tensor.shape) for name, tensor in written.items() if name not in tied} == {
        name: shape for name, shape in expand(plain.config).tensors.items() if name not in tied
    }
    for preset in plain.presets:
        assert_same_parts(plain, written, preset)


def test_legacy_buffers_are_dropped(plain: Plain, preset: str) -> None:
    dropped = expand(plain.config).dropped
    buffers = {name: torch.ones(1, 1, 4, 4).bool() for name in dropped}
    planned = plan(plain.config, headers_of(plain.state | buffers), preset, ROOT, **ACCEPTED)
    assert planned.server == plain.protect(preset).plan.server
    source = StateSource(plain.state)
    for output in planned.server:
        planned.compute(output, source, slice(0, 1))


def test_the_number_of_experts_has_two_names(models: Models) -> None:
    plain = models.fixed("qwen3_moe")
    count = plain.config["num_local_experts"] if "num_local_experts" in plain.config else plain.config["num_experts"]
    bare = {key: value for key, value in plain.config.items() if key not in ("num_experts", "num_local_experts")}
    for key in ("num_experts", "num_local_experts"):
        assert_same_parts(Plain(bare | {key: count}, plain.model, plain.state), plain.state, "paper")


def headers_with(plain: Plain, state: Mapping[str, torch.Tensor], changes: Mapping[str, Any]) -> dict[str, Any]:
    headers = headers_of(state) | dict(changes)
    return {name: header for name, header in headers.items() if header is not None}


def refused(plain: Plain, state: Mapping[str, torch.Tensor], match: str, **changes: Any) -> None:
    with pytest.raises(CheckpointInvalid, match=match):
        plan(plain.config, headers_with(plain, state, changes), "hardened", ROOT)


def stack(plain: Plain) -> str:
    return next(name for name in expand(plain.config).fused if name.endswith("experts.gate_up_proj"))


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_stack_of_another_shape_is_refused_by_name(models: Models, name: str) -> None:
    plain = models.fixed(name)
    state, fused = in_memory_form(plain), stack(plain)
    count, rows, width = state[fused].shape
    shapes = [(count - 1, rows, width), (count, rows + 1, width), (count, rows, width + 1), (count, width), (width,)]
    for shape in shapes:
        refused(plain, state, f"{fused} shape", **{fused: TensorHeader(fused, "F64", shape)})


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_stack_of_another_dtype_is_refused_by_name(models: Models, name: str) -> None:
    plain = models.fixed(name)
    state, fused = in_memory_form(plain), stack(plain)
    refused(plain, state, f"{fused} dtype", **{fused: TensorHeader(fused, "F32", tuple(state[fused].shape))})


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_missing_expert_is_refused_by_name(models: Models, name: str) -> None:
    """In either form: one tensor of one expert, or a whole stack."""
    plain = models.fixed(name)
    for member in expand(plain.config).experts[0].members[-1]:
        refused(plain, plain.state, member, **{member: None})
    without = in_memory_form(plain)
    del without[stack(plain)]
    refused(plain, without, "no such tensor")


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_an_expert_that_is_stored_twice_is_refused(models: Models, name: str) -> None:
    """Both the tensors of all experts and their stack; or a stack, and one expert beside it."""
    plain = models.fixed(name)
    fused, one = stack(plain), expand(plain.config).experts[0].members[0][0]
    refused(plain, plain.state | {fused: in_memory_form(plain)[fused]}, "stored twice")
    refused(plain, in_memory_form(plain) | {one: plain.state[one]}, "stored twice")


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_an_expert_too_many_is_refused(models: Models, name: str) -> None:
    plain = models.fixed(name)
    members = expand(plain.config).experts[0].members
    name = members[0][0].replace("experts.0.", f"experts.{len(members)}.")
    refused(plain, plain.state | {name: plain.state[members[0][0]]}, f"tensor: got {name}")
