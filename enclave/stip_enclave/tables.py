"""The enclave part of an instance: sealed files opened once, rows handed out as bytes.

Tables hold *keyed* rows, indexed by true ids. A lookup moves raw bytes and never converts; only where learned
positions are added is there arithmetic, in the native dtype, rounded as torch rounds it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from stip_enclave.substitution import Substitution, require_ids
from stip_protocol.errors import ManifestMismatch, PositionRefused, SealedPartInvalid
from stip_protocol.manifest import FileDigest, Manifest, file_digest
from stip_protocol.release import Grant
from stip_protocol.sealed import read_sealed
from stip_protocol.tensor import SAFETENSORS_DTYPE, row_bytes
from stip_protocol.wire import model_pb2

NUMPY_DTYPE: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Our dtype names, which are torch's, to NumPy's."""
HEADER_LIMIT = 1 << 16
"""Bytes of the longest safetensors header of a file with one tensor."""
EMBEDDING, POSITIONS, HEAD, HEAD_BIAS = "embedding", "positions", "head", "head_bias"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SealedTensor:
    """One tensor of the enclave part: its plaintext file in memory, and an array over it."""

    plain: bytearray
    array: NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class EnclavePart:
    """Everything an instance's enclave part holds."""

    embedding: SealedTensor = field(repr=False)
    positions: SealedTensor | None = field(repr=False)
    head: SealedTensor | None = field(repr=False)
    head_bias: SealedTensor | None = field(repr=False)


class Tables:
    """Ids and positions to keyed rows."""

    def __init__(self, part: EnclavePart) -> None:
        self._embedding = part.embedding.array
        self._positions = None if part.positions is None else part.positions.array
        vocabulary, width = self._embedding.shape
        self.vocabulary = vocabulary
        self._raw = self._embedding.view(np.uint8).reshape(vocabulary, width * self._embedding.itemsize)

    def feed(
        self, slices: list[model_pb2.Slice], ids: NDArray[np.uint32], positions: NDArray[np.int64]
    ) -> model_pb2.Feed:
        """A frame of the keyed rows of `ids` [n] at `positions` [n]."""
        return model_pb2.Feed(slices=slices, rows=self.rows(ids, positions))

    def rows(self, ids: NDArray[Any], positions: NDArray[Any]) -> bytes:
        """The keyed rows of `ids` [n] at `positions` [n]: n·d elements of the native dtype, row-major.

        Raises `RequestInvalid` or `PositionRefused` where one is out of the tables, and says no more of it.
        """
        self.require_ids(ids)
        if self._positions is None:
            return bytes(self._raw[ids].data)
        if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < len(self._positions):
            raise PositionRefused.because("position", "one outside the table", f"0 to {len(self._positions) - 1}")
        return bytes((self._embedding[ids] + self._positions[positions]).view(np.uint8).data)

    def require_ids(self, ids: NDArray[Any]) -> None:
        """Raise `RequestInvalid` unless every id is in the vocabulary."""
        require_ids(ids, self.vocabulary)


def open_part(folder: Path, manifest: Manifest, manifest_digest: bytes, grant: Grant) -> EnclavePart:
    """Open `folder` (an instance's `enclave/`) with the grant's key.

    Raises what `require_grant` does, and `SealedPartInvalid` for a file that is missing, unlisted, changed, cut, moved
    or of another shape.
    """
    require_grant(grant, manifest, manifest_digest)
    shapes = _shapes(manifest)
    found: dict[str, SealedTensor] = {}
    for file, digest in sorted(manifest.enclave.items()):
        name = file.removesuffix(".sealed")
        if name not in shapes or name == file:
            raise SealedPartInvalid.because("enclave part", f"a file named {file}", sorted(shapes))
        found[name] = _open(folder / file, digest, name, shapes[name], manifest, grant)
    wanted = {EMBEDDING, HEAD} if manifest.output == "hidden" else {EMBEDDING}
    if missing := sorted(wanted - found.keys()):
        raise SealedPartInvalid.because("enclave part", f"no {missing[0]}.sealed", "one")
    return EnclavePart(found[EMBEDDING], found.get(POSITIONS), found.get(HEAD), found.get(HEAD_BIAS))


