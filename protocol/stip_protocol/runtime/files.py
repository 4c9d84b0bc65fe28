"""Small files that a configuration names: keys and certificates, read once at start and bounded."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from stip_protocol.errors import ConfigurationError

FILE_LIMIT = 1 << 20
"""Bytes of the largest key, certificate or bundle of certificates read."""


def read_file(path: Path, *, field: str, limit: int = FILE_LIMIT) -> bytes:
    """The content of a file that is not empty. Raises `ConfigurationError` naming `field` and the path."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ConfigurationError(f"{field}: {path}: {error.strerror}", field=field) from None
    if not 0 < len(data) <= limit:
        got = "an empty file" if not data else f"more than {limit} bytes"
        raise ConfigurationError.because(f"{field}: {path}", got, f"1 to {limit} bytes")
    return data


def read_ed25519(path: Path, *, field: str) -> Ed25519PublicKey:
    """The Ed25519 public key in a PEM file (SubjectPublicKeyInfo). Raises `ConfigurationError`."""
    key = _public_key(path, field)
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigurationError.because(f"{field}: {path}", "another form", "an Ed25519 public key in PEM")
    return key


def read_x25519(path: Path, *, field: str) -> X25519PublicKey:
    """The X25519 public key in a PEM file (SubjectPublicKeyInfo). Raises `ConfigurationError`."""
    key = _public_key(path, field)
    if not isinstance(key, X25519PublicKey):
        raise ConfigurationError.because(f"{field}: {path}", "another form", "an X25519 public key in PEM")
    return key


def _public_key(path: Path, field: str) -> PublicKeyTypes | None:
    """None where the file holds something else."""
    try:
        return load_pem_public_key(read_file(path, field=field))
    except (ValueError, UnsupportedAlgorithm):
        return None
