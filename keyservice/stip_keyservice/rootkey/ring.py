"""Root keys as a process uses them: one that wraps, and while a rewrap is under way another that still opens.

    wrapped = id of the root key (8 bytes) ‖ nonce ‖ ciphertext ‖ tag

The id is HKDF-SHA256 (RFC 5869) of the key: it says under which root key something lies, and nothing about the key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from stip_keyservice.rootkey.envelope import KEY_BYTES, lock, unlock
from stip_protocol.errors import ConfigurationError, IntegrityError

ID_BYTES = 8
_ID_INFO = b"stip/root-key-id"


class RootKey(Protocol):
    """What wraps the keys at the top, and the home's private keys."""

    @property
    def id(self) -> bytes:
        """Of the key that `wrap` uses."""

    def under(self, identity: bytes) -> RootKey:
        """The same with that key to wrap with. Raises `IntegrityError` where this home does not have it."""

    def wrap(self, key: bytes, context: bytes) -> bytes:
        """`key` encrypted and bound to `context`."""

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """What was wrapped. Raises `IntegrityError` where it was altered, or wrapped under an unknown root key."""


class SoftwareRoot:
    """Root keys that this process holds. The first wraps, each opens what it wrapped."""

    def __init__(self, present: bytes, *others: bytes, reload: Callable[[], SoftwareRoot] | None = None) -> None:
        """`reload` asks the home again, once, for a key that is not among these: another process may have rewrapped.

        Raises `ConfigurationError` for a key of another length.
        """
        for key in (present, *others):
            if len(key) != KEY_BYTES:
                raise ConfigurationError.because("root key", f"{len(key)} bytes", f"{KEY_BYTES} bytes")
        self._keys = {identity_of(key): key for key in (present, *others)}
        self._present, self._reload = identity_of(present), reload

    def __repr__(self) -> str:
        return "SoftwareRoot()"

    @property
    def id(self) -> bytes:
        return self._present

    @property
    def ids(self) -> frozenset[bytes]:
        """Of every key held."""
        return frozenset(self._keys)

    def under(self, identity: bytes) -> Self:
        present = self._key(identity)
        return type(self)(present, *self._keys.values(), reload=self._reload)

    def wrap(self, key: bytes, context: bytes) -> bytes:
        return self._present + lock(self._keys[self._present], key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        return unlock(self._key(wrapped_under(wrapped)), wrapped[ID_BYTES:], context, "wrapped key")

    def material(self, identity: bytes | None = None) -> bytes:
        """The key itself, by default the present one: for a provider that is to keep it."""
        return self._key(identity or self._present)

    def _key(self, identity: bytes) -> bytes:
        if identity not in self._keys and self._reload is not None:
            self._keys |= self._reload()._keys
        if identity not in self._keys:
            raise IntegrityError("wrapped key: altered, or under a root key that this home does not have")
        return self._keys[identity]


def identity_of(key: bytes) -> bytes:
    """The id of a root key."""
    return HKDF(hashes.SHA256(), ID_BYTES, salt=None, info=_ID_INFO).derive(key)


def wrapped_under(wrapped: bytes) -> bytes:
    """The id of the root key that something was wrapped under."""
    return wrapped[:ID_BYTES]
