"""A sealed file opens whole, under its own name and keys, or not at all."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol.errors import SealedPartInvalid
from stip_protocol.sealed import CHUNK_LIMIT, HEADER_BYTES, TAG_BYTES, SealedWriter, open_sealed, read_sealed

KEY = bytes(range(32))
PLACE: dict[str, Any] = {"key": KEY, "instance": "0" * 31 + "a", "epoch": 3, "preset": "hardened"}
OPENING = {**PLACE, "file": "embedding.sealed"}
CHUNK = 16


def seal(folder: Path, plain: bytes, *, chunk: int = CHUNK, pieces: int = 7, name: str = "embedding.sealed") -> bytes:
    path = folder / name
    path.unlink(missing_ok=True)
    with SealedWriter(path, chunk_bytes=chunk, **PLACE) as writer:
        for start in range(0, len(plain), pieces):
            writer.write(plain[start : start + pieces])
    return path.read_bytes()


def opened(data: bytes, **changed: Any) -> bytes:
    arguments = OPENING | changed
    whole = read_sealed(io.BytesIO(data), **arguments)
    assert b"".join(open_sealed(io.BytesIO(data), **arguments)) == whole
    return bytes(whole)


def refused(data: bytes, **changed: Any) -> None:
    with pytest.raises(SealedPartInvalid):
        read_sealed(io.BytesIO(data), **(OPENING | changed))
    with pytest.raises(SealedPartInvalid):
        list(open_sealed(io.BytesIO(data), **(OPENING | changed)))


def chunks_of(data: bytes) -> list[bytes]:
    body, step = data[HEADER_BYTES:], CHUNK + TAG_BYTES
    return [body[start : start + step] for start in range(0, len(body), step)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sealed")


@pytest.fixture(scope="module")
def sealed(folder: Path) -> bytes:
    return seal(folder, bytes(range(70)))


@given(plain=st.binary(max_size=200), chunk=st.integers(1, 64), pieces=st.integers(1, 100))
def test_what_was_sealed_opens_whatever_the_pieces(folder: Path, plain: bytes, chunk: int, pieces: int) -> None:
    data = seal(folder, plain, chunk=chunk, pieces=pieces)
    assert opened(data) == plain
    assert len(data) == HEADER_BYTES + len(plain) + TAG_BYTES * max(1, -(-len(plain) // chunk))


def test_a_file_and_a_pipe_open_alike(folder: Path, sealed: bytes) -> None:
    (folder / "embedding.sealed").write_bytes(sealed)
    assert read_sealed(folder / "embedding.sealed", **OPENING) == bytes(range(70))
    reading, writing = os.pipe()

    def feed() -> None:
        with open(writing, "wb") as pipe:
            pipe.write(sealed)

    feeder = threading.Thread(target=feed)
    feeder.start()
    with open(reading, "rb", buffering=0) as pipe:
        assert read_sealed(pipe, **OPENING) == bytes(range(70))
    feeder.join()


@given(data=st.data())
def test_a_changed_bit_anywhere_is_refused(sealed: bytes, data: st.DataObject) -> None:
    position, bit = data.draw(st.integers(0, len(sealed) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(sealed)
    changed[position] ^= 1 << bit
    refused(bytes(changed))


@given(data=st.data())
def test_a_cut_anywhere_is_refused(sealed: bytes, data: st.DataObject) -> None:
    refused(sealed[: data.draw(st.integers(0, len(sealed) - 1))])


@pytest.mark.parametrize("kept", range(5))
def test_a_cut_at_a_chunk_border_is_refused(sealed: bytes, kept: int) -> None:
    refused(sealed[:HEADER_BYTES] + b"".join(chunks_of(sealed)[:kept]))


@given(data=st.data())
def test_chunks_in_another_order_are_refused(sealed: bytes, data: st.DataObject) -> None:
    chunks = chunks_of(sealed)
    order = data.draw(st.permutations(range(len(chunks))).filter(lambda found: found != sorted(found)))
    refused(sealed[:HEADER_BYTES] + b"".join(chunks[place] for place in order))


@given(data=st.data())
def test_a_repeated_or_missing_chunk_is_refused(sealed: bytes, data: st.DataObject) -> None:
    chunks = chunks_of(sealed)
    place = data.draw(st.integers(0, len(chunks) - 1))
    refused(sealed[:HEADER_BYTES] + b"".join([*chunks[:place], chunks[place], *chunks[place:]]))
    refused(sealed[:HEADER_BYTES] + b"".join([*chunks[:place], *chunks[place + 1 :]]))


@given(extra=st.binary(min_size=1, max_size=80))
def test_an_extended_file_is_refused(sealed: bytes, extra: bytes) -> None:
    refused(sealed + extra)


def test_a_chunk_of_another_file_under_the_same_keys_is_refused(folder: Path, sealed: bytes) -> None:
    again = seal(folder, bytes(range(70)))
    other = seal(folder, bytes(range(70)), name="head.sealed")
    for foreign in (again, other):
        assert foreign[HEADER_BYTES:] != sealed[HEADER_BYTES:]
        refused(sealed[:HEADER_BYTES] + chunks_of(foreign)[0] + b"".join(chunks_of(sealed)[1:]))
    refused(other)


@pytest.mark.parametrize(
    "changed",
    [
        {"key": bytes(32)},
        {"key": KEY[:16]},
        {"instance": "0" * 32},
        {"epoch": 4},
        {"preset": "paper"},
        {"file": "positions.sealed"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_key_instance_epoch_preset_or_file_is_refused(sealed: bytes, changed: dict[str, Any]) -> None:
    refused(sealed, **changed)


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK_LIMIT + 1, 0xFFFFFFFF])
def test_a_forged_chunk_size_is_refused_before_memory_is_taken_for_it(sealed: bytes, chunk_bytes: int) -> None:
    refused(sealed[:12] + chunk_bytes.to_bytes(4, "big") + sealed[16:])


def test_another_format_version_is_refused_by_name(sealed: bytes) -> None:
    with pytest.raises(SealedPartInvalid, match="format version: got 2, allowed: 1"):
        read_sealed(io.BytesIO(sealed[:8] + (2).to_bytes(4, "big") + sealed[12:]), **OPENING)


def test_more_plaintext_than_the_limit_is_refused(sealed: bytes) -> None:
    assert len(read_sealed(io.BytesIO(sealed), **OPENING, limit=70)) == 70
    with pytest.raises(SealedPartInvalid, match="at most 69"):
        read_sealed(io.BytesIO(sealed), **OPENING, limit=69)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SealedPartInvalid, match="No such file"):
        read_sealed(tmp_path / "embedding.sealed", **OPENING)


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK_LIMIT + 1])
def test_a_writer_refuses_chunks_no_reader_takes(tmp_path: Path, chunk_bytes: int) -> None:
    with pytest.raises(SealedPartInvalid, match="chunk_bytes"):
        SealedWriter(tmp_path / "embedding.sealed", chunk_bytes=chunk_bytes, **PLACE)


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with SealedWriter(tmp_path / "embedding.sealed", **PLACE) as writer:
            writer.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_errors_and_reprs_hold_no_key(tmp_path: Path, sealed: bytes) -> None:
    secret = bytes(range(200, 232))
    with pytest.raises(SealedPartInvalid) as caught:
        read_sealed(io.BytesIO(sealed), **(OPENING | {"key": secret}))
    writer = SealedWriter(tmp_path / "embedding.sealed", **(PLACE | {"key": secret}))
    for text in (str(caught.value), repr(caught.value), repr(writer)):
        assert secret.hex() not in text
        assert repr(secret)[2:-1] not in text
