"""Canonical CBOR: the one byte form of everything that is hashed or signed.

Core Deterministic Encoding of RFC 8949 §4.2.1. Decoding is strict: bounded in size, and refused where
re-encoding does not give the same bytes back, so that two parties never hash two forms of one value.
"""

from __future__ import annotations

import hashlib
from typing import Any

import cbor2

from stip_protocol.errors import FrameInvalid

DOCUMENT_LIMIT = 1 << 20
"""Bytes of the largest document accepted: a claim, a lease, a bundle."""


def encode(value: Any) -> bytes:
    """The canonical bytes of `value` (maps, lists, ints, bytes, str, bool, None)."""
    return cbor2.dumps(value, canonical=True)


def decode(data: bytes, *, what: str, limit: int = DOCUMENT_LIMIT) -> Any:
    """The value in `data`. Raises `FrameInvalid` where it is too large, malformed or not canonical."""
    if len(data) > limit:
        raise FrameInvalid.because(what, f"{len(data)} bytes", f"at most {limit}")
    try:
        value = cbor2.loads(data)
        again = encode(value)
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FrameInvalid(f"{what}: not CBOR ({type(error).__name__})", field=what) from None
    if again != data:
        raise FrameInvalid(f"{what}: not in canonical form (RFC 8949 section 4.2.1)", field=what)
    return value


def digest(value: Any) -> bytes:
    """SHA-256 over the canonical bytes."""
    return hashlib.sha256(encode(value)).digest()
