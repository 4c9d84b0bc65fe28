"""The headers of safetensors files, checked before anything is allocated for what they announce.

The format is the one of https://huggingface.co/docs/safetensors: 8 bytes little-endian header length, a JSON header
of at most 100 MB, then one buffer that the tensors' offsets tile without holes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stip_keyservice.protect.matching import TensorHeader
from stip_protocol.errors import CheckpointInvalid

HEADER_LIMIT = 100_000_000
"""Bytes of the largest header: the format's own limit (MAX_HEADER_SIZE of the reference reader)."""
READ_BYTES = 1 << 30
"""Bytes asked of the system at a time; Linux gives 2 GiB at most."""
JSON_LIMIT = 16 << 20
"""Bytes of the largest configuration file read."""
NAME_LIMIT = 512
"""Characters of the longest tensor name. Names go into messages, so they are printable too."""
AXES_LIMIT, NUMBER_LIMIT = 8, 1 << 48
"""Axes of a tensor, and the largest axis or offset: what is multiplied before it is compared stays small."""
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
"""Bytes of an element. Only floating point can be protected, which the plan checks tensor by tensor; integers
and booleans are known here because old checkpoints carry such buffers, which a family drops by name."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file of the source, or a link to one, to read without a buffer. Raises `CheckpointInvalid`, also for
    what fails to read inside the block; a pipe or a device is refused, not waited for.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise CheckpointInvalid.because(path.name, "no regular file", "a regular file")
            yield file
    except OSError as error:
        raise CheckpointInvalid(f"{path.name}: {error.strerror}", field=path.name) from None


def read_document(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """The bytes of a small file, at most `limit` of them. Raises `CheckpointInvalid`."""
    with opened(path) as file:
        data = read_up_to(file, limit + 1)
    if len(data) > limit:
        raise CheckpointInvalid.because(path.name, "a larger file", f"at most {limit} bytes")
    return data


def read_up_to(file: BinaryIO, count: int) -> bytes:
    """The next `count` bytes, or as many as there are: one read of a file without a buffer may give fewer."""
    parts: list[bytes] = []
    while count and (part := file.read(min(count, READ_BYTES))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


@dataclass(frozen=True)
class Shard:
    """One safetensors file as its header announces it."""

    path: Path
    headers: Mapping[str, TensorHeader]
    offsets: Mapping[str, int]
    """The first byte of each tensor, counted from the start of the file."""
    stamp: Stamp
    """Of the file whose header was read: whoever reads tensors later compares."""
    digest: str
    """SHA-256 of the header, in hexadecimal."""


@dataclass(frozen=True)
class Stamp:
    """Which file lies under a name, and whether it was written to since: device, inode, bytes, nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, handle: int) -> Stamp:
        """The stamp of an open file."""
        status = os.fstat(handle)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def read_header(path: Path) -> Shard:
    """What one safetensors file holds. Raises `CheckpointInvalid`."""
    with opened(path) as file:
        stamp = Stamp.of(file.fileno())
        size = stamp.size
        length = int.from_bytes(read_up_to(file, 8), "little")
        if size < 8 or length > HEADER_LIMIT:
            allowed = f"8 to {HEADER_LIMIT} bytes after a length of 8 bytes"
            raise CheckpointInvalid.because(f"{path.name} header", f"{length} bytes of {size}", allowed)
        if length > size - 8:
            raise CheckpointInvalid.because(
                f"{path.name} size", f"{size} bytes", f"at least {8 + length} for its header: is the file cut?"
            )
        header = read_up_to(file, length)
    headers, offsets = _parse_header(header, size - 8 - length, path.name)
    absolute = {name: 8 + length + offset for name, offset in offsets.items()}
    return Shard(path, headers, absolute, stamp, hashlib.sha256(header).hexdigest())


def _parse_header(header: bytes, body: int, file: str) -> tuple[dict[str, TensorHeader], dict[str, int]]:
    entries = json_object(header, f"{file} header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointInvalid.because(f"{file} __metadata__", "other values", "a map of strings")
    headers: dict[str, TensorHeader] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if len(name) > NAME_LIMIT or not name.isprintable():
            got = f"the name {ascii(name)[:64]}"
            raise CheckpointInvalid.because(f"{file} header", got, f"at most {NAME_LIMIT} printable characters")
        header_of, span = _parse_entry(name, entry, f"{file}, tensor {name}")
        headers[name] = header_of
        spans.append((*span, name))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            what = f"{file}, tensor {name} data_offsets"
            raise CheckpointInvalid.because(what, f"begin {begin}", f"{reached}: no overlap and no hole")
        reached = end
    if reached != body:
        raise CheckpointInvalid.because(
            f"{file} size", f"{body} bytes of tensors", f"the {reached} bytes of its header: is the file cut?"
        )
    return headers, {name: begin for begin, _, name in spans}


def _parse_entry(name: str, entry: Any, what: str) -> tuple[TensorHeader, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointInvalid.because(what, "another form", "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointInvalid.because(f"{what} dtype", ascii(dtype)[:16], "F64, F32, F16, BF16")
    if not _naturals(shape, AXES_LIMIT) or not _naturals(offsets, 2) or len(offsets) != 2:
        allowed = f"at most {AXES_LIMIT} and two natural numbers up to {NUMBER_LIMIT}"
        raise CheckpointInvalid.because(f"{what} shape and data_offsets", "other values", allowed)
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        got = f"{offsets[1] - offsets[0]} bytes"
        raise CheckpointInvalid.because(f"{what} data_offsets", got, f"{expected} ({dtype} {shape})")
    return TensorHeader(name, dtype, tuple(shape)), (offsets[0], offsets[1])


def json_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key occurs twice. Raises `CheckpointInvalid` naming `what`."""
    try:
        value = json.loads(data, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointInvalid.because(
            what, f"not JSON ({error})"[:200], "a JSON object without duplicate keys"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointInvalid.because(what, "another JSON value", "an object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _naturals(values: Any, count: int) -> bool:
    """Whether this is a list of at most `count` of them."""
    return (
        isinstance(values, list)
        and len(values) <= count
        and all(type(value) is int and 0 <= value <= NUMBER_LIMIT for value in values)
    )
