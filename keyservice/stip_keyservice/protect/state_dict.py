"""Protecting a model that is already in memory: small models, audits, tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from stip_keyservice.protect.folding import TORCH_DTYPE
from stip_keyservice.protect.matching import TensorHeader
from stip_keyservice.protect.plan import Output, Plan, plan

_NAMES = {dtype: name for name, dtype in TORCH_DTYPE.items()}


class StateSource:
    """A state dict as a `TensorSource`."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self._state[name]
        return (tensor.flatten(end_dim=-2) if tensor.ndim > 2 else tensor)[start:stop]

    def span(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.rows(name, start, stop)


def headers_of(state: Mapping[str, torch.Tensor]) -> dict[str, TensorHeader]:
    """The headers that a file of `state` would have."""
    return {
        name: TensorHeader(name, _NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in state.items()
    }


def protect_state(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor], preset: str, root: bytes, **options: Any
) -> tuple[Plan, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(plan, server part, enclave part) of a state dict. `options` are those of `plan`."""
    planned = plan(config, headers_of(state), preset, root, **options)
    source = StateSource(state)

    def part(outputs: Iterable[Output]) -> dict[str, torch.Tensor]:
        return {output.name: planned.compute(output, source, slice(0, output.shape[0])) for output in outputs}

    return planned, part(planned.server), part(planned.enclave)
