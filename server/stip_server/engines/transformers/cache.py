"""Keys and values of all sessions: one block a layer, [slots, kv heads, positions, head width], allocated once.

transformers' own static cache keeps one length for all rows and cannot batch ragged sequences. Here each step
says which slots it touches and where each one's rows go (`Placement`). What a session leaves is zeroed, and what it
takes back was finite, so that a masked position contributes 0 · x and never 0 · NaN, whatever a neighbour left behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from stip_server.engines.transformers.masks import first_seen
from stip_server.engines.transformers.slots import Vacate


@dataclass(frozen=True)
class Placement:
    """Where the rows of one step go, and the slots [first, stop) that are read."""

    first: int
    stop: int
    position: int
    """The lowest of a row; of the first row, where one slot is computed."""
    rows: int
    """Rows a slot."""
    length: int
    """Positions that exist for the step: the longest member's length after it."""
    targets: torch.Tensor | None = None
    """Where several slots are computed: the position of each row [slots, rows], `max_positions` for a row that nobody
    sent. None: rows follow each other from `position`."""
    slots: torch.Tensor | None = None
    """[slots, 1]: those that are computed, where some between them are not. None: all of them."""


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers annotates in part
    """One layer's keys and values. Behind the last position stands one that takes what belongs nowhere and is never
    read: so every row of a step is stored, and no step depends on which of them are somebody's."""

    is_sliding = False

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, window: int | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        slots, kv_heads, positions, width = shape
        self._stores = tuple(
            torch.zeros((slots, kv_heads, positions + 1, width), dtype=dtype, device=device) for _ in range(2)
        )
        self.keys: torch.Tensor = self._stores[0][:, :, :positions]
        self.values: torch.Tensor = self._stores[1][:, :, :positions]
        self.is_initialized = True
        self.placement: Placement | None = None
        self.window = window
        """Positions that a row sees; None for all."""
        self._slots = torch.arange(slots, device=device)[:, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the step's rows [slots computed, kv heads, rows, head width]; views [slots read, ...] of all that
        they may see."""
        at = self.placement
        assert at is not None
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            if at.targets is None:
                store[at.first, :, at.position : at.position + at.rows] = states[0]
            else:
                slots = self._slots[at.first : at.stop] if at.slots is None else at.slots
                store[slots, :, at.targets] = states.transpose(1, 2)
        seen = slice(at.first, at.stop), slice(None), slice(first_seen(self.window, at.position), at.length)
        return self.keys[seen], self.values[seen]

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

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        windows: Sequence[int | None] = (),
    ) -> None:
        """`windows`: of each layer, as far as it has one (see `Shape.layer_windows`)."""
        reach = windows or (None,) * layers
        self._slot_layers = [SlotLayer(shape, dtype, device, window) for window in reach]
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
