"""Reading a plain checkpoint: a local Hugging Face folder of safetensors, one file or sharded.

Everything that the files announce is checked before anything is allocated for it: the format is the one of
https://huggingface.co/docs/safetensors (8 bytes little-endian header length, a JSON header of at most 100 MB,
then one buffer that the tensors' offsets tile without holes). Pickled checkpoints are never read: unpickling
runs code of whoever wrote the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from safetensors import SafetensorError, safe_open

from stip_keyservice.protect.plan import TensorHeader
from stip_protocol.errors import CheckpointInvalid

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
"""Bytes of the largest header: the format's own limit (MAX_HEADER_SIZE of the reference reader)."""
JSON_LIMIT = 16 << 20
"""Bytes of the largest configuration file read."""
NAME_LIMIT = 512
"""Characters of the longest tensor name. Names go into messages, so they are printable too."""
INDEX_LIMIT = 64 << 20
"""Bytes of the largest shard index read."""
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
"""Bytes of an element. Only floating point can be protected, which the plan checks tensor by tensor; integers
and booleans are known here because old checkpoints carry such buffers, which a family drops by name."""


class Checkpoint:
    """A plain checkpoint whose configuration and headers have been read and checked; tensors are read on demand.

    A `TensorSource`: rows come in their stored dtype, on the CPU, and only the asked rows are read.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        headers: Mapping[str, TensorHeader],
        files: Mapping[str, Path],
    ) -> None:
        self.directory = directory
        self.config = config
        self.generation_config = generation_config
        """Empty where the folder has none."""
        self.headers = headers
        self._files = files
        self._handles: dict[Path, Any] = {}

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read configuration and headers. Raises `CheckpointInvalid` naming the file or tensor that is wrong."""
        if not directory.is_dir():
            raise CheckpointInvalid.because("model", "no such folder", "a local folder of safetensors")
        config = read_json(directory / CONFIG)
        generation = directory / GENERATION_CONFIG
        headers, files = _headers(directory)
        return cls(directory, config, read_json(generation) if generation.exists() else {}, headers, files)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) along the first axis."""
        try:
            rows: torch.Tensor = self._file(name).get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            self._unreadable(name, error)
        return rows

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        try:
            tensor: torch.Tensor = self._file(name).get_tensor(name)
        except (SafetensorError, OSError) as error:
            self._unreadable(name, error)
        return tensor

    def _file(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt", device="cpu")
        return self._handles[path]

    def _unreadable(self, name: str, error: Exception) -> NoReturn:
        raise CheckpointInvalid(
            f"{self._files[name].name}, tensor {name}: cannot be read ({type(error).__name__})", field=name
        ) from None


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointInvalid`."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointInvalid(f"{path.name}: {error.strerror}", field=path.name) from None
    if len(data) > limit:
        raise CheckpointInvalid.because(path.name, "a larger file", f"at most {limit} bytes")
    return _json_object(data, path.name)


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors that one safetensors file holds, by name. Raises `CheckpointInvalid`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > HEADER_LIMIT:
                allowed = f"8 to {HEADER_LIMIT} bytes after a length of 8 bytes"
                raise CheckpointInvalid.because(f"{path.name} header", f"{length} bytes of {size}", allowed)
            if length > size - 8:
                raise CheckpointInvalid.because(
                    f"{path.name} size", f"{size} bytes", f"at least {8 + length} for its header: is the file cut?"
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointInvalid(f"{path.name}: {error.strerror}", field=path.name) from None
    return _parse_header(header, size - 8 - length, path.name)


def _parse_header(header: bytes, body: int, file: str) -> dict[str, TensorHeader]:
    entries = _json_object(header, f"{file} header")
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
    return headers


def _parse_entry(name: str, entry: Any, what: str) -> tuple[TensorHeader, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointInvalid.because(what, "another form", "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointInvalid.because(f"{what} dtype", ascii(dtype)[:16], "F64, F32, F16, BF16")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointInvalid.because(f"{what} shape and data_offsets", "other values", "natural numbers")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        got = f"{offsets[1] - offsets[0]} bytes"
        raise CheckpointInvalid.because(f"{what} data_offsets", got, f"{expected} ({dtype} {shape})")
    return TensorHeader(name, dtype, tuple(shape)), (offsets[0], offsets[1])


def _headers(directory: Path) -> tuple[dict[str, TensorHeader], dict[str, Path]]:
    """(headers, the file of each tensor). As in Hugging Face, one whole file goes before an index."""
    if (whole := directory / WEIGHTS).exists():
        headers = read_headers(whole)
        return headers, dict.fromkeys(headers, whole)
    if (index := directory / INDEX).exists():
        return _sharded(directory, index)
    present = sorted(path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    got = f"{present[0]}, a pickle that could run code" if present else "no weights"
    raise CheckpointInvalid.because("model", got, f"{WEIGHTS} or {INDEX} (save with safe_serialization=True)")


def _sharded(directory: Path, index: Path) -> tuple[dict[str, TensorHeader], dict[str, Path]]:
    weight_map = read_json(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointInvalid.because(f"{INDEX} weight_map", "other values", "a map of tensor names to files")
    headers: dict[str, TensorHeader] = {}
    files: dict[str, Path] = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if path.name != shard or not path.is_file():
            what = f"{INDEX}, shard {ascii(shard)[:130]}"
            raise CheckpointInvalid.because(what, "no such file", "a file beside the index")
        for name, header in read_headers(path).items():
            if name in files:
                raise CheckpointInvalid.because(f"tensor {name}", f"{files[name].name} and {shard}", "one shard")
            if weight_map.get(name) != shard:
                got = f"in {shard}, {'another file' if name in weight_map else 'not'} in the index"
                raise CheckpointInvalid.because(f"tensor {name}", got, f"the file that {INDEX} names")
            headers[name], files[name] = header, path
    if missing := sorted(weight_map.keys() - headers.keys()):
        what = f"{INDEX}, tensor {ascii(missing[0])[:130]}"
        raise CheckpointInvalid.because(what, f"not in {weight_map[missing[0]]}", "a tensor of that file")
    return headers, files


def _json_object(data: bytes, what: str) -> dict[str, Any]:
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


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
