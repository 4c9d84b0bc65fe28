"""Checks on tensor bytes, before anything is allocated. No tensor library but NumPy, and no copies of the rows."""

from __future__ import annotations

import numpy as np

from stip_protocol.errors import TensorInvalid
from stip_protocol.fields import require_id_bytes
from stip_protocol.tensor import row_bytes
from stip_server.engine import Card

EXPONENT: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "float64": (np.uint64, 0x7FF0_0000_0000_0000),
    "float32": (np.uint32, 0x7F80_0000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}
"""Carrier type and exponent mask. IEEE 754-2019, 3.4: all exponent bits set is an infinity or a NaN; bfloat16 is
the upper half of a binary32."""


def is_finite(data: bytes | memoryview, dtype: str) -> bool:
    """Whether every element of `data` is finite."""
    carrier, mask = EXPONENT[dtype]
    bits = np.frombuffer(data, carrier)
    return not bool(((bits & carrier(mask)) == mask).any())


def require_rows(data: bytes | memoryview, rows: int, card: Card) -> None:
    """Raise `TensorInvalid` unless `data` holds exactly `rows` rows."""
    came, expected = memoryview(data).nbytes, rows * row_bytes(card.dtype, card.width)
    if came != expected:
        raise TensorInvalid.because("rows", f"{came} bytes", f"{expected} ({rows} rows of {card.width} {card.dtype})")


def require_ids(data: bytes | memoryview, count: int, card: Card) -> None:
    """Raise `TensorInvalid` unless `data` holds exactly `count` ids of the card's vocabulary."""
    require_id_bytes(data, count, "ids")
    if count and int(np.frombuffer(data, "<u4").max()) >= card.vocabulary:
        raise TensorInvalid.because("ids", "an id outside the vocabulary", f"0 to {card.vocabulary - 1}")
