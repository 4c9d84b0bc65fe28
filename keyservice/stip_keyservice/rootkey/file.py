"""A root key file: the 32 bytes themselves. Whoever reads it has everything; put it where backups do not go."""

from __future__ import annotations

import os
from pathlib import Path

from stip_keyservice.rootkey.envelope import KEY_BYTES
from stip_keyservice.rootkey.settings import FileSettings, write_private
from stip_protocol.errors import ConfigurationError


class FileProvider:
    def __init__(self, settings: FileSettings, home: Path) -> None:
        self._settings, self._path = settings, home / settings.path

    def keep(self, key: bytes) -> FileSettings:
        """Raises `ConfigurationError` where there is a file already: it may be somebody's only root key."""
        if os.path.lexists(self._path):
            raise ConfigurationError.because("root key file", f"{self._path}, which exists", "a name that is free")
        try:
            write_private(self._path, key)
        except OSError as error:
            raise ConfigurationError(f"root key file {self._path}: {error.strerror}") from None
        return self._settings

    def load(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    said = "no access for group and others (chmod go=)"
                    raise ConfigurationError.because(f"mode of {self._path}", "others may read or write", said)
                key = file.read(KEY_BYTES + 1)
        except OSError as error:
            raise ConfigurationError(f"root key file {self._path}: {error.strerror}") from None
        if len(key) != KEY_BYTES:
            got = f"{len(key)} bytes" if len(key) < KEY_BYTES else "a longer file"
            raise ConfigurationError.because(self._path.name, got, f"{KEY_BYTES} bytes")
        return key

    def discard(self) -> str:
        self._path.unlink(missing_ok=True)
        return f"{self._path} is deleted; copies of it in backups open copies of the home and database from before"
