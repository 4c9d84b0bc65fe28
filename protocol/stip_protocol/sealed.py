"""Sealed files: how an enclave's tables lie on a disk that nobody trusts.

Chunked AES-256-GCM (NIST SP 800-38D), so that a table larger than memory streams both ways:

    offset  size   field
    0       8      magic "STIPSEAL"
    8       4      format version, big-endian (1)
    12      4      chunk_bytes, big-endian: plaintext bytes of every chunk but the last
    16      32     salt, random per written file
    48      ...    chunks: ciphertext ‖ 16-byte tag

The file's key is HKDF-SHA256 (RFC 5869) of the instance's part key with the header's salt and info
`"stip/sealed/" + file name`; the salt makes each written file a key of its own, so that the counter nonces
(the chunk's index, 96 bits) never repeat under one key even where a file is written twice. The associated
data of a chunk is the canonical CBOR of `[instance, epoch, preset, file, chunk index, last]`: a chunk opens
only at its place in its file of its instance, and the `last` flag makes a file that was cut or extended at a
chunk border fail. The header needs no tag of its own: another salt is another key, another chunk size moves
every border. A file always has one last chunk; only an empty file has an empty one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from stip_protocol import canonical
from stip_protocol.errors import SealedPartInvalid

MAGIC = b"STIPSEAL"
FORMAT_VERSION = 1
KEY_BYTES = 32
TAG_BYTES = 16
SALT_BYTES = 32
HEADER_BYTES = len(MAGIC) + 4 + 4 + SALT_BYTES
CHUNK_BYTES = 1 << 20
CHUNK_LIMIT = 1 << 24
"""Bytes of the largest chunk a reader accepts: bounds what a forged header can make it allocate."""
CHUNKS_LIMIT = 1 << 32
"""Chunks of the longest file: the bound of SP 800-38D on invocations under one key, kept although nonces count."""
_NONCE_BYTES = 12


class Sink(Protocol):
    """What takes bytes in order: a file, a file that is hashed as it is written."""

    def write(self, data: bytes, /) -> object: ...


class SealedStream:
    """Seals what is written to it, into `sink`.

    `key` is the instance's part key (32 bytes); `file`, the name that the file will have, is bound into every chunk.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        key: bytes,
        instance: str,
        epoch: int,
        preset: str,
        file: str,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        _require_chunk_bytes(chunk_bytes)
        salt = secrets.token_bytes(SALT_BYTES)
        self._sink = sink
        self._chunks = _Chunks(key, salt, instance, epoch, preset, file)
        self._chunk_bytes = chunk_bytes
        self._pending = bytearray()
        self._index = 0
        sink.write(MAGIC + FORMAT_VERSION.to_bytes(4, "big") + chunk_bytes.to_bytes(4, "big") + salt)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append plaintext; returns its length in bytes."""
        view = memoryview(data).cast("B")
        taken = 0
        while taken < len(view):
            if len(self._pending) == self._chunk_bytes:  # more data follows, so this is not the last chunk
                self._emit(last=False)
            step = min(len(view) - taken, self._chunk_bytes - len(self._pending))
            self._pending += view[taken : taken + step]
            taken += step
        return taken

    def end(self) -> None:
        """Write the last chunk: without it nothing opens."""
        self._emit(last=True)

    def _emit(self, *, last: bool) -> None:
        self._sink.write(self._chunks.seal(self._pending, self._index, last))
        self._pending.clear()
        self._index += 1


class SealedWriter:
    """Writes one sealed file; a context manager.

    The file appears under `path` when the block ends without an exception, whole and atomically; until then it
    is `<path>.partial`, which an exception removes.
    """

    def __init__(
        self, path: Path, *, key: bytes, instance: str, epoch: int, preset: str, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        _require_chunk_bytes(chunk_bytes)
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._seal: Callable[[Sink], SealedStream] = lambda sink: SealedStream(
            sink, key=key, instance=instance, epoch=epoch, preset=preset, file=path.name, chunk_bytes=chunk_bytes
        )

    def __enter__(self) -> SealedStream:
        self._file = self._partial.open("xb")
        try:
            self._stream = self._seal(self._file)
        except BaseException:
            self._discard()
            raise
        return self._stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._stream.end()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._partial.replace(self._path)
        finally:
            self._discard()

    def _discard(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def open_sealed(
    source: Path | BinaryIO, *, key: bytes, instance: str, epoch: int, preset: str, file: str
) -> Iterator[bytes]:
    """The plaintext of a sealed file, chunk by chunk: each chunk is verified before it is given out.

    Only the last one proves that the file is whole: use nothing before the iteration has ended. Raises
    `SealedPartInvalid` for a file that cannot be read, was changed, cut, extended or reordered, or belongs to
    another key, instance, epoch, preset or file name.
    """
    with _open(source, file) as stream:
        chunk_bytes, salt = _read_header(stream, file)
        chunks = _Chunks(key, salt, instance, epoch, preset, file)
        index = 0
        current = _read(stream, chunk_bytes + TAG_BYTES, file)
        while True:
            following = _read(stream, chunk_bytes + TAG_BYTES, file) if current else b""
            yield chunks.open(current, index, last=not following)
            if not following:
                return
            current = following
            index += 1


def read_sealed(
    source: Path | BinaryIO, *, key: bytes, instance: str, epoch: int, preset: str, file: str, limit: int | None = None
) -> bytearray:
    """The whole plaintext of a sealed file, in memory that is allocated once the first chunk has been verified.

    `limit`: bytes of plaintext at most. Raises `SealedPartInvalid`, and gives nothing of a file that is not whole.
    """
    with _open(source, file) as stream:
        start = stream.tell() if stream.seekable() else None
        size = 0 if start is None else _plaintext_size(stream, start, file)
        if limit is not None and size > limit:
            raise SealedPartInvalid.because(f"{file} size", size, f"at most {limit} bytes")
        plain: bytearray | None = None
        filled = 0
        for chunk in open_sealed(stream, key=key, instance=instance, epoch=epoch, preset=preset, file=file):
            if plain is None:
                plain = bytearray(size)
            plain[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
            if limit is not None and filled > limit:
                raise SealedPartInvalid.because(f"{file} size", f"over {limit}", f"at most {limit} bytes")
        if plain is None or len(plain) != filled:
            raise SealedPartInvalid.because(f"{file} size", filled, size)
        return plain


class _Chunks:
    """Seals and opens the chunks of one file under its key."""

    def __init__(self, key: bytes, salt: bytes, instance: str, epoch: int, preset: str, file: str) -> None:
        if len(key) != KEY_BYTES:
            raise SealedPartInvalid.because("part key", f"{len(key)} bytes", f"{KEY_BYTES} bytes")
        info = b"stip/sealed/" + file.encode()
        self._cipher = AESGCM(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(key))
        self._place = [instance, epoch, preset, file]
        self._file = file

    def seal(self, plain: bytes | bytearray, index: int, last: bool) -> bytes:
        if index >= CHUNKS_LIMIT:
            raise SealedPartInvalid.because(f"{self._file} chunks", index + 1, f"at most {CHUNKS_LIMIT}")
        return self._cipher.encrypt(self._nonce(index), plain, self._bound(index, last))

    def open(self, sealed: bytes, index: int, last: bool) -> bytes:
        try:
            return self._cipher.decrypt(self._nonce(index), sealed, self._bound(index, last))
        except InvalidTag:
            raise SealedPartInvalid(
                f"{self._file} chunk {index}: changed, cut, moved, or sealed for another instance, epoch or preset",
                field=self._file,
            ) from None

    def _nonce(self, index: int) -> bytes:
        return index.to_bytes(_NONCE_BYTES, "big")

    def _bound(self, index: int, last: bool) -> bytes:
        return canonical.encode([*self._place, index, last])


def _require_chunk_bytes(chunk_bytes: int) -> None:
    if not 1 <= chunk_bytes <= CHUNK_LIMIT:
        raise SealedPartInvalid.because("chunk_bytes", chunk_bytes, f"1 to {CHUNK_LIMIT}")


def _open(source: Path | BinaryIO, file: str) -> BinaryIO | nullcontext[BinaryIO]:
    if not isinstance(source, Path):
        return nullcontext(source)
    try:
        return source.open("rb")
    except OSError as error:
        raise SealedPartInvalid(f"{file}: {error.strerror}", field=file) from None


def _read(stream: BinaryIO, size: int, file: str) -> bytes:
    """`size` bytes, or fewer at the end of the file: sockets and pipes may give less at a time."""
    try:
        data = stream.read(size)
        while data and len(data) < size and (more := stream.read(size - len(data))):
            data += more
    except OSError as error:
        raise SealedPartInvalid(f"{file}: {error.strerror}", field=file) from None
    return data


def _read_header(stream: BinaryIO, file: str) -> tuple[int, bytes]:
    header = _read(stream, HEADER_BYTES, file)
    if len(header) != HEADER_BYTES or not header.startswith(MAGIC):
        raise SealedPartInvalid.because(f"{file} header", "another format", "a sealed file")
    version, chunk_bytes = int.from_bytes(header[8:12], "big"), int.from_bytes(header[12:16], "big")
    if version != FORMAT_VERSION:
        raise SealedPartInvalid.because(f"{file} format version", version, FORMAT_VERSION)
    if not 1 <= chunk_bytes <= CHUNK_LIMIT:
        raise SealedPartInvalid.because(f"{file} chunk_bytes", chunk_bytes, f"1 to {CHUNK_LIMIT}")
    return chunk_bytes, header[16:]


def _plaintext_size(stream: BinaryIO, start: int, file: str) -> int:
    """Bytes that a whole file of this length holds. Leaves the stream at `start`."""
    chunk_bytes, _ = _read_header(stream, file)
    body = stream.seek(0, os.SEEK_END) - start - HEADER_BYTES
    stream.seek(start)
    chunks = -(-body // (chunk_bytes + TAG_BYTES))
    if body < TAG_BYTES:
        raise SealedPartInvalid.because(f"{file} size", f"{body} bytes of chunks", f"at least {TAG_BYTES}")
    return max(0, body - chunks * TAG_BYTES)
