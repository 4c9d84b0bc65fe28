"""Collateral on disk: one file a platform kind, which several processes share.

A file is named after its platform (`sgx-00a067110000-platform.json`), holds `QuoteCollateralV3` JSON that can be read
by anybody (mode 0644, as apt keeps its lists: it is public and signed), and appears whole or not at all. What lies in
it is parsed, and held to its signatures and platform again, whenever it is read: a file that somebody damaged or forged
is as good as none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from stip_protocol.attestation.authenticity import require_authentic
from stip_protocol.attestation.collateral import Collateral
from stip_protocol.attestation.evidence import COLLATERAL_LIMIT
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.durable import sync_folder
from stip_protocol.errors import AttestationError, ConfigurationError, EvidenceMalformed

FOLDER_MODE, FILE_MODE = 0o755, 0o644
PLATFORMS = 1024
"""Platform kinds in one cache, at most."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Collateral that is at hand: its bytes, and what they say."""

    kind: PlatformKind
    data: bytes
    collateral: Collateral

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises `EvidenceMalformed`, `EvidenceRefused`."""
        collateral = Collateral.parse(data)
        return cls(PlatformKind.of_collateral(collateral), data, collateral)

    @property
    def expires(self) -> int:
        """Unix seconds of the last second in which it verifies."""
        return int(self.collateral.expires.timestamp())

    @property
    def issued(self) -> int:
        return int(self.collateral.issued.timestamp())

    def yields_to(self, new: Kept, *, now: int) -> bool:
        """Whether `new`, of the same platform, takes its place at `now` (Unix seconds).

        The pieces are signed apart, and a source may combine them as it likes: none may be older than the one that is
        kept, or a fresh TCB info would bring back a revocation list from before a revocation. What ran out yields to
        all that holds.
        """
        ages = list(zip(_ages(self.collateral), _ages(new.collateral), strict=True))
        return now > self.expires or (all(old <= new for old, new in ages) and any(old < new for old, new in ages))


def _ages(collateral: Collateral) -> tuple[tuple[int, datetime], ...]:
    """How new each piece is."""
    info, identity = collateral.tcb_info, collateral.qe_identity
    return (
        (info.evaluation_number, info.issued),
        (identity.evaluation_number, identity.issued),
        (0, collateral.pck_crl.last_update_utc),
        (0, collateral.root_crl.last_update_utc),
    )


class CollateralCache:
    """A folder of collateral. Safe between threads and processes."""

    def __init__(self, folder: Path, anchor: bytes) -> None:
        """`anchor`: DER of the root. Makes the folder where there is none. Raises `ConfigurationError`."""
        self._folder, self._anchor = folder, anchor
        try:
            folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"collateral cache {folder}: {error.strerror}", field="cache") from None

    def read(self, kind: PlatformKind) -> Kept | None:
        """What is kept for a platform, expired or not; None where that is nothing, or nothing that can be used.

        Raises `ConfigurationError` where the folder cannot be read.
        """
        try:
            with self._path(kind).open("rb") as file:
                data = file.read(COLLATERAL_LIMIT + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigurationError(f"collateral cache {self._folder}: {error.strerror}", field="cache") from None
        try:
            kept = Kept.parse(data)
            require_authentic(kept.collateral, kind, self._anchor)
        except AttestationError:
            return None
        return kept

    def stamp(self, kind: PlatformKind) -> tuple[int, ...] | None:
        """Another one for every file that was ever put there; None where there is none."""
        try:
            found = self._path(kind).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def store(self, data: bytes, *, now: int) -> Kept:
        """Keep collateral, unless what is kept holds at `now` (Unix seconds) and is newer in any piece; gives what is
        kept then.

        Raises `EvidenceMalformed`, `EvidenceRefused`, `ConfigurationError` (it cannot be written, or there is no room).
        """
        new = Kept.parse(data)
        require_authentic(new.collateral, new.kind, self._anchor)
        try:
            with self._locked():
                old = self.read(new.kind)
                if old is not None and not old.yields_to(new, now=now):
                    return old
                if old is None and len(self.kinds()) >= PLATFORMS:
                    raise ConfigurationError.because("platforms in the collateral cache", PLATFORMS, "fewer")
                replace_public(self._path(new.kind), data)
        except OSError as error:
            raise ConfigurationError(f"collateral cache {self._folder}: {error.strerror}", field="cache") from None
        return new

    def kinds(self) -> list[PlatformKind]:
        """The platforms there is a file of, in order."""
        found = []
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(EvidenceMalformed):
                found.append(PlatformKind.from_name(path.stem))
        return sorted(found)

    def everything(self) -> list[Kept]:
        """All that is kept and can be used, expired or not."""
        return [kept for kept in map(self.read, self.kinds()) if kept is not None]

    def _path(self, kind: PlatformKind) -> Path:
        return self._folder / f"{kind}.json"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Between reading what is kept and writing something newer."""
        handle = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def replace_public(path: Path, data: bytes) -> None:
    """Write a file that anybody may read, in one step and durably. Follows no link. Raises `ConfigurationError`."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), FILE_MODE)  # whatever the process's mask
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
