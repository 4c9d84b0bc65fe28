"""Tensors on the wire: bytes in native dtype, row-major, with dtype and width fixed by the card.

No tensor library: gateway and client measure and forward, enclave and server view the bytes with theirs.
"""

from __future__ import annotations

from stip_protocol.errors import TensorInvalid

ITEM_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one element, by the dtype names of torch."""
SAFETENSORS_DTYPE: dict[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' dtype names to ours."""
FRAME_LIMIT = 1 << 20
"""Bytes of tensor data in the largest frame."""


def row_bytes(dtype: str, width: int) -> int:
    """Bytes of one row of `width` elements. Raises `TensorInvalid` for an unknown dtype."""
    try:
        return ITEM_BYTES[dtype] * width
    except KeyError:
        raise TensorInvalid.because("dtype", dtype, sorted(ITEM_BYTES)) from None


def rows_per_frame(dtype: str, width: int) -> int:
    """Rows of a frame that stays under `FRAME_LIMIT`, at least one."""
    return max(1, FRAME_LIMIT // row_bytes(dtype, width))


def require_rows(data: bytes, rows: int, dtype: str, width: int, *, what: str) -> None:
    """Raise `TensorInvalid` unless `data` holds exactly `rows` rows."""
    expected = rows * row_bytes(dtype, width)
    if len(data) != expected:
        raise TensorInvalid.because(what, f"{len(data)} bytes", f"{expected} ({rows} rows of {width} {dtype})")
