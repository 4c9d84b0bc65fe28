"""Secrets at rest: envelope encryption.

    root key ─wraps─▶ data key of a domain ─wraps─▶ data key of an epoch ─seals─▶ the grant, the canaries
             ─wraps─────────────────────────────▶ (of a shared instance)

A data key is 32 bytes; it and what it seals are AES-256-GCM (NIST SP 800-38D) with random nonces, bound by their
associated data to the subject of the key and to the row they belong to: the database alone opens nothing, and a row
moved elsewhere does not open either. Destroying a data key shreds everything below it, also in backups of the database
from before, as far as those are read with a root key that was rewrapped since.
"""

from __future__ import annotations

import secrets
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Connection, insert, select, update

from stip_keyservice.home import Home
from stip_keyservice.service.state.schema import data_keys
from stip_protocol import canonical
from stip_protocol.errors import IntegrityError

KEY_BYTES = 32
_NONCE = 12
_ID = 16


class RootKey(Protocol):
    """What wraps keys and never leaves where it is kept."""

    def wrap(self, key: bytes, context: bytes) -> bytes:
        """`key` encrypted and bound to `context`. Raises `ConfigurationError` where the root key cannot be used."""

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """What was wrapped. Raises `IntegrityError` where it was altered, or wrapped by another root key."""


class Vault:
    """The data keys of one store."""

    def __init__(self, root: RootKey) -> None:
        self._root = root

    def __repr__(self) -> str:
        return "Vault()"

    def make(self, db: Connection, subject: str, *, parent: bytes | None, now: int) -> bytes:
        """A fresh data key; returns its id."""
        identity, key = secrets.token_bytes(_ID), secrets.token_bytes(KEY_BYTES)
        context = _key_context(identity, subject)
        wrapped = self._root.wrap(key, context) if parent is None else _lock(self._key(db, parent), key, context)
        db.execute(insert(data_keys).values(id=identity, subject=subject, parent=parent, wrapped=wrapped, made_at=now))
        return identity

    def find(self, db: Connection, subject: str) -> bytes | None:
        """The id of a subject's data key; None where it has none, or one that was destroyed."""
        query = select(data_keys.c.id).where(data_keys.c.subject == subject, data_keys.c.destroyed_at.is_(None))
        return db.execute(query).scalar()

    def destroy(self, db: Connection, identity: bytes, *, now: int) -> None:
        """Shred a data key, and with it everything it seals and wraps."""
        present = data_keys.c.id == identity, data_keys.c.destroyed_at.is_(None)
        db.execute(update(data_keys).where(*present).values(wrapped=None, destroyed_at=now))

    def seal(self, db: Connection, identity: bytes, plain: bytes, row: list[object]) -> bytes:
        """nonce ‖ ciphertext ‖ tag under a data key, bound to `row`: what names the place it is stored in."""
        return _lock(self._key(db, identity), plain, canonical.encode(["stip/at-rest", *row]))

    def open(self, db: Connection, identity: bytes, sealed: bytes, row: list[object]) -> bytes:
        """What was sealed. Raises `IntegrityError` where it was altered, moved, or its key destroyed."""
        return _unlock(self._key(db, identity), sealed, canonical.encode(["stip/at-rest", *row]), f"stored {row[0]}")

    def _key(self, db: Connection, identity: bytes) -> bytes:
        row = db.execute(select(data_keys).where(data_keys.c.id == identity)).one_or_none()
        if row is None or row.wrapped is None:
            raise IntegrityError("data key: destroyed, or not of this database")
        context = _key_context(identity, row.subject)
        if row.parent is None:
            return self._root.unwrap(row.wrapped, context)
        return _unlock(self._key(db, row.parent), row.wrapped, context, "data key")


def open_vault(home: Home) -> Vault:
    """The vault of a home, under the root key that the home has."""
    return Vault(SoftwareRoot(home.storage_key))


class SoftwareRoot:
    """A root key that this process holds: 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "SoftwareRoot()"

    def wrap(self, key: bytes, context: bytes) -> bytes:
        return _lock(self._key, key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        return _unlock(self._key, wrapped, context, "wrapped key")


def _key_context(identity: bytes, subject: str) -> bytes:
    return canonical.encode(["stip/data-key", identity, subject])


def _lock(key: bytes, plain: bytes, context: bytes) -> bytes:
    """Nonces are random: under one key there are far fewer than 2³² of them."""
    nonce = secrets.token_bytes(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plain, context)


def _unlock(key: bytes, sealed: bytes, context: bytes, what: str) -> bytes:
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], context)
    except (InvalidTag, ValueError):  # ValueError: too short to hold a nonce
        raise IntegrityError(f"{what}: altered, moved, or under another key") from None
