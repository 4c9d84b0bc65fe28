"""How many workers the promised peak of resident memory has room for.

The promise: twice the largest shard and 1 GB, the certificate apart. The estimates here are of the arrays that a worker
holds at once, with a margin for what the allocator keeps; `benchmarks.protect` measures the peak.

A dense key is drawn before anything else is held: NumPy's factorization of n x n Gaussians peaks at 5.1·8·n² bytes,
which no number of workers changes and which breaks the promise where shards are small and n is large (n = 8192: 2.7
GB).
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping

from stip_keyservice.protect.matching import TensorHeader
from stip_keyservice.protect.storage.headers import ITEM_BYTES
from stip_keyservice.protect.storage.pipeline import WORKERS_LIMIT
from stip_keyservice.protect.storage.spans import SPAN_BYTES
from stip_keyservice.protect.storage.writer import BLOCK_BYTES
from stip_protocol.keys.algebra import CHUNK

SHARDS, MARGIN = 2, 1 << 30
"""Peak resident memory is at most so many times the largest shard, and so many bytes."""
LIBRARIES = 350_000_000
"""Bytes of the interpreter, torch and transformers: 250 MB here when nothing has been read."""
BLOCKS, CHUNKS = 20, 12
"""A worker holds some four float64 copies of a two-byte block and the block itself, and where a dense key mixes rows
`CHUNK` of them as stored and in float64: bytes by byte of a block, and by element of a row times `CHUNK`."""


def bound(largest_shard: int) -> int:
    """Bytes of the promised peak."""
    return SHARDS * largest_shard + MARGIN


def give_back() -> None:
    """Return to the system what the allocator keeps of threads that have ended; glibc only, elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def default_workers(headers: Mapping[str, TensorHeader], largest_shard: int, width: int) -> int:
    """A worker for each core that this process may use, as far as memory goes; one at least.

    `width` is the residual's, whose key is a float64 matrix where it is dense, kept with its transpose.
    """
    widest = max(header.shape[-1] for header in headers.values() if header.shape)
    free = bound(largest_shard) - LIBRARIES - _spans(headers) - 2 * 8 * width**2
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, free // (BLOCKS * BLOCK_BYTES + CHUNKS * CHUNK * widest), WORKERS_LIMIT))


def _spans(headers: Mapping[str, TensorHeader]) -> int:
    """Bytes of spans at once: what the cache keeps, and one that it let go of and that workers still gather from."""
    sizes = sorted(math.prod(header.shape) * ITEM_BYTES[header.dtype] for header in headers.values())
    return max(sizes[-1], min(sum(sizes), SPAN_BYTES)) + (sizes[-2] if len(sizes) > 1 else 0)
