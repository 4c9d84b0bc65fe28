"""Sizes and forms of the wire's fields (wire/*.proto), the same for whoever sends or checks them."""

from __future__ import annotations

import re

from stip_protocol.errors import FrameInvalid, TensorInvalid

HANDLE_BYTES = 16
"""Of a session's handle."""
ACCOUNT_BYTES = 16
"""Of what tells the sessions of one lease from others."""
ID_BYTES = 4
"""Of an id: uint32, little-endian."""
STOP_IDS = 1024
"""Stop ids of one generation, at most."""
TOP = 64
"""Entries of a `Top` row, where the vocabulary has as many."""
REQUEST_ID = re.compile(r"[0-9a-f]{32}")
"""A content-free name of a session in logs."""


def require_handle(session: bytes, what: str) -> bytes:
    """`session`, whose length bounds what is remembered and logged of it. Raises `FrameInvalid`."""
    if len(session) != HANDLE_BYTES:
        raise FrameInvalid.because(what, f"{len(session)} bytes", f"{HANDLE_BYTES} bytes")
    return session


def require_id_bytes(data: bytes | memoryview, count: int, what: str) -> None:
    """Raise `TensorInvalid` unless `data` holds exactly `count` ids."""
    came = memoryview(data).nbytes
    if came != count * ID_BYTES:
        raise TensorInvalid.because(what, f"{came} bytes", f"{count * ID_BYTES} ({count} ids)")
