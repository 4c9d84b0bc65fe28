"""Grants at rest: AES-256-GCM (NIST SP 800-38D) under the home's storage key, bound to instance and epoch.

The database alone opens nothing, and a row moved to another instance does not open either.
"""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stip_protocol import canonical
from stip_protocol.errors import IntegrityError
from stip_protocol.release import Grant

_NONCE = 12


def lock(grant: Grant, storage_key: bytes) -> bytes:
    """nonce ‖ ciphertext ‖ tag. Nonces are random: grants are few, far below 2³² under one key."""
    nonce = secrets.token_bytes(_NONCE)
    return nonce + AESGCM(storage_key).encrypt(nonce, grant.to_bytes(), _associated(grant.instance, grant.epoch))


def unlock(locked: bytes, storage_key: bytes, *, instance: str, epoch: int) -> Grant:
    """The grant. Raises `IntegrityError` where the row or the key is another one's."""
    try:
        plain = AESGCM(storage_key).decrypt(locked[:_NONCE], locked[_NONCE:], _associated(instance, epoch))
    except (InvalidTag, ValueError):  # ValueError: too short to hold a nonce
        raise IntegrityError("stored grant: altered, moved, or under another storage key") from None
    return Grant.from_bytes(plain)


def _associated(instance: str, epoch: int) -> bytes:
    return canonical.encode(["stip/grant-at-rest", instance, epoch])
