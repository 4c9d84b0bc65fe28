"""`home.toml`: where a home's database is, and what keeps its root key.

Written by `home init` and by what moves root keys; a home without one has an SQLite database and a root key file.

    version = 1
    [database]                       absent: SQLite, `state.db` in the home
    url = "postgresql+psycopg://stip@db.example/stip?sslmode=verify-full"
    password_file = "db.password"
    [root_key]                       what keeps the root key
    kind = "pkcs11"                  "file", "gramine", "pkcs11", "shares"
    ...
    [recovery]                       shares that open the root key as well
    [rewrap]                         only while everything moves under another root key

`wrapped` in these tables is the root key as its provider left it, hex; it opens nothing without that provider.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, ValidationError, field_validator

from stip_keyservice.rootkey.ring import ID_BYTES
from stip_protocol import toml
from stip_protocol.documents import explain
from stip_protocol.durable import sync_folder
from stip_protocol.errors import ConfigurationError, VersionUnsupported
from stip_protocol.runtime.config import Settings

NAME = "home.toml"
VERSION = 1
LIMIT = 64 << 10
"""Bytes of the largest `home.toml` read."""
DEFAULT_KEY_FILE = "root.key"
GRAMINE_KEYS = "/dev/attestation/keys"
MEMBERS = 16
"""Shares of one secret that SLIP-39 can tell apart."""
_HEADER = b"# Written by stip-keyservice; `home show` explains it.\n"

Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,2048}$")]
Identity = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * ID_BYTES}}}$")]
PathText = Annotated[str, Field(min_length=1, max_length=4096)]
"""A path as it stands in the file; relative ones are relative to the home."""


Mechanism = Literal["aes-gcm", "aes-key-wrap"]


class DatabaseSettings(Settings):
    url: str = Field(min_length=1, max_length=2048)
    password_file: PathText | None = None
    """The database user's password, one line; read at every new connection, so that it can be changed."""


class Kept(Settings):
    """A root key and what its provider needs to find it again."""

    id: Identity | None = None
    """Of the root key; None before it was made."""
    wrapped: Hex | None = Field(default=None, repr=False)
    """The root key as the provider left it; None where the provider keeps all of it."""


class FileSettings(Kept):
    """The 32 bytes themselves, in a file of mode 0600."""

    kind: Literal["file"] = "file"
    path: PathText = DEFAULT_KEY_FILE


class GramineSettings(Kept):
    """Wrapped under a sealing key of the CPU, which only this enclave (MRENCLAVE) or enclaves of its signer
    (MRSIGNER) can ask for."""

    kind: Literal["gramine"] = "gramine"
    key: Literal["_sgx_mrenclave", "_sgx_mrsigner"] = "_sgx_mrenclave"
    keys: PathText = GRAMINE_KEYS
    """The folder in which Gramine shows sealing keys."""


class Pkcs11Settings(Kept):
    """Wrapped under an AES key that never leaves its PKCS #11 token."""

    kind: Literal["pkcs11"] = "pkcs11"
    module: PathText
    """The token's library, e.g. /usr/lib/softhsm/libsofthsm2.so."""
    token: str = Field(min_length=1, max_length=32)
    """Label of the token."""
    label: str = Field(default="stip-root", min_length=1, max_length=64)
    """Label of the wrapping key in it."""
    mechanism: Mechanism | None = None
    """How it wraps; None: the first of these that the token has, when the key is made."""
    pin_file: PathText | None = None
    """The user PIN, one line; None: it is asked for."""


class SharesSettings(Kept):
    """Sealed (HPKE) to a recovery key, whose private half is split into shares (SLIP-39)."""

    kind: Literal["shares"] = "shares"
    public_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    """X25519, hex."""
    threshold: int = Field(ge=2, le=MEMBERS)
    shares: int = Field(ge=2, le=MEMBERS)
    files: tuple[PathText, ...] = Field(default=(), max_length=MEMBERS)
    """Where shares lie while the service starts; none: they are asked for."""


RootKeySettings = Annotated[
    FileSettings | GramineSettings | Pkcs11Settings | SharesSettings, Field(discriminator="kind")
]


class RewrapSettings(Settings):
    """Two root keys, each wrapped under the other: whichever provider answers, both are there."""

    next: RootKeySettings
    """What keeps the root key that everything moves to."""
    next_under_present: Hex = Field(repr=False)
    present_under_next: Hex = Field(repr=False)


class HomeSettings(Settings):
    version: int = VERSION
    database: DatabaseSettings | None = None
    root_key: RootKeySettings = FileSettings()
    recovery: SharesSettings | None = None
    rewrap: RewrapSettings | None = None
    retired: RootKeySettings | None = None
    """What kept the former root key, until it is destroyed there."""

    @field_validator("version")
    @classmethod
    def _known(cls, version: int) -> int:
        if version != VERSION:
            raise VersionUnsupported.because(f"{NAME} version", version, VERSION)
        return version


def load(home: Path) -> HomeSettings:
    """The settings of a home; defaults where it has no `home.toml`. Raises `ConfigurationError`."""
    path = home / NAME
    if not path.exists():
        return HomeSettings()
    if path.stat().st_mode & 0o077:
        raise ConfigurationError.because(f"mode of {path}", "others may read or write", "chmod go=")
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise ConfigurationError.because(NAME, "a larger file", f"at most {LIMIT} bytes")
        return HomeSettings.model_validate(toml.read(data))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {explain(error)}") from None
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def store(home: Path, settings: HomeSettings) -> None:
    """Write `home.toml`: whole and on the disk, or not at all."""
    document: Mapping[str, Any] = settings.model_dump(exclude_none=True)
    write_private(home / NAME, _HEADER + tomli_w.dumps(document).encode())


def write_private(path: Path, data: bytes) -> None:
    """A file of mode 0600 that is on the disk whole, or not there."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)
