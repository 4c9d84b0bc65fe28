"""User keys: Ed25519, one PEM file each, readable by their owner alone.

A user key signs delegations (`stip_protocol.release.Delegation`) and nothing else. It never leaves this machine:
the key service learns the public half when the user is enrolled.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from stip_protocol.errors import ConfigurationError

HOME_VARIABLE = "STIP_HOME"
SUFFIX = ".pem"
KEY_LIMIT = 4096
"""Bytes of the largest key file: an Ed25519 key in PEM has 119."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}")


@dataclass(frozen=True, slots=True)
class UserKey:
    """A user's key pair and where it lies."""

    path: Path
    private: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> bytes:
        """32 bytes, raw (RFC 8032)."""
        return self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @property
    def name(self) -> str:
        return self.path.stem


def folder() -> Path:
    """Where keys are stored: `keys` below STIP_HOME, which defaults to `~/.stip`."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".stip") / "keys"


def locate(name: str) -> Path:
    """The file of the key called `name`. Raises `ConfigurationError` for what is not a plain name."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError.because("key name", ascii(name[:64]), "letters, digits, '_', '-', '.', at most 64")
    return folder() / (name + SUFFIX)


def create(path: Path) -> UserKey:
    """Draw a key and store it with mode 0600 in a folder with mode 0700.

    Raises `ConfigurationError` where the file exists: a lost user key cannot be restored, so none is overwritten.
    """
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigurationError(f"user key {path}: exists and is never overwritten; choose another name") from None
    except OSError as error:
        raise ConfigurationError(f"user key {path}: {error.strerror}") from None
    return UserKey(path, private)


def load(path: Path) -> UserKey:
    """Read a key that is its owner's alone.

    Raises `ConfigurationError` where the file is missing, is a link, belongs to another user, may be read or
    written by others, or holds anything but an Ed25519 private key.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigurationError(f"user key {path}: {error.strerror}; make one with `stip keys create`") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise ConfigurationError.because(f"user key {path}", "another kind or owner", "a file of your own")
        if others := status.st_mode & 0o077:
            raise ConfigurationError.because(f"user key {path}: mode", f"0{others:03o} for others", "0600 (chmod 600)")
        data = os.read(descriptor, KEY_LIMIT)
    finally:
        os.close(descriptor)
    try:
        private = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigurationError.because(f"user key {path}", "another form", "an Ed25519 private key in PEM")
    return UserKey(path, private)


def stored() -> list[Path]:
    """The key files in `folder()`, by name."""
    return sorted(folder().glob("*" + SUFFIX)) if folder().is_dir() else []


def enrolment(key: UserKey, user: str) -> str:
    """What the key service's operator needs to admit this user, as one JSON object: nothing of it is secret."""
    return json.dumps({"user": user, "public_key": key.public.hex(), "algorithm": "Ed25519"}, indent=2)
