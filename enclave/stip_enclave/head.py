"""The keyed head: final hidden states to logits, in the native dtype, as the plain model computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stip_enclave.tables import SealedTensor

INLINE_WORK = 16_000_000
"""Multiplications below which a head runs on the event loop: about a millisecond, and a hand-over to a thread of a
busy process can cost as much."""
PACKED_FOR = 16
"""Rows a call that the weights are laid out for: also good for few and for 64, `benchmarks/head_step.py`."""
LEAST_ROWS = 4
"""Fewer rows are filled up with zeros to as many: the kernels for one to three rows take longer than that for four."""
PACKED: dict[str, Callable[[], bool]] = {
    "float32": torch.backends.mkldnn.is_available,
    "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
    "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
}
"""dtypes that oneDNN multiplies, each with whether it does so on this processor."""


class Head:
    """logits = W·h + b over the rows of one reply frame, for as many sessions as it carries.

    W is laid out once as oneDNN's kernels read it, where they know the dtype, instead of in every call. The product
    then takes a third to nine tenths of the time of `torch.nn.functional.linear` (most for one row), and a row comes
    out the same however many come with it, so that drafts do not change logits. The operators are those of torch's
    own compiler (`torch._inductor.fx_passes.mkldnn_fusion`); torch is pinned.
    """

    def __init__(
        self, weight: SealedTensor, bias: SealedTensor | None, dtype: str, *, logit_cap: float | None = None
    ) -> None:
        """`weight` [V, d] and `bias` [V], keyed, of torch's `dtype`. Where W is laid out anew its memory is not kept,
        else it is shared; that of b is shared.

        With a `logit_cap`, logits x leave as cap · tanh(x / cap) (Gemma 2, arXiv:2408.00118).
        """
        self._cap = logit_cap
        self._dtype = getattr(torch, dtype)
        self._size = weight.array.size
        self._bias = None if bias is None else self._shared(bias)
        self._packed = dtype in PACKED and PACKED[dtype]()
        self._weight = self._shared(weight)
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, PACKED_FOR)
        self._numbers = torch.float64 if dtype == "float64" else torch.float32

    def work(self, rows: int) -> int:
        """Multiplications for `rows` rows."""
        return self._size * rows

    def logits(self, hidden: NDArray[Any]) -> NDArray[Any]:
        """float32 (float64 of a float64 model) [n, V] in true order, from hidden states [n, d] of the native dtype.

        Rounded to the native dtype, and capped in it, before it is widened: ties fall where the plain model's fall.
        """
        rows = torch.from_numpy(hidden.view(np.uint8).copy()).view(self._dtype)
        with torch.inference_mode():
            logits = self._product(rows)
            if self._cap is not None:
                logits = torch.tanh(logits / self._cap) * self._cap
        array: NDArray[Any] = logits.to(self._numbers).numpy()
        return array

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if not self._packed:
            return torch.nn.functional.linear(rows, self._weight, self._bias)
        filled = torch.nn.functional.pad(rows, (0, 0, 0, max(0, LEAST_ROWS - len(rows))))
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(filled, self._weight, self._bias, "none", [], "")
        return product[: len(rows)]

    def _shared(self, tensor: SealedTensor) -> torch.Tensor:
        size = tensor.array.size
        offset = len(tensor.plain) - tensor.array.nbytes
        return torch.frombuffer(tensor.plain, dtype=self._dtype, count=size, offset=offset).view(tensor.array.shape)
