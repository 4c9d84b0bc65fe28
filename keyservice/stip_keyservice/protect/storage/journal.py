"""Which files of an unfinished instance are whole.

One line of JSON a file, appended and fsynced after the file has its name: `{"name", "size", "sha256", "layout",
"mac"}`. The layout says which tensors the file holds: one that another version of the code lays out otherwise is no
longer whole. The MAC (HMAC-SHA256 under a key of the instance's root, RFC 2104) is there because these digests go into
the signed manifest: whoever can write to the disk must not choose them. A torn last line, which a kill leaves, is cut
off.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from stip_protocol.keys import derive
from stip_protocol.manifest import FileDigest, Hex32, file_digest

JOURNAL_LABEL = "protect-journal"
"""Label of the key of the MACs: `derive(root, JOURNAL_LABEL)`."""
JOURNAL_LIMIT = 64 << 20
"""Bytes of the longest journal read; a longer one counts as empty."""


class Journal:
    """The journal at `path` about the files below `folder`. Made where there is none."""

    def __init__(self, path: Path, folder: Path, root: bytes) -> None:
        self._path = path
        self._folder = folder
        self._key = derive(root, JOURNAL_LABEL)
        self._entries = dict(self._read())

    def __repr__(self) -> str:
        return f"Journal({len(self._entries)} files)"

    @property
    def listed(self) -> Mapping[str, FileDigest]:
        """The files that are whole, by name."""
        return {name: digest for name, (digest, _) in self._entries.items()}

    def keep_whole(self, layouts: Mapping[str, str], advance: Callable[[int], None]) -> None:
        """Take everything off the list but files of these layouts that still have their size and SHA-256.

        `advance` is told the bytes of each file when it has been looked at.
        """
        for name, (digest, layout) in list(self._entries.items()):
            if layouts.get(name) != layout or not self._is_whole(name, digest):
                del self._entries[name]
            advance(digest.size)

    def add(self, name: str, digest: FileDigest, layout: str) -> None:
        """List a file that has its name and its content on the disk."""
        mac = self._mac(name, digest, layout)
        line = json.dumps({"name": name, **digest.model_dump(), "layout": layout, "mac": mac}) + "\n"
        with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW), "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._entries[name] = digest, layout

    def _is_whole(self, name: str, digest: FileDigest) -> bool:
        path = self._folder / name
        return (
            path.is_file()
            and not path.is_symlink()
            and path.stat().st_size == digest.size
            and file_digest(path) == digest
        )

    def _read(self) -> Iterator[tuple[str, tuple[FileDigest, str]]]:
        """The lines up to the first that is torn or not ours, from where on the file is cut."""
        with os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as file:
            if os.fstat(file.fileno()).st_size > JOURNAL_LIMIT:
                file.truncate(0)
            whole = 0
            for line in file.readlines():
                if (entry := self._parse(line)) is None:
                    break
                whole += len(line)
                yield entry
            file.truncate(whole)

    def _parse(self, line: bytes) -> tuple[str, tuple[FileDigest, str]] | None:
        try:
            entry = _Line.model_validate_json(line)
        except ValidationError:
            return None
        digest = FileDigest(sha256=entry.sha256, size=entry.size)
        ours = hmac.compare_digest(entry.mac, self._mac(entry.name, digest, entry.layout))
        return (entry.name, (digest, entry.layout)) if ours and line.endswith(b"\n") else None

    def _mac(self, name: str, digest: FileDigest, layout: str) -> str:
        said = json.dumps([name, digest.size, digest.sha256, layout]).encode()
        return hmac.new(self._key, said, hashlib.sha256).hexdigest()


class _Line(FileDigest):
    name: str
    layout: Hex32
    mac: Hex32
