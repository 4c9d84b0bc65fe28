"""Heads of key services' audit logs that this user was given, remembered: a log that is shown two ways is noticed.

One file a service below `folder()`, in the form of `stip_protocol.heads`, in the order in which the heads came. What is
in it was verified when it was put there, and is again whenever it is held against a new one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from filelock import FileLock, Timeout

from stip import keys
from stip_protocol.documents import Signed
from stip_protocol.durable import PARTIAL
from stip_protocol.errors import AuditLogForked, ConfigurationError, FrameInvalid, SignatureInvalid, VersionUnsupported
from stip_protocol.heads import FILE_LIMIT, Heads, open_head, require_one_log
from stip_protocol.release import AuditHead, service_id

KEPT = 128
"""Heads of one service. Beyond it, every second one of the older half goes: the newest stay, and some of every time."""
LOCK_SECONDS = 10.0
"""How long another process may hold a file that is read and written in milliseconds."""
SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Remembered:
    """What is kept of one service, as it lies there: nothing is verified without the service's key."""

    path: Path
    service: bytes
    heads: tuple[AuditHead, ...]
    """In the order in which they came."""

    @property
    def forked(self) -> AuditLogForked | None:
        """What the heads contradict each other in; None where they are of one log."""
        return _contradiction(self.heads)


def folder() -> Path:
    """Where heads are kept: `heads` beside the keys (`stip.keys.folder`)."""
    return keys.folder().with_name("heads")


class HeadMemory:
    """The heads of one service. Processes take turns."""

    def __init__(self, where: Path, service: Ed25519PublicKey) -> None:
        self._service, self._id = service, service_id(service)
        self.path = where / (self._id.hex() + SUFFIX)

    def check(self, signed: bytes) -> AuditHead:
        """Hold a signed head against all that were remembered, and remember it. Blocks for the file.

        Raises `SignatureInvalid` for a head of another key, `AuditLogForked` where it contradicts an earlier one (both
        stay in the file, and nothing is accepted any more until it is moved away), and `ConfigurationError` where the
        file cannot be used.
        """
        head = open_head(signed, self._service)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), timeout=LOCK_SECONDS, mode=0o600):
                contradiction = self._remember(signed, head)
        except Timeout:
            raise ConfigurationError(f"audit heads {self.path}: locked by another process for too long") from None
        except OSError as error:
            raise ConfigurationError(f"audit heads {self.path}: {error.strerror}") from None
        if contradiction is not None:
            raise AuditLogForked(
                f"{contradiction.message}. The proof is kept in {self.path}: `stip audit-heads export` makes a file "
                "for an auditor. Ask the model developer what happened; move the file away only once you know",
                field="audit_head",
            )
        return head

    def _remember(self, signed: bytes, head: AuditHead) -> AuditLogForked | None:
        kept, heads = self._kept()
        contradiction = _contradiction(heads)
        if contradiction is not None or head in heads:
            return contradiction
        if len(kept) >= KEPT:
            kept = kept[: KEPT // 2 : 2] + kept[KEPT // 2 :]
        self._write(Heads(self._id, (*kept, signed)))
        return _contradiction([*heads, head])

    def _kept(self) -> tuple[tuple[bytes, ...], list[AuditHead]]:
        """What is in the file, as it was signed and as it reads."""
        if not self.path.exists():
            return (), []
        try:
            found = Heads.from_json(_read(self.path))
            heads = [open_head(each, self._service) for each in found.heads]
        except (FrameInvalid, SignatureInvalid, VersionUnsupported) as error:
            raise _damaged(self.path, error.message) from None
        if found.service != self._id:
            raise _damaged(self.path, "of another service")
        return found.heads, heads

    def _write(self, heads: Heads) -> None:
        partial = self.path.with_name(self.path.name + PARTIAL)
        # What a process that was killed left under this name is nobody's: the lock is ours.
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(heads.to_json())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)


def remembered(where: Path) -> list[Remembered]:
    """What is kept of each service, by its id. Raises `ConfigurationError` for a file that cannot be read."""
    return [_load(path) for path in sorted(where.glob("*" + SUFFIX))] if where.is_dir() else []


def _load(path: Path) -> Remembered:
    try:
        found = Heads.from_json(_read(path))
        heads = tuple(AuditHead.from_bytes(Signed.from_bytes(each).payload) for each in found.heads)
    except (FrameInvalid, VersionUnsupported) as error:
        raise _damaged(path, error.message) from None
    return Remembered(path, found.service, heads)


def _contradiction(heads: list[AuditHead] | tuple[AuditHead, ...]) -> AuditLogForked | None:
    """The first of these heads, in order, that those before it cannot stand beside."""
    for number, head in enumerate(heads):
        try:
            require_one_log(heads[:number], head)
        except AuditLogForked as error:
            return error
    return None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise ConfigurationError(f"audit heads {path}: {error.strerror}") from None


def _damaged(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(f"audit heads {path}: {why}; move it away to begin anew")
