"""Reading a plain checkpoint: a local Hugging Face folder of safetensors, one file or sharded.

Files are read into buffers, never mapped: mapped pages would count as this process's memory until the last one of a
shard is let go. Pickled checkpoints are never read: unpickling runs code of whoever wrote the file.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from stip_keyservice.protect.folding import TORCH_DTYPE
from stip_keyservice.protect.matching import TensorHeader
from stip_keyservice.protect.storage.headers import (
    ITEM_BYTES,
    READ_BYTES,
    Shard,
    Stamp,
    json_object,
    opened,
    read_document,
    read_header,
)
from stip_keyservice.protect.storage.spans import SpanCache
from stip_protocol import canonical
from stip_protocol.errors import CheckpointInvalid

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_LIMIT = 64 << 20
"""Bytes of the largest shard index read."""


class Checkpoint:
    """A plain checkpoint whose configuration and headers have been read and checked; tensors are read on demand.

    A `TensorSource`: rows come in their stored dtype, on the CPU, and only the asked rows are read. Safe to use from
    several threads.
    """

    def __init__(
        self,
        directory: Path,
        config: bytes,
        generation_config: bytes | None,
        shards: Sequence[Shard],
    ) -> None:
        self.directory = directory
        self.config: dict[str, Any] = json_object(config, CONFIG)
        self.generation_config: dict[str, Any] = json_object(generation_config or b"{}", GENERATION_CONFIG)
        """Empty where the folder has none."""
        self._configurations = [
            None if data is None else hashlib.sha256(data).hexdigest() for data in (config, generation_config)
        ]
        self.headers: Mapping[str, TensorHeader] = {
            name: header for shard in shards for name, header in shard.headers.items()
        }
        self._shards = shards
        self._shard_of = {name: number for number, shard in enumerate(shards) for name in shard.headers}
        self._spans = SpanCache()

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read configuration and headers. Raises `CheckpointInvalid` naming the file or tensor that is wrong."""
        if not directory.is_dir():
            raise CheckpointInvalid.because("model", "no such folder", "a local folder of safetensors")
        config = read_document(directory / CONFIG)
        generation = directory / GENERATION_CONFIG
        return cls(directory, config, read_document(generation) if generation.exists() else None, _shards(directory))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor, its axes but the last flattened; read for this call.

        Raises `CheckpointInvalid` where the file cannot be read, or is not the one whose header was.
        """
        header, shard = self.headers[name], self._shards[self._shard_of[name]]
        count, width = _matrix_form(header.shape)
        if not 0 <= start <= stop <= count:
            raise ValueError(f"rows {start} to {stop} of {count}")
        row_bytes = math.prod(width) * ITEM_BYTES[header.dtype]
        rows = torch.empty((stop - start, *width), dtype=TORCH_DTYPE[header.dtype])
        _read(shard, shard.offsets[name] + start * row_bytes, rows, name)
        return rows

    def span(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The same, kept for the calls that follow; threads that ask for it at once read it once."""
        header = self.headers[name]
        nbytes = (stop - start) * math.prod(_matrix_form(header.shape)[1]) * ITEM_BYTES[header.dtype]
        return self._spans.get((name, start, stop), nbytes, lambda: self.rows(name, start, stop))

    def expect(self, name: str, start: int, stop: int) -> None:
        """Let the disk begin with rows that will be asked for soon, while others are computed with."""
        header, shard = self.headers[name], self._shards[self._shard_of[name]]
        row_bytes = math.prod(_matrix_form(header.shape)[1]) * ITEM_BYTES[header.dtype]
        if hasattr(os, "posix_fadvise"):
            with opened(shard.path) as file:
                begin = shard.offsets[name] + start * row_bytes
                os.posix_fadvise(file.fileno(), begin, (stop - start) * row_bytes, os.POSIX_FADV_WILLNEED)

    def let_go(self) -> None:
        """Keep no span any longer."""
        self._spans.clear()

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor lies (file, byte): the order in which to read a disk."""
        number = self._shard_of[name]
        return number, self._shards[number].offsets[name]

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of what tells whether this is the checkpoint that an earlier run read: the names,
        sizes, times and headers of its files, and its configurations. Secret, as all that digests the source.
        """
        files = [[shard.path.name, shard.stamp.size, shard.stamp.modified, shard.digest] for shard in self._shards]
        return hashlib.sha256(canonical.encode([files, self._configurations])).hexdigest()

    @property
    def largest_shard(self) -> int:
        """Bytes of the largest file."""
        return max(shard.stamp.size for shard in self._shards)


def _matrix_form(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """(rows, shape of a row) of a tensor seen as a matrix: a vector's rows are its elements."""
    return (math.prod(shape[:-1]), shape[-1:]) if len(shape) > 1 else (math.prod(shape), ())


def _read(shard: Shard, offset: int, rows: torch.Tensor, name: str) -> None:
    """Fill `rows` with the bytes of the file from `offset` on. Raises `CheckpointInvalid`."""
    what = f"{shard.path.name}, tensor {name}"
    buffer = rows.view(-1).view(torch.uint8).numpy().data
    filled = 0
    try:
        with opened(shard.path) as file:
            while filled < len(buffer):
                got = os.preadv(file.fileno(), [buffer[filled : filled + READ_BYTES]], offset + filled)
                if not got:
                    break
                filled += got
            stamp = Stamp.of(file.fileno())
    except CheckpointInvalid as error:
        raise CheckpointInvalid(f"{what}: {error.message.removeprefix(f'{shard.path.name}: ')}", field=name) from None
    if filled < len(buffer) or stamp != shard.stamp:
        raise CheckpointInvalid.because(
            what, "a file that changed since its header was read", "one that stays as it is"
        )


def _shards(directory: Path) -> list[Shard]:
    """The files of a checkpoint. As in Hugging Face, one whole file goes before an index."""
    if (whole := directory / WEIGHTS).exists():
        return [read_header(whole)]
    if (index := directory / INDEX).exists():
        return _sharded(directory, index)
    present = sorted(path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    got = f"{present[0]}, a pickle that could run code" if present else "no weights"
    raise CheckpointInvalid.because("model", got, f"{WEIGHTS} or {INDEX} (save with safe_serialization=True)")


def _sharded(directory: Path, index: Path) -> list[Shard]:
    weight_map = json_object(read_document(index, INDEX_LIMIT), INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointInvalid.because(f"{INDEX} weight_map", "other values", "a map of tensor names to files")
    shards: list[Shard] = []
    file_of: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if path.name != shard or not path.is_file():
            what = f"{INDEX}, shard {ascii(shard)[:130]}"
            raise CheckpointInvalid.because(what, "no such file", "a file beside the index")
        shards.append(read_header(path))
        for name in shards[-1].headers:
            if name in file_of:
                raise CheckpointInvalid.because(f"tensor {name}", f"{file_of[name]} and {shard}", "one shard")
            if weight_map.get(name) != shard:
                got = f"in {shard}, {'another file' if name in weight_map else 'not'} in the index"
                raise CheckpointInvalid.because(f"tensor {name}", got, f"the file that {INDEX} names")
            file_of[name] = shard
    if missing := sorted(weight_map.keys() - file_of.keys()):
        what = f"{INDEX}, tensor {ascii(missing[0])[:130]}"
        raise CheckpointInvalid.because(what, f"not in {weight_map[missing[0]]}", "a tensor of that file")
    return shards
