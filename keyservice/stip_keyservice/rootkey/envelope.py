"""Authenticated encryption at rest: AES-256-GCM (NIST SP 800-38D), nonce ‖ ciphertext ‖ tag."""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stip_protocol.errors import IntegrityError

KEY_BYTES = 32
NONCE_BYTES = 12


def lock(key: bytes, plain: bytes, context: bytes) -> bytes:
    """`plain` encrypted and bound to `context`. Nonces are random: under one key there are far fewer than 2³² of them
    (SP 800-38D, §8.3)."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, context)


def unlock(key: bytes, sealed: bytes, context: bytes, what: str) -> bytes:
    """What was locked. Raises `IntegrityError` naming `what` where it was altered, moved, or is under another key."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)
    except (InvalidTag, ValueError):  # ValueError: too short to hold a nonce
        raise IntegrityError(f"{what}: altered, moved, or under another key") from None
