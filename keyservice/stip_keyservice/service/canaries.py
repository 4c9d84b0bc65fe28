"""Canaries: sessions that the model's developer knows the right answer to, each handed out once.

They come as a file of opaque items, are kept sealed under the epoch's data key, and leave in bundles: whoever draws one
deletes its row in the transaction of the release, so that no two enclaves ever get the same. Drawn in an order that was
shuffled when they were added, since a corpus has an order of its own.
"""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cbor2
from sqlalchemy import ColumnElement, Connection, delete, func, insert, select

from stip_keyservice.service import instances
from stip_keyservice.service.state.schema import canaries, grants
from stip_keyservice.service.vault import Vault
from stip_protocol import canonical
from stip_protocol.errors import ConfigurationError, FrameInvalid, InstanceRefused

ITEM_LIMIT = 4096
"""Bytes of the largest canary."""
POOL_LIMIT = 100_000
"""Canaries that one epoch may have left."""
FILE_LIMIT = 64 << 20
BUNDLE_BYTES = 40 << 10
"""Bytes of all canaries in one bundle, whose document has 64 KiB at most."""


def parse(path: Path) -> list[bytes]:
    """The items of a file: `.cbor`, a CBOR sequence (RFC 8742) of canonical items, or `.jsonl`, a JSON value a line.

    An item is handed out as the bytes that stand there. Raises `ConfigurationError`.
    """
    split = _FORMS.get(path.suffix)
    if split is None:
        raise ConfigurationError.because("canaries", path.name, f"a file that ends in {' or '.join(_FORMS)}")
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    if len(data) > FILE_LIMIT:
        raise ConfigurationError.because(path.name, "a larger file", f"at most {FILE_LIMIT} bytes")
    found: list[bytes] = []
    for item in split(data):
        if not 0 < len(item) <= ITEM_LIMIT:
            raise ConfigurationError.because(f"canary {len(found)}", f"{len(item)} bytes", f"1 to {ITEM_LIMIT}")
        found.append(item)
    if not 0 < len(found) <= POOL_LIMIT:
        raise ConfigurationError.because("canaries", len(found), f"1 to {POOL_LIMIT}")
    return found


def add(db: Connection, vault: Vault, instance: str, epoch: int, items: Sequence[bytes]) -> int:
    """Put more canaries into an epoch's pool; returns how many it has now. Raises `InstanceRefused`."""
    data_key = _data_key(db, instance, epoch)
    left = remaining(db, instance, epoch)
    if left + len(items) > POOL_LIMIT:
        raise InstanceRefused.because("canaries", left + len(items), f"at most {POOL_LIMIT} in one epoch")
    newest = db.execute(select(func.max(canaries.c.number)).where(*_of(instance, epoch))).scalar()
    first = 0 if newest is None else newest + 1
    shuffled = list(items)
    secrets.SystemRandom().shuffle(shuffled)
    rows = [
        {
            "instance": instance,
            "epoch": epoch,
            "number": number,
            "sealed": vault.seal(db, data_key, item, _row(instance, epoch, number)),
        }
        for number, item in enumerate(shuffled, first)
    ]
    db.execute(insert(canaries), rows)
    return left + len(items)


def draw(db: Connection, vault: Vault, instance: str, epoch: int, count: int) -> tuple[bytes, ...]:
    """Take at most `count` canaries out for good, fewer where the pool or a bundle's room ends. Raises
    `IntegrityError` where one was altered or moved."""
    if count == 0:
        return ()
    data_key = _data_key(db, instance, epoch)
    next_ones = select(canaries).where(*_of(instance, epoch)).order_by(canaries.c.number).limit(count)
    drawn: dict[int, bytes] = {}
    for row in db.execute(next_ones.with_for_update()).all():
        item = vault.open(db, data_key, row.sealed, _row(instance, epoch, row.number))
        if sum(map(len, drawn.values())) + len(item) > BUNDLE_BYTES:
            break
        drawn[row.number] = item
    db.execute(delete(canaries).where(*_of(instance, epoch), canaries.c.number.in_(drawn)))
    return tuple(drawn.values())


def remaining(db: Connection, instance: str, epoch: int) -> int:
    """Canaries that were not drawn yet."""
    return db.execute(select(func.count()).select_from(canaries).where(*_of(instance, epoch))).scalar_one()


def _data_key(db: Connection, instance: str, epoch: int) -> bytes:
    instances.by_id(db, instance)
    key = db.execute(select(grants.c.data_key).where(grants.c.instance == instance, grants.c.epoch == epoch)).scalar()
    if key is None:
        raise InstanceRefused.because(f"epoch {epoch}", "one that is not registered, or was removed", "a present one")
    return bytes(key)


def _of(instance: str, epoch: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return canaries.c.instance == instance, canaries.c.epoch == epoch


def _row(instance: str, epoch: int, number: int) -> list[object]:
    return ["canary", instance, epoch, number]


def _cbor_sequence(data: bytes) -> Iterator[bytes]:
    stream = io.BytesIO(data)
    decoder = cbor2.CBORDecoder(stream, max_depth=canonical.DEPTH_LIMIT, allow_indefinite=False)
    at = 0
    while at < len(data):
        try:
            decoder.decode()
            canonical.decode(data[at : stream.tell()], what=f"item at byte {at}")
        except (cbor2.CBORError, ValueError, FrameInvalid) as error:
            raise ConfigurationError(f"canaries: byte {at}: no item of canonical CBOR: {error}") from None
        yield data[at : stream.tell()]
        at = stream.tell()


def _json_lines(data: bytes) -> Iterator[bytes]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            raise ConfigurationError.because("canaries", f"line {number} is not JSON", "a JSON value a line") from None
        yield line.strip()


_FORMS: dict[str, Callable[[bytes], Iterator[bytes]]] = {".cbor": _cbor_sequence, ".jsonl": _json_lines}
