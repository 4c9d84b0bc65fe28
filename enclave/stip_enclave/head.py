"""The keyed head: final hidden states to logits, in the native dtype, as the plain model computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stip_enclave.tables import SealedTensor

INLINE_WORK = 16_000_000
"""Multiplications below which a head runs on the event loop: about a millisecond, and a hand-over to a thread of a
busy process can cost as much."""


class Head:
    """logits = W·h + b over the rows of one reply frame, for as many sessions as it carries."""

    def __init__(
        self, weight: SealedTensor, bias: SealedTensor | None, dtype: str, *, logit_cap: float | None = None
    ) -> None:
        """`weight` [V, d] and `bias` [V], keyed, of torch's `dtype`; their memory is shared, not copied.

        With a `logit_cap`, logits x leave as cap · tanh(x / cap) (Gemma 2, arXiv:2408.00118).
        """
        self._cap = logit_cap
        self._dtype = getattr(torch, dtype)
        self._weight = self._shared(weight)
        self._bias = None if bias is None else self._shared(bias)
        self._numbers = torch.float64 if dtype == "float64" else torch.float32

    def work(self, rows: int) -> int:
        """Multiplications for `rows` rows."""
        return self._weight.numel() * rows

    def logits(self, hidden: NDArray[Any]) -> NDArray[Any]:
        """float32 (float64 of a float64 model) [n, V] in true order, from hidden states [n, d] of the native dtype.

        Rounded to the native dtype, and capped in it, before it is widened: ties fall where the plain model's fall.
        """
        rows = torch.from_numpy(hidden.view(np.uint8).copy()).view(self._dtype)
        with torch.inference_mode():
            logits = torch.nn.functional.linear(rows, self._weight, self._bias)
            if self._cap is not None:
                logits = torch.tanh(logits / self._cap) * self._cap
        array: NDArray[Any] = logits.to(self._numbers).numpy()
        return array

    def _shared(self, tensor: SealedTensor) -> torch.Tensor:
        size = tensor.array.size
        offset = len(tensor.plain) - tensor.array.nbytes
        return torch.frombuffer(tensor.plain, dtype=self._dtype, count=size, offset=offset).view(tensor.array.shape)
