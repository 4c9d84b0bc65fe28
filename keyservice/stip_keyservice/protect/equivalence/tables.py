"""Comparing every row of what the enclave looks up: embedding, positions and head, without running a model.

Runs of a model look up some hundred ids. Here each row y of a sealed tensor is compared with K·x, x the plain row, by
its products with a few random vectors r, which for a right row are those of x with Kᵀ·r (Freivalds, MFCS 1979). That
costs d products a row and vector instead of d², all in float64. With δ = y - K·x, the root mean square of the
`VECTORS` products δ·r is about |δ|, and above `SLACK`·|δ| in one of 10²⁰ rows: what rounding to the stored dtype
does, at most half a step of each entry, passes. A row whose error is ten times the bound is missed once in 10⁷.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from stip_keyservice.protect.equivalence.protected_model import InstanceFiles
from stip_keyservice.protect.folding import Stored
from stip_keyservice.protect.keyring import key_at
from stip_keyservice.protect.plan import HEAD, HEAD_BIAS, Output, Plan
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_protocol.errors import IntegrityError
from stip_protocol.keys import Key

VECTORS = 8
SLACK = 4.0
FLOAT64_BOUND = 1e-12
"""Relative error that float64 products may add up to."""
BLOCK_VALUES = 1 << 17
"""Values that are compared at once."""

Rows = Callable[[int, int], torch.Tensor]
"""Rows [start, stop) of a plain matrix, in float64."""


class TableRows(BaseModel):
    """One tensor, all of whose rows were compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rows: int
    largest: float
    """The largest error of a row, over the length of the row. NaN where a value is not finite."""
    bound: float
    """What rounding to the stored dtype may give."""

    @property
    def passed(self) -> bool:
        """False for NaN."""
        return self.largest <= self.bound


class Tables:
    """The sealed tensors of an instance, and what they should be."""

    def __init__(self, files: InstanceFiles, source: Checkpoint, planned: Plan, seed: int) -> None:
        """`seed` draws the vectors. `planned` is the plan of `source`; keys are taken from it, recipes are not."""
        self._files = files
        self._source = source
        self._plan = planned
        self._seed = seed
        self._head = planned.architecture.linear(planned.architecture.head)

    def compare(self) -> tuple[TableRows, ...]:
        """Of every tensor of the enclave part; none where the server holds all.

        Raises `SealedPartInvalid` where a file does not open, `IntegrityError` where one has another shape.
        """
        return tuple(self._compared(output) for output in self._plan.enclave)

    def _compared(self, output: Output) -> TableRows:
        if output.name == HEAD_BIAS:
            return self._against(output, self._biases, torch.ones(1, 1, dtype=torch.float64), None)
        vectors = torch.randn(
            output.shape[1], VECTORS, generator=torch.Generator().manual_seed(self._seed), dtype=torch.float64
        )
        if output.name == HEAD:
            return self._against(output, self._head_rows, vectors, key_at(self._plan.keys, self._head.reads).dual)
        table = next(table for table in self._plan.architecture.tables if table.name == output.name)
        place = self._plan.stored[table.tensor]
        # What the model would multiply a row by, as its own dtype rounds it.
        scale = torch.tensor(table.scale, dtype=torch.float32).to(getattr(torch, self._plan.dtype)).item()

        def rows(start: int, stop: int) -> torch.Tensor:
            return self._rows(place, table.start + start, table.start + stop).mul_(scale)

        key = self._plan.keys[table.writes]
        if not isinstance(key, Key):
            raise TypeError("a table of heads")
        return self._against(output, rows, vectors, key)

    def _against(self, output: Output, plain_rows: Rows, vectors: torch.Tensor, key: Key | None) -> TableRows:
        """`vectors`: [d, n], d the width of a row, 1 for a vector's."""
        keyed = vectors if key is None else torch.from_numpy(np.ascontiguousarray(adjoint(key).apply(vectors.numpy())))
        finfo = torch.finfo(getattr(torch, self._plan.dtype))
        bound = max(SLACK * finfo.eps / 2, FLOAT64_BOUND)
        # Half a step of values below the smallest normal one, and what float64 leaves of a row of zeros.
        least = SLACK * math.sqrt(len(vectors)) * max(finfo.smallest_normal * finfo.eps, FLOAT64_BOUND**2)
        step = max(1, BLOCK_VALUES // len(vectors))
        reached, largest = 0, 0.0
        for start, block in self._files.blocks(output.name):
            if block.shape[1:] != output.shape[1:] or start + len(block) > output.shape[0]:
                raise IntegrityError.because(f"enclave part, shape of {output.name}", "another", list(output.shape))
            for first in range(0, len(block), step):
                found = block[first : first + step].double().view(-1, len(vectors))
                plain = plain_rows(start + first, start + first + len(found))
                error = (found @ vectors).sub_(plain @ keyed).square_().mean(dim=1).sqrt_()
                length = torch.linalg.vector_norm(found, dim=1)
                worst = (error - least).clamp_(min=0).div_(length + least).max().item()
                largest = max(largest, worst) if math.isfinite(worst) else math.nan
            reached = start + len(block)
        if reached != output.shape[0]:
            raise IntegrityError.because(f"enclave part, rows of {output.name}", reached, output.shape[0])
        return TableRows(name=output.name, rows=reached, largest=largest, bound=bound)

    def _rows(self, place: Stored, start: int, stop: int) -> torch.Tensor:
        return self._source.rows(place.name, place.start + start, place.start + stop).double()

    def _head_rows(self, start: int, stop: int) -> torch.Tensor:
        """W·γ, with γ only where the norm folds."""
        rows = self._plain_head_rows(start, stop)
        if self._head.norm not in self._plan.folded:
            return rows
        norm = self._plan.architecture.norm(self._head.norm)
        return rows.mul_(self._vector(norm.weight) + (1.0 - norm.unit))

    def _biases(self, start: int, stop: int) -> torch.Tensor:
        """[n, 1]: b + W·β, each where it is."""
        biases = torch.zeros(stop - start, dtype=torch.float64)
        if self._head.bias:
            biases += self._rows(self._plan.stored[self._head.bias.tensor], start, stop)
        norm = self._head.norm
        beta = self._plan.architecture.norm(norm).bias if norm in self._plan.folded else None
        if beta:
            shift, step = self._vector(beta), max(1, BLOCK_VALUES // self._plan.residual_width)
            for first in range(0, stop - start, step):
                last = min(first + step, stop - start)
                biases[first:last] += self._plain_head_rows(start + first, start + last) @ shift
        return biases[:, None]

    def _plain_head_rows(self, start: int, stop: int) -> torch.Tensor:
        tensor = self._head.weight.tensor
        return self._rows(self._plan.stored[self._plan.architecture.tied.get(tensor, tensor)], start, stop)

    def _vector(self, name: str) -> torch.Tensor:
        place = self._plan.stored[name]
        return self._rows(place, 0, place.stop - place.start)


def adjoint(key: Key) -> Key:
    """Kᵀ."""
    return key.dual.inverse
