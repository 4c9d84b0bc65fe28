"""Canonical CBOR: the one byte form of everything that is hashed or signed.

Core Deterministic Encoding of RFC 8949 §4.2.1. Decoding is strict: bounded in size and depth, refused where
there is a tag that the caller did not ask for, and refused where re-encoding does not give the same bytes back,
so that two parties never hash two forms of one value. Tags are refused before anything is built: a decoder that
follows shared references (tags 28 and 29) lets two hundred bytes stand for millions of values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import cbor2

from stip_protocol.errors import FrameInvalid

DOCUMENT_LIMIT = 1 << 16
"""Bytes of the largest document accepted: a claim, a lease, a bundle."""
DEPTH_LIMIT = 16
"""Containers within containers of the deepest document."""
_TEXTS, _TAG, _SIMPLE = (2, 3), 6, 7
"""Major types (RFC 8949 §3.1): strings, whose bytes follow their head; tags; simple values and floats."""
_PLAIN = (20, 21, 22)
"""Simple values false, true and null (RFC 8949 §3.3)."""


def encode(value: Any) -> bytes:
    """The canonical bytes of `value` (maps, lists, ints, bytes, str, bool, None)."""
    return cbor2.dumps(value, canonical=True)


def decode(data: bytes, *, what: str, limit: int = DOCUMENT_LIMIT, tags: Collection[int] = ()) -> Any:
    """The value in `data`.

    Raises `FrameInvalid` where it is too large or too deep, malformed, not canonical, or holds anything but maps,
    lists, ints of 64 bits, bytes, str, bool and None, and the `tags` that the caller understands.
    """
    if len(data) > limit:
        raise FrameInvalid.because(what, f"{len(data)} bytes", f"at most {limit}")
    for major, argument in _heads(data):
        if (major == _TAG and argument not in tags) or (major == _SIMPLE and argument not in _PLAIN):
            raise FrameInvalid.because(what, f"CBOR type {major}/{argument}", "maps, lists, ints, strings, bool, null")
    try:
        value = cbor2.loads(data, max_depth=DEPTH_LIMIT, allow_indefinite=False, allow_duplicate_keys=False)
        again = encode(value)
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FrameInvalid(f"{what}: not CBOR ({type(error).__name__})", field=what) from None
    if again != data:
        raise FrameInvalid(f"{what}: not in canonical form (RFC 8949 section 4.2.1)", field=what)
    return value


def digest(value: Any) -> bytes:
    """SHA-256 over the canonical bytes."""
    return hashlib.sha256(encode(value)).digest()


def _heads(data: bytes) -> Iterator[tuple[int, int]]:
    """(major type, argument) of every head in `data`, in order. Ends early where `data` does."""
    at = 0
    while at < len(data):
        major, argument = data[at] >> 5, data[at] & 0x1F
        at += 1
        if argument >= 24:  # the argument follows, in 1, 2, 4 or 8 bytes; above 27 there is none
            size = 1 << (argument - 24) if argument < 28 else 0
            argument = int.from_bytes(data[at : at + size], "big")
            at += size
        if major in _TEXTS:
            at += argument
        yield major, argument
