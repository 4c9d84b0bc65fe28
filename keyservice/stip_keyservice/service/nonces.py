"""Challenges: nonces that are good once, for a short time, and never too many at a time."""

from __future__ import annotations

import secrets

from sqlalchemy import Connection, delete, func, insert, select

from stip_keyservice.service.store import Store, nonces
from stip_protocol.errors import NonceRefused, Overloaded
from stip_protocol.release import NONCE_BYTES


def issue(db: Connection, *, now: int, seconds: int, limit: int) -> bytes:
    """A fresh nonce, good until `now + seconds`. Raises `Overloaded` where `limit` of them are pending."""
    db.execute(delete(nonces).where(nonces.c.expires <= now))
    pending = db.execute(select(func.count()).select_from(nonces)).scalar_one()
    if pending >= limit:
        raise Overloaded.because("pending challenges", pending, f"fewer than {limit}; retry in {seconds} s")
    nonce = secrets.token_bytes(NONCE_BYTES)
    db.execute(insert(nonces).values(nonce=nonce, expires=now + seconds))
    return nonce


def consume(store: Store, nonce: bytes, *, now: int) -> None:
    """Take the nonce out for good, whatever is decided afterwards: its own transaction, committed here.

    Raises `NonceRefused` where it was never issued, was used before, or has expired.
    """
    with store.write() as db:
        expires = db.execute(delete(nonces).where(nonces.c.nonce == nonce).returning(nonces.c.expires)).scalar()
    if expires is None:
        raise NonceRefused.because("claims nonce", "one that is not pending", "a challenge not used before")
    if expires <= now:
        raise NonceRefused.because("claims nonce", f"expired {now - expires} s ago", "a challenge in its time")
