"""From an earlier version to this one: the database's schema with its data, and the home's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stip_keyservice.home import Home, locked
from stip_keyservice.rootkey import files
from stip_keyservice.rootkey.settings import write_private
from stip_keyservice.service.state import revisions
from stip_keyservice.service.state.migrations import Secrets
from stip_keyservice.service.state.store import available, backend, usable
from stip_keyservice.service.vault import Vault
from stip_protocol.errors import ConfigurationError

STORAGE_KEY = "storage.key"
"""What version 1 encrypted grants under."""
STORAGE_KEY_BYTES = 32


@dataclass(frozen=True)
class Upgraded:
    before: str
    """Revision of the database; "empty" where it had none."""
    after: str
    wrapped: tuple[str, ...]
    """Private keys that lay in their files as they were."""
    cleared: str
    """What the database says of what it overwrote."""


def upgrade(home: Home) -> Upgraded:
    """Bring a home and its database to this version. Whatever it is interrupted by, it can be run again.

    Raises `VersionUnsupported` for a database of a newer version, `ConfigurationError`, `IntegrityError` where a grant
    does not open, `Unavailable`; the database is then as it was.
    """
    storage_key = _storage_key(home.path / STORAGE_KEY)
    database = backend(home.database, home.password_file)
    try:
        with usable(database), available(database), database.write() as db:
            found = revisions.upgrade(db, secrets=Secrets(home.root, storage_key))
            Vault(home.root).claim(db)
        cleared = database.forget()
    finally:
        database.close()
    wrapped = wrap_files(home)
    (home.path / STORAGE_KEY).unlink(missing_ok=True)
    return Upgraded(found.revision or "empty", revisions.REVISION, wrapped, cleared)


def wrap_files(home: Home) -> tuple[str, ...]:
    """Wrap the private keys of ours that lie in their files as they were; returns which."""
    with locked(home.path):
        plain = home.plain_files()
        for name in plain:
            path = home.path / name
            write_private(path, files.seal(home.root, name, path.read_bytes()))
    return plain


def _storage_key(path: Path) -> bytes | None:
    if not path.exists():
        return None
    key = path.read_bytes()
    if len(key) != STORAGE_KEY_BYTES:
        raise ConfigurationError.because(path.name, f"{len(key)} bytes", f"{STORAGE_KEY_BYTES} bytes")
    return key
