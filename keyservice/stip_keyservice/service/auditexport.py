"""The audit log as one file, for somebody who has neither the database nor the key service.

JSON lines (RFC 8259 texts, one a line, in this order):

    {"format": "stip/audit-export", "version": [1, 0], "service": "<id, hex>", "public_key": "<Ed25519, hex>", "at": …}
    {"entry": "<base64 of an AuditEntry in canonical CBOR>"}                                        one an entry
    {"head": "<base64 of the signed AuditHead>", "entries": …}

The entries stand as they were hashed and nothing beside them, so that nobody reads what no hash covers; `audit-log
list --export` shows them. Written and read as a stream: a log of any length takes the memory of one line. Who verifies
brings the service's public key: the one in the file says only which service the file claims to be of.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select

from stip_keyservice.service.auditlog import GENESIS, AuditEntry, ChainEnd, KnownHead, StoredEntry, follow, require_end
from stip_keyservice.service.state.schema import audit, audit_head
from stip_keyservice.service.state.store import Store
from stip_protocol.documents import Signed
from stip_protocol.errors import ConfigurationError, FrameInvalid, IntegrityError, VersionUnsupported
from stip_protocol.heads import FILE_LIMIT, Heads
from stip_protocol.release import AuditHead, service_id
from stip_protocol.runtime.files import read_file

FORMAT, MAJOR = "stip/audit-export", 1
LINE_LIMIT = 8192
"""Bytes of the longest line: an entry has less than 1 KiB."""


@dataclass(frozen=True)
class Verified:
    """What an export that holds establishes."""

    service: bytes
    exported_at: int
    head: AuditHead


def write(store: Store, key: Ed25519PublicKey, out: Path, *, now: int) -> ChainEnd:
    """Export the whole log, verified on the way, to a new file (mode 0600).

    Raises `ConfigurationError` where the file exists or cannot be written, and what `auditlog.verify` raises.
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.exists():
            raise ConfigurationError.because("export", f"{out}, which exists", "a new file")
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file, store.read() as db:
                header = {"format": FORMAT, "version": [MAJOR, 0], "service": service_id(key).hex()}
                file.write(_line(header | {"public_key": key.public_bytes_raw().hex(), "at": now}))

                def written() -> Iterator[StoredEntry]:
                    for row in db.execute(select(audit).order_by(audit.c.sequence)).yield_per(1000):
                        file.write(_line({"entry": base64.b64encode(row.entry).decode()}))
                        yield StoredEntry(row.entry, row.sequence, row.hash)

                end = follow(written(), key)
                signed = db.execute(select(audit_head.c.signed)).scalar()
                if signed is not None:
                    require_end(signed, key, end)
                elif end.sequence:
                    raise IntegrityError("audit head: missing, though the log has entries")
                head = None if signed is None else base64.b64encode(signed).decode()
                file.write(_line({"head": head, "entries": end.sequence}))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"export: {out}: {error.strerror}") from None
    return end


def verify_file(path: Path, key: Ed25519PublicKey, heads: Sequence[KnownHead] = ()) -> Verified:
    """Verify an export with nothing but the service's public key, and heads that were kept elsewhere.

    Raises `IntegrityError` (cut, edited, of another service), `AuditLogForked`, `SignatureInvalid`,
    `VersionUnsupported`, `ConfigurationError` where the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            lines = _Lines(file)
            header = _header(lines.next_document())
            if header.get("service") != service_id(key).hex():
                raise IntegrityError("audit export: of another key service than the public key's")
            end = follow(lines.entries(), key, heads)
            trailer = lines.trailer
            if file.read(1):
                raise IntegrityError("audit export: goes on after its head")
    except OSError as error:
        raise ConfigurationError(f"export: {path}: {error.strerror}") from None
    if trailer.get("entries") != end.sequence:
        raise IntegrityError.because("audit export", f"{end.sequence} entries", f"{trailer.get('entries')!a:.20}")
    if trailer["head"] is None:
        if end.sequence:
            raise IntegrityError("audit head: missing, though the log has entries")
        head = AuditHead(sequence=0, hash=GENESIS, at=0)
    else:
        head = require_end(_bytes(trailer["head"], "head"), key, end)
    return Verified(service_id(key), header["at"], head)


def entries_of(path: Path) -> Iterator[AuditEntry]:
    """The entries of an export, oldest first, unverified. Raises `IntegrityError`, `ConfigurationError`."""
    try:
        with path.open("rb") as file:
            lines = _Lines(file)
            _header(lines.next_document())
            for stored in lines.entries():
                try:
                    yield AuditEntry.from_bytes(stored.entry)
                except FrameInvalid:
                    raise IntegrityError(f"audit export, line {lines.number}: not an entry") from None
    except OSError as error:
        raise ConfigurationError(f"export: {path}: {error.strerror}") from None


def read_heads(paths: Sequence[Path], key: Ed25519PublicKey) -> list[KnownHead]:
    """Heads as clients keep them (`stip_protocol.heads`).

    Raises `ConfigurationError` where a file cannot be read, holds something else, or is about another service.
    """
    found = []
    for path in paths:
        try:
            kept = Heads.from_json(read_file(path, field="heads", limit=FILE_LIMIT))
            if kept.service != service_id(key):
                raise ConfigurationError.because(f"heads {path.name}", "heads of another key service", "this one's")
            for number, head in enumerate(kept.heads, 1):
                found.append(KnownHead(f"head {number} of {path.name}", Signed.from_bytes(head)))
        except FrameInvalid as error:
            raise ConfigurationError(f"heads {path.name}: {error.message}") from None
    return found


class _Lines:
    """The documents of an export, bounded line by line."""

    def __init__(self, file: Any) -> None:
        self._file, self.number = file, 0
        self.trailer: dict[str, Any] = {}

    def next_document(self) -> dict[str, Any]:
        line = self._file.readline(LINE_LIMIT + 1)
        self.number += 1
        if not line.endswith(b"\n") or len(line) > LINE_LIMIT:
            got = "a line too long" if len(line) > LINE_LIMIT else "the end of the file"
            raise IntegrityError.because(f"audit export, line {self.number}", got, "entries, and the signed head: cut?")
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):  # JSON's errors quote their input
            document = None
        if not isinstance(document, dict):
            raise IntegrityError(f"audit export, line {self.number}: not a JSON object")
        return document

    def entries(self) -> Iterator[StoredEntry]:
        """Entries up to the head, which is then the `trailer`."""
        while True:
            document = self.next_document()
            if document.keys() == {"head", "entries"}:
                self.trailer = document
                return
            if document.keys() != {"entry"}:
                raise IntegrityError(f"audit export, line {self.number}: neither an entry nor the head")
            yield StoredEntry(_bytes(document["entry"], f"line {self.number}"))


def _header(document: dict[str, Any]) -> dict[str, Any]:
    if document.get("format") != FORMAT:
        raise IntegrityError.because("audit export", "another format", FORMAT)
    version = document.get("version")
    if not (isinstance(version, list) and len(version) == 2 and version[0] == MAJOR):
        raise VersionUnsupported.because("audit export version", "another", f"major {MAJOR}")
    if not isinstance(document.get("at"), int):
        raise IntegrityError("audit export: no time of export")
    return document


def _line(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _bytes(text: object, where: str) -> bytes:
    try:
        return base64.b64decode(str(text), validate=True)
    except ValueError:
        raise IntegrityError(f"audit export, {where}: not base64") from None
