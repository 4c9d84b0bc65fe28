"""What each row of a step may see, as tensors that are added to the scores of attention.

A row sees its own position and those before it, as far as its layer's window reaches. A layer with a window reads
only what a row of the step can see (`first_seen`), so that a step over a long session costs such a layer no more
than one over a short session.
"""

from __future__ import annotations

import math

import torch

from stip_server.engines.family import EVERY_LAYER, Shape

Masks = torch.Tensor | dict[str, torch.Tensor | None] | None
"""What a model takes as `attention_mask`: one for all layers, or one a kind of layer."""


def first_seen(window: int | None, lowest: int) -> int:
    """The first position that a layer reads in a step whose lowest row stands at `lowest`."""
    return 0 if window is None else max(0, lowest - window + 1)


class MaskMaker:
    """Masks for the layers of one model, in its dtype."""

    def __init__(self, shape: Shape, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype = shape, dtype
        self.steps = torch.arange(positions, device=device)
        """The positions 0, 1, ..., of which steps take slices instead of making their own."""

    def masks(self, positions: torch.Tensor, length: int, lowest: int, *, ragged: bool) -> Masks:
        """What rows at `positions` [batch, rows], the lowest of them at `lowest`, see of `length` positions.

        Not `ragged`: every row stands at the last position, so it sees all that its layers read.
        """
        masks = {
            kind: self._mask(positions, length, first_seen(window, lowest), window) if ragged else None
            for kind, window in self._shape.windows.items()
        }
        return masks if self._shape.layered else masks[EVERY_LAYER]

    def _mask(self, positions: torch.Tensor, length: int, first: int, window: int | None) -> torch.Tensor:
        """0 where a row sees a position of [first, length), -inf elsewhere: [batch, 1, groups · rows, length - first],
        or [batch, 1, 1, length - first] for one row."""
        read = self.steps[first:length]
        hidden = read > positions[..., None]
        if window is not None and length - first > 1:
            hidden |= read <= positions[..., None] - window
        mask = torch.zeros_like(hidden, dtype=self._dtype).masked_fill_(hidden, -math.inf)
        rows = positions.shape[-1]
        return (mask if rows == 1 else mask.repeat(1, self._shape.groups, 1))[:, None]
