"""The tables of the sizes that people run: they tile what the real classes hold, and are written in no time."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from stip_keyservice.protect.families import FAMILIES, expand
from stip_keyservice.protect.matching import TensorHeader, match
from stip_keyservice.protect.plan import plan
from stip_keyservice.protect.presets import PAPER
from stip_keyservice.protect.refusals import require_safe
from stip_protocol.errors import PresetRefused
from tests.protect_core.fixed import FIXED
from tests.protect_core.models import ACCEPTED, ROOT, Config, parse
from tests.protect_core.realistic import REALISTIC


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """What the causal class of transformers holds, without any memory for it."""
    parsed = parse(config)
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)](parsed)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_each_family_has_a_realistic_size() -> None:
    assert {config["model_type"] for config in REALISTIC.values()} == FAMILIES.keys()
    assert {config["model_type"] for config in FIXED.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", [*REALISTIC, *FIXED])
def test_slabs_and_stacks_tile_what_the_class_holds(name: str) -> None:
    """Every parameter is a tensor of the tables or a stack of some, of that shape; nothing is left over."""
    config = (REALISTIC | FIXED)[name]
    architecture, held = expand(config), shapes_of(config)
    members: set[str] = set()
    for parameter, shape in held.items():
        if parameter not in architecture.fused:
            assert architecture.tensors[parameter] == shape, parameter
            members.add(parameter)
            continue
        stacked = [architecture.tensors[tensor] for tensor in architecture.fused[parameter]]
        assert (sum(rows for rows, _ in stacked), {width for _, width in stacked}) == (
            math.prod(shape[:-1]),
            {shape[-1]},
        ), parameter
        assert not members & set(architecture.fused[parameter])
        members |= set(architecture.fused[parameter])
    assert members == architecture.tensors.keys()


@pytest.mark.parametrize("name", REALISTIC)
def test_either_form_of_a_realistic_checkpoint_is_found(name: str) -> None:
    """Every tensor lies at rows of its own, and together they fill what is stored."""
    config = REALISTIC[name]
    architecture = expand(config)
    for shapes in (dict(architecture.tensors), shapes_of(config)):
        headers = {key: TensorHeader(key, "BF16", shape) for key, shape in shapes.items()}
        found, dtype = match(architecture, headers)
        assert (found.keys(), dtype) == (architecture.tensors.keys(), "BF16")
        filled: dict[str, int] = {}
        for place in found.values():
            filled[place.name] = filled.get(place.name, 0) + place.stop - place.start
        first_axes = {key: math.prod(shape[:-1]) if len(shape) > 1 else shape[0] for key, shape in shapes.items()}
        assert filled == first_axes


@pytest.mark.parametrize("name", ["GPT-2 124M", "Pythia 1.4B", "Qwen3 30B A3B"])
def test_a_plan_of_a_realistic_size_has_an_output_for_each_tensor(name: str) -> None:
    """18,867 of them for the largest; a plan whose time grew with their square would not end within the time limit."""
    config = REALISTIC[name]
    architecture = expand(config)
    headers = {key: TensorHeader(key, "BF16", shape) for key, shape in architecture.tensors.items()}
    planned = plan(config, headers, "paper", ROOT, **ACCEPTED)
    assert {output.name for output in planned.server} == architecture.tensors.keys()


@pytest.mark.parametrize("name", REALISTIC)
def test_paper_asks_for_acceptance_where_a_realistic_head_is_tied(name: str) -> None:
    architecture = expand(REALISTIC[name])
    tied = REALISTIC[name]["model_type"] in ("gpt2", "opt", "gemma2", "gemma3_text")
    assert bool(architecture.tied) == tied
    if tied:
        with pytest.raises(PresetRefused, match="accept_tied_head"):
            require_safe(PAPER, architecture, accept_tied_head=False, accept_token_cipher=False)
