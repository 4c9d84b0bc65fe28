"""The plan of a protection: which tensors come out, and how one row block of each is computed.

`plan` reads a configuration and tensor headers only (no weights), refuses what it cannot protect before
anything is allocated, draws the keys, and returns a `Plan`. Whoever streams the checkpoint walks
`Plan.server` and `Plan.enclave` and asks `Plan.compute` for row blocks, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor as its file announces it. `dtype` is a safetensors name: F64, F32, F16 or BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Output:
    """One tensor of the server part or of the enclave part. `dtype` is a safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class TensorSource(Protocol):
    """The plain checkpoint, by stored name. Tensors come in their stored dtype, on the CPU."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) along the first axis."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        ...


class Plan:
    """What one protection produces."""

    server: tuple[Output, ...]
    enclave: tuple[Output, ...]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    family: str
    preset: str
    dtype: str
    residual_width: int
    vocabulary: int
    max_positions: int
    output: Literal["hidden", "top"]

    def compute(self, output: Output, source: TensorSource, rows: slice) -> torch.Tensor:
        """Rows `rows` (start, stop; step 1) of `output`, in its dtype."""
        raise NotImplementedError


def plan(
    config: Mapping[str, Any],
    headers: Mapping[str, TensorHeader],
    preset: str,
    root: bytes,
    *,
    accept_tied_head: bool = False,
) -> Plan:
    """Plan the protection of a checkpoint under `preset` with the keys of the 32-byte instance secret `root`."""
    raise NotImplementedError
