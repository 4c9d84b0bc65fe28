"""Keys and values of all sessions: one block a layer, [slots, kv heads, positions, head width], allocated once.

transformers' own static cache keeps one length for all rows and cannot batch ragged sequences. Here each step
says which slots it touches and where each one's rows go (`Placement`); positions that no session holds are
zero, so that a masked position contributes 0 · 0 and never 0 · NaN, whatever a neighbour left behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from stip_server.engines.transformers.slots import Vacate


@dataclass(frozen=True)
class Placement:
    """Where the rows of one step go. Slots [first, stop) are computed; the sessions of the step are `members`."""

    first: int
    stop: int
    position: int
    """Of the first row, where one slot is computed; unused otherwise."""
    rows: int
    """Rows a slot."""
    length: int
    """Positions that are read: the longest member's length after the step."""
    members: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """Where several slots are computed, one row each: (index in the batch, slot, position) of each member. The
    slots between them are computed and not stored."""


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers annotates in part
    """One layer's keys and values."""

    is_sliding = False

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: torch.Tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.values: torch.Tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.is_initialized = True
        self.placement: Placement | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the step's rows [slots of the step, kv heads, rows, head width]; views of all that they may see."""
        at = self.placement
        assert at is not None
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            if at.members is None:
                store[at.first, :, at.position : at.position + at.rows] = states[0]
            else:
                batch, slot, position = at.members
                store[slot, :, position] = states[batch, :, 0]
        span = slice(at.first, at.stop)
        return self.keys[span, :, : at.length], self.values[span, :, : at.length]

    def vacate(self, move: Vacate) -> None:
        """Empty a slot (see `Vacate`)."""
        for store in (self.keys, self.values):
            if move.source != move.slot:
                store[move.slot, :, : move.moved] = store[move.source, :, : move.moved]
                store[move.source, :, : move.moved] = 0
            store[move.slot, :, move.moved : move.rows] = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocated in the constructor."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length read, offset); the runner passes ready masks."""
        return (self.placement.length if self.placement else 0), 0

    def get_seq_length(self) -> int:
        """No single length exists; the runner passes positions."""
        return 0

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class SlotCache(Cache):
    """The layers of one model."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._slot_layers = [SlotLayer(shape, dtype, device) for _ in range(layers)]
        super().__init__(layers=list(self._slot_layers))

    def place(self, placement: Placement) -> None:
        """Say where the rows of the next forward go."""
        for layer in self._slot_layers:
            layer.placement = placement

    def vacate(self, moves: Iterable[Vacate]) -> None:
        """Empty slots, in order."""
        for move in moves:
            for layer in self._slot_layers:
                layer.vacate(move)
