"""Private keys in a home's files, each wrapped under the root key and bound to its name.

    "stip/sealed-key/1\\n" ‖ wrapped

A file that an operator put there as PEM (their own `tls.key`), or that is from before there were root keys, is read as
it is; `state upgrade` wraps the latter.
"""

from __future__ import annotations

from pathlib import Path

from stip_keyservice.rootkey.ring import ID_BYTES, RootKey, wrapped_under
from stip_protocol import canonical
from stip_protocol.errors import ConfigurationError, IntegrityError

SECRET_FILES = ("developer.key", "service.key", "sealing.key", "link-ca.key", "tls-ca.key", "tls.key")
_MAGIC = b"stip/sealed-key/1\n"
_PEM = b"-----BEGIN"


def seal(root: RootKey, name: str, plain: bytes) -> bytes:
    """What goes into the file `name`."""
    return _MAGIC + root.wrap(plain, _context(name))


def unseal(root: RootKey, name: str, data: bytes) -> bytes:
    """The private key in a file's content, PEM. Raises `IntegrityError`, and `ConfigurationError` for other content."""
    if is_plain(data):
        return data
    if sealed_under(data) is None:
        raise ConfigurationError.because(name, "something else", "a private key, wrapped under the root key or PEM")
    try:
        return root.unwrap(data[len(_MAGIC) :], _context(name))
    except IntegrityError:
        raise IntegrityError(f"{name}: altered, another file, or under another root key than this home's") from None


def is_plain(data: bytes) -> bool:
    """Whether a key file is PEM that anybody who gets the file can read."""
    return data.startswith(_PEM)


def sealed_under(data: bytes) -> bytes | None:
    """The id of the root key that a file is wrapped under; None where it is not wrapped."""
    if not data.startswith(_MAGIC) or len(data) < len(_MAGIC) + ID_BYTES:
        return None
    return wrapped_under(data[len(_MAGIC) :])


def present(home: Path) -> list[Path]:
    """The secret files that a home has."""
    return [path for path in (home / name for name in SECRET_FILES) if path.exists()]


def _context(name: str) -> bytes:
    return canonical.encode(["stip/home-file", name])
