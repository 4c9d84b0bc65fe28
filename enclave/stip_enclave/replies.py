"""What a replica answers, measured and checked before it is believed: sizes, ranges, order, finite values.

The sender is not trusted. A frame whose bytes do not fit its slices raises; a row that is wrong is named by its
index, so that its neighbours go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stip_enclave.tables import NUMPY_DTYPE, as_numbers
from stip_protocol.errors import FrameInvalid, TensorInvalid
from stip_protocol.fields import TOP
from stip_protocol.manifest import Manifest
from stip_protocol.tensor import require_rows
from stip_protocol.wire import model_pb2

ID_BYTES = 4
"""An id on the wire: uint32, little-endian."""
Form = Literal["hidden", "top", "logits"]
_EXPONENT: dict[int, tuple[type[np.unsignedinteger[Any]], dict[str, int]]] = {
    2: (np.uint16, {"float16": 0x7C00, "bfloat16": 0x7F80}),
    4: (np.uint32, {"float32": 0x7F800000}),
    8: (np.uint64, {"float64": 0x7FF0000000000000}),
}
"""Exponent bits by element size and dtype (IEEE 754): all set in infinities and NaNs."""


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """The rows of one frame, in the order of its slices."""

    form: Form
    rows: NDArray[Any] = field(repr=False)
    """hidden [n, d] in the native dtype; top values [n, 64] or logits [n, V] in float32 or float64."""
    indices: NDArray[np.int64] | None = field(repr=False)
    """Of `top`: permuted ids [n, 64]."""
    log_sum_exp: NDArray[np.float64] | None = field(repr=False)
    """Of `top`: [n]."""
    bad: frozenset[int]
    """Rows that are not finite, not in order or out of range."""

    def only(self, rows: list[int]) -> Outputs:
        """These rows alone, in this order."""
        if len(rows) == len(self.rows):
            return self
        indices = None if self.indices is None else self.indices[rows]
        log_sum_exp = None if self.log_sum_exp is None else self.log_sum_exp[rows]
        return Outputs(self.form, self.rows[rows], indices, log_sum_exp, frozenset())


def read_outputs(fed: model_pb2.Fed, rows: int, manifest: Manifest) -> Outputs:
    """The tensors of a frame that should hold `rows` rows of the manifest's instance.

    Raises `FrameInvalid` for another form of output and `TensorInvalid` for bytes that do not fit.
    """
    form = fed.WhichOneof("out")
    if form == "hidden":
        hidden = _rows(fed.hidden, rows, manifest.dtype, manifest.width, "Fed.hidden")
        return Outputs("hidden", hidden, None, None, _named(_infinite(hidden, manifest.dtype)))
    if form == "logits":
        logits = _rows(fed.logits, rows, manifest.dtype, manifest.vocabulary, "Fed.logits")
        return Outputs("logits", as_numbers(logits), None, None, _named(_infinite(logits, manifest.dtype)))
    if form == "top":
        return _top(fed.top, rows, manifest)
    raise FrameInvalid.because("Fed.out", form, "hidden, top, logits or ids")


def read_ids(data: bytes, count: int) -> NDArray[np.uint32]:
    """The permuted ids [count] of a frame. Raises `TensorInvalid` for bytes that do not fit."""
    if len(data) != ID_BYTES * count:
        raise TensorInvalid.because("Ids.ids", f"{len(data)} bytes", f"{ID_BYTES * count} ({count} ids)")
    return np.frombuffer(data, "<u4")


def _top(top: model_pb2.Top, rows: int, manifest: Manifest) -> Outputs:
    count = min(TOP, manifest.vocabulary)
    if top.count != count:
        raise TensorInvalid.because("Top.count", top.count, count)
    values = _rows(top.values, rows, manifest.dtype, count, "Top.values")
    # uint32 and float32 are as wide as a float32: the same measure.
    require_rows(top.indices, rows, "float32", count, what="Top.indices")
    require_rows(top.log_sum_exp, rows, "float32", 1, what="Top.log_sum_exp")
    indices = np.frombuffer(top.indices, "<u4").reshape(rows, count).astype(np.int64)
    lse = np.frombuffer(top.log_sum_exp, "<f4").astype(np.float64)
    numbers = as_numbers(values)
    ordered = np.sort(indices, axis=1)
    bad = (
        _infinite(values, manifest.dtype)
        | ~np.isfinite(lse)
        | (numbers[:, 1:] > numbers[:, :-1]).any(axis=1)
        | (ordered[:, -1] >= manifest.vocabulary)
        | (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    )
    return Outputs("top", numbers, indices, lse, _named(bad))


def _rows(data: bytes, rows: int, dtype: str, width: int, what: str) -> NDArray[Any]:
    require_rows(data, rows, dtype, width, what=what)
    return np.frombuffer(data, NUMPY_DTYPE[dtype]).reshape(rows, width)


def _infinite(array: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
    """Which rows hold an infinity or a NaN, read from the exponent bits: half precision has no fast test of its own."""
    word, masks = _EXPONENT[array.itemsize]
    mask = word(masks[dtype])
    bits = array.view(word)
    found: NDArray[np.bool_] = ((bits & mask) == mask).any(axis=1)
    return found


def _named(bad: NDArray[np.bool_]) -> frozenset[int]:
    return frozenset(np.flatnonzero(bad).tolist()) if bad.any() else frozenset()