def open_substitution(manifest: Manifest, manifest_digest: bytes, grant: Grant) -> Substitution:
    """What the enclave holds of an instance whose server decodes alone: π_c, and no tables.

    Raises what `require_grant` does, `ManifestMismatch` for a grant without a vocabulary seed, and `SealedPartInvalid`
    for a manifest that lists tables all the same.
    """
    require_grant(grant, manifest, manifest_digest)
    if manifest.enclave:
        raise SealedPartInvalid.because("enclave part", f"{len(manifest.enclave)} files", "none: the server holds all")
    return Substitution(require_seed(grant), manifest.vocabulary)


def require_seed(grant: Grant) -> bytes:
    """The seed of π_c. Raises `ManifestMismatch` where the grant has none."""
    if grant.vocabulary_seed is None:
        raise ManifestMismatch.because("grant vocabulary_seed", "none", "one: this instance's head is outside")
    return grant.vocabulary_seed


def require_grant(grant: Grant, manifest: Manifest, manifest_digest: bytes) -> None:
    """Raise `ManifestMismatch` where the grant is for another instance, epoch, preset or manifest."""
    for name, got, allowed in (
        ("instance", grant.instance, manifest.instance),
        ("epoch", grant.epoch, manifest.epoch),
        ("preset", grant.preset, manifest.preset),
        ("manifest_digest", grant.manifest_digest.hex(), manifest_digest.hex()),
    ):
        if got != allowed:
            raise ManifestMismatch.because(f"grant {name}", got, allowed)


def as_numbers(array: NDArray[Any]) -> NDArray[Any]:
    """float32 of half-precision values, which is exact; float32 and float64 as they are."""
    return array.astype(np.float32) if array.itemsize == 2 else array


def _shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """The least shape of each tensor an enclave part may hold; positions may go on beyond the instance's limit."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (manifest.vocabulary, manifest.width),
        POSITIONS: (manifest.max_positions, manifest.width),
    }
    if manifest.output == "hidden":
        shapes |= {HEAD: (manifest.vocabulary, manifest.width), HEAD_BIAS: (manifest.vocabulary,)}
    return shapes


def _open(
    path: Path, digest: FileDigest, name: str, shape: tuple[int, ...], manifest: Manifest, grant: Grant
) -> SealedTensor:
    try:
        present = file_digest(path)
    except OSError as error:
        raise SealedPartInvalid(f"{path.name}: {error.strerror}", field=path.name) from None
    if present != digest:
        raise SealedPartInvalid(f"{path.name}: its digest differs from the signed manifest's", field=path.name)
    # The digest says early and clearly what the authenticated chunks would say too: a host that changes the file
    # between the two reads gains nothing.
    plain = read_sealed(
        path,
        key=grant.part_key,
        instance=manifest.instance,
        epoch=manifest.epoch,
        preset=manifest.preset,
        file=path.name,
        limit=digest.size,
    )
    return SealedTensor(plain, _tensor(plain, name, manifest.dtype, shape))


def _tensor(plain: bytearray, name: str, dtype: str, least: tuple[int, ...]) -> NDArray[Any]:
    """The one tensor of a safetensors file (8 bytes of header length, JSON, data), over the same memory."""
    length = int.from_bytes(plain[:8], "little")
    if not 0 < length <= min(HEADER_LIMIT, len(plain) - 8):
        raise SealedPartInvalid.because(f"{name} header", "another length", "a safetensors header")
    try:
        header = json.loads(plain[8 : 8 + length])
        header.pop("__metadata__", None)
        entry = header.pop(name)
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        good = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SealedPartInvalid(f"{name}: not a safetensors file that holds this tensor", field=name) from None
    if header:
        raise SealedPartInvalid.because(name, f"{len(header)} more tensors", "one tensor")
    if SAFETENSORS_DTYPE.get(entry.get("dtype")) != dtype:
        raise SealedPartInvalid.because(f"{name} dtype", "another dtype", dtype)
    rows_good = good and len(shape) == len(least) and shape[1:] == least[1:]
    if not rows_good or (shape[0] < least[0] if name == POSITIONS else shape[0] != least[0]):
        raise SealedPartInvalid.because(f"{name} shape", "another shape", list(least))
    size = shape[0] * row_bytes(dtype, shape[1] if len(shape) == 2 else 1)
    if (begin, end) != (0, size) or len(plain) - 8 - length != size:
        raise SealedPartInvalid.because(f"{name} data", f"{len(plain) - 8 - length} bytes", f"{size}")
    return np.frombuffer(plain, NUMPY_DTYPE[dtype], offset=8 + length).reshape(shape)
