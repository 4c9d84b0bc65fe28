"""How transformers cuts a model among processes (its `tp_plan`), as far as the engine must know it.

A family's plan says which matrices are cut by rows and which by columns. Heads go whole to one process, so keys and
values are cut with them; a plan that gathers the keys again (Phi-3's, whose queries, keys and values are one matrix)
leaves every process with all of them.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from stip_protocol.errors import ConfigurationError
from stip_server.engines.family import Shape, shape_of

CUT_BY_HEADS = "colwise"
"""The style of a plan that leaves each process with its own heads."""
KEYS = ("k_proj", "query_key_value", "qkv_proj")
"""What makes keys, by the end of its name in a plan."""
FIELD = "engine.tensor_parallel"


def require_plan(config: Any, ranks: int, *, head: bool) -> None:
    """Raise `ConfigurationError` where a model cannot be cut among `ranks` processes. `head`: with its logits."""
    shape = shape_of(config)
    if not config.base_model_tp_plan:
        allowed = f"1 (transformers has no tp_plan for {config.model_type}); vLLM cuts more families"
        raise ConfigurationError.because(FIELD, ranks, allowed)
    if _cut_by_heads(config) and shape.kv_heads % ranks:
        raise ConfigurationError.because(FIELD, ranks, f"a divisor of {shape.kv_heads} key-value heads")
    if head and config.vocab_size % ranks:
        raise ConfigurationError.because(FIELD, ranks, f"a divisor of {config.vocab_size} logits")


def own_kv_heads(model: nn.Module, shape: Shape) -> int:
    """Key-value heads that this process computes: all of them, or its part of a model that was cut."""
    cut = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    config: Any = model.config
    if cut is None or not _cut_by_heads(config):
        return shape.kv_heads
    return shape.kv_heads // cut.device_mesh.size()


def is_cut(module: nn.Module) -> bool:
    """Whether this process holds a part of the module only."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _cut_by_heads(config: Any) -> bool:
    styles = [style for name, style in config.base_model_tp_plan.items() if name.endswith(KEYS)]
    return styles == [CUT_BY_HEADS]
