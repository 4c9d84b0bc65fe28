"""Writing safetensors as a stream: the header first, then the tensors in row blocks.

Nothing is held but one row block. The layout is the one of https://huggingface.co/docs/safetensors: header
padded with spaces to 8 bytes, tensors by descending item size so that each is aligned, metadata
`{"format": "pt"}` and nothing else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from stip_keyservice.protect.plan import Output
from stip_protocol.errors import CheckpointInvalid
from stip_protocol.tensor import ITEM_BYTES, SAFETENSORS_DTYPE

SHARD_BYTES = 2 << 30
"""Bytes of tensors in a shard; a larger tensor has a shard of its own."""
BLOCK_BYTES = 32 << 20
"""Bytes of a row block."""
ALIGNMENT = 8

Compute = Callable[[Output, slice], torch.Tensor]
"""A row block of one output, in the output's dtype."""
Advance = Callable[[int], None]
"""Told the bytes of every block written."""


class Sink(Protocol):
    """What takes bytes in order: a file, a sealed file."""

    def write(self, data: bytes | memoryview, /) -> int: ...


def output_bytes(output: Output) -> int:
    """Bytes of one output's data."""
    return math.prod(output.shape) * ITEM_BYTES[SAFETENSORS_DTYPE[output.dtype]]


def write_tensors(sink: Sink, outputs: Sequence[Output], compute: Compute, advance: Advance) -> None:
    """One whole safetensors file into `sink`.

    Raises `CheckpointInvalid` where a computed block is not of the announced form.
    """
    ordered = sorted(outputs, key=lambda output: -ITEM_BYTES[SAFETENSORS_DTYPE[output.dtype]])
    sink.write(_header(ordered))
    for output in ordered:
        rows = output.shape[0] if output.shape else 1
        step = max(1, BLOCK_BYTES * rows // max(1, output_bytes(output)))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            block = compute(output, slice(start, stop))
            _require_block(output, block, stop - start)
            data = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
            sink.write(data)
            advance(len(data))


def write_checkpoint(
    folder: Path, outputs: Sequence[Output], compute: Compute, advance: Advance, shard_bytes: int = SHARD_BYTES
) -> None:
    """A Hugging Face checkpoint: `model.safetensors`, or shards with the index written last and atomically."""
    shards = _shards(outputs, shard_bytes)
    names = [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("xb") as file:
            write_tensors(file, shard, compute, advance)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(output_bytes, outputs))},
            "weight_map": {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard},
        }
        write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """A small file that is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _header(outputs: Sequence[Output]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for output in outputs:
        end = reached + output_bytes(output)
        entries[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [reached, end]}
        reached = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def _require_block(output: Output, block: torch.Tensor, rows: int) -> None:
    shape = (rows, *output.shape[1:]) if output.shape else ()
    dtype = SAFETENSORS_DTYPE[output.dtype]
    if tuple(block.shape) != shape or str(block.dtype) != f"torch.{dtype}":
        raise CheckpointInvalid.because(
            f"tensor {output.name}", f"{block.dtype} {list(block.shape)}", f"{dtype} {list(shape)}"
        )


def _shards(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        size = output_bytes(output)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += size
    return shards


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
