"""Writing safetensors as a stream: the header first, then the tensors in row blocks.

Worker threads compute blocks; the calling thread writes them in order and hashes as it goes; a third sees finished
files onto the disk. What is held is the blocks in flight. The layout is the one of
https://huggingface.co/docs/safetensors: header padded with spaces to 8 bytes, tensors by descending item size so that
each is aligned, metadata `{"format": "pt"}` and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from stip_keyservice.protect.plan import Output
from stip_keyservice.protect.storage.journal import Journal
from stip_keyservice.protect.storage.pipeline import ordered
from stip_protocol.durable import PARTIAL, write_atomically
from stip_protocol.errors import CheckpointInvalid
from stip_protocol.manifest import FileDigest
from stip_protocol.tensor import ITEM_BYTES, SAFETENSORS_DTYPE

SHARD_BYTES = 2 << 30
"""Bytes of tensors in a shard; a larger tensor has a shard of its own."""
BLOCK_BYTES = 8 << 20
"""Bytes of a row block. A dense key works on some twelve times as much in float64."""
ALIGNMENT = 8

Compute = Callable[[Output, slice], torch.Tensor]
"""A row block of one output, in the output's dtype."""
Advance = Callable[[int], None]
"""Told the bytes of every block written."""


class Stream(Protocol):
    """What takes the plain bytes of a file in order."""

    def write(self, data: bytes | memoryview, /) -> object: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class TensorFile:
    """One file to write: `name` below the instance's folder, and what it holds, in this order."""

    name: str
    outputs: tuple[Output, ...]
    stream: Callable[[DigestedFile], Stream]
    """What the bytes go through on their way: nothing, or a seal."""

    @property
    def header(self) -> bytes:
        """Where in the file each tensor lies."""
        return _header(self.outputs)

    @property
    def layout(self) -> str:
        """SHA-256 of the header, in hexadecimal: another layout is another file."""
        return hashlib.sha256(self.header).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(map(output_bytes, self.outputs))


class DigestedFile:
    """A file that is hashed while it is written, as NAME.partial until `keep`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL)
        self._file = self._partial.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append; returns the number of bytes."""
        self._digest(data)
        self._store(data)
        return len(data)

    def end(self) -> None:
        """Nothing is held back."""

    def keep(self) -> FileDigest:
        """See the content onto the disk, then give the file its name."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._path)
        return FileDigest(sha256=self._hash.hexdigest(), size=self._size)

    def close(self) -> None:
        """Let go of a file that is not kept; where it was kept, nothing."""
        self._file.close()

    def _digest(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._size += len(data)

    def _store(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


def plain_stream(file: DigestedFile) -> Stream:
    """The bytes as they are."""
    return file


def output_bytes(output: Output) -> int:
    """Bytes of one output's data."""
    return math.prod(output.shape) * ITEM_BYTES[SAFETENSORS_DTYPE[output.dtype]]


def checkpoint_files(folder: str, outputs: Sequence[Output], shard_bytes: int = SHARD_BYTES) -> list[TensorFile]:
    """The files of a Hugging Face checkpoint: `model.safetensors`, or shards (for which `index_of`)."""
    shards = _shards(outputs, shard_bytes)
    return [
        TensorFile(f"{folder}/{_shard_name(number, len(shards))}", shard, plain_stream)
        for number, shard in enumerate(shards, start=1)
    ]


def write_files(
    folder: Path,
    files: Sequence[TensorFile],
    compute: Compute,
    *,
    workers: int,
    journal: Journal,
    advance: Advance = lambda step: None,
) -> None:
    """Write every file that the journal does not list, and list it; the folders are there.

    Raises `CheckpointInvalid` where a computed block is not of the announced form, and what `compute` raises.
    """
    missing = [file for file in files if file.name not in journal.listed]
    tasks = [(output, rows) for file in missing for output in file.outputs for rows in _row_blocks(output)]
    with closing(ordered(partial(_block, compute), tasks, workers)) as blocks, _Keeper(journal) as keeper:
        for file in missing:
            digested = DigestedFile(folder / file.name)
            try:
                stream = file.stream(digested)
                stream.write(file.header)
                for data in islice(blocks, sum(len(_row_blocks(output)) for output in file.outputs)):
                    stream.write(data)
                    advance(len(data))
                stream.end()
            except BaseException:
                digested.close()
                raise
            keeper.keep(file, digested)


def write_document(path: Path, data: bytes) -> FileDigest:
    """A small file, whole or not at all; gives the digest of `data`, whatever the disk makes of it."""
    write_atomically(path, data)
    return FileDigest.of(data)


def index_of(files: Sequence[TensorFile]) -> bytes | None:
    """The index of a sharded checkpoint, to be written once its files are whole; None for a single file."""
    if len(files) == 1:
        return None
    index = {
        "metadata": {"total_size": sum(file.nbytes for file in files)},
        "weight_map": {output.name: Path(file.name).name for file in files for output in file.outputs},
    }
    return json.dumps(index, indent=2).encode()


class _Keeper:
    """Sees finished files onto the disk and lists them, one at a time, while the next one is written."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._thread = ThreadPoolExecutor(1, "keep")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def keep(self, file: TensorFile, digested: DigestedFile) -> None:
        """Waits for the file before."""
        self._wait()
        self._last = self._thread.submit(self._keep, file, digested)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._thread.shutdown()

    def _keep(self, file: TensorFile, digested: DigestedFile) -> None:
        self._journal.add(file.name, digested.keep(), file.layout)

    def _wait(self) -> None:
        if self._last:
            self._last.result()


def _row_blocks(output: Output) -> list[slice]:
    rows = output.shape[0] if output.shape else 1
    step = max(1, BLOCK_BYTES * rows // max(1, output_bytes(output)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _block(compute: Compute, task: tuple[Output, slice]) -> memoryview:
    """The bytes of one row block."""
    output, rows = task
    block = compute(output, rows)
    shape = (rows.stop - rows.start, *output.shape[1:]) if output.shape else ()
    dtype = SAFETENSORS_DTYPE[output.dtype]
    if tuple(block.shape) != shape or str(block.dtype) != f"torch.{dtype}":
        raise CheckpointInvalid.because(
            f"tensor {output.name}", f"{block.dtype} {list(block.shape)}", f"{dtype} {list(shape)}"
        )
    return block.contiguous().reshape(-1).view(torch.uint8).numpy().data


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


def _shards(outputs: Sequence[Output], limit: int) -> list[tuple[Output, ...]]:
    """Outputs in the order given, cut where a shard is full; within one, by descending item size."""
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        size = output_bytes(output)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += size
    return [tuple(sorted(shard, key=lambda output: -ITEM_BYTES[SAFETENSORS_DTYPE[output.dtype]])) for shard in shards]


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
