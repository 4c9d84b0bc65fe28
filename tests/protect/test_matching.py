"""Stacks of experts, in the shapes that writers give them."""

from __future__ import annotations

import re

import pytest

from stip_keyservice.protect.families import expand
from stip_keyservice.protect.matching import TensorHeader, match
from stip_protocol.errors import CheckpointInvalid

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def headers(stack: tuple[int, ...]) -> dict[str, TensorHeader]:
    architecture = expand(CONFIG)
    shapes = {name: shape for name, shape in architecture.tensors.items() if name not in architecture.fused[STACK]}
    return {name: TensorHeader(name, "F32", shape) for name, shape in (shapes | {STACK: stack}).items()}


@pytest.mark.parametrize("stack", [(4, 12, 8), (48, 8)], ids=str)
def test_a_stack_holds_one_matrix_for_each_expert_or_all_rows(stack: tuple[int, ...]) -> None:
    found, _ = match(expand(CONFIG), headers(stack))
    second = found["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    assert (second.name, second.start, second.stop) == (STACK, 12, 18)


@pytest.mark.parametrize("stack", [(12, 4, 8), (8, 6, 8), (4, 8, 12), (2, 2, 12, 8), (48, 8, 1), (384,)], ids=str)
def test_a_stack_with_other_axes_is_refused(stack: tuple[int, ...]) -> None:
    allowed = re.escape("allowed: [4, 12, 8] or [48, 8]")
    with pytest.raises(CheckpointInvalid, match=f"{STACK} shape: got .*{allowed}"):
        match(expand(CONFIG), headers(stack))
