"""Challenges: nonces that are good once, for a short time, and never too many at a time."""

from __future__ import annotations

import secrets

from sqlalchemy import Connection, delete, insert, literal_column, select

from stip_keyservice.service.store import Store, nonces
from stip_protocol.errors import NonceRefused
from stip_protocol.release import NONCE_BYTES


def issue(db: Connection, *, now: int, seconds: int, limit: int) -> bytes:
    """A fresh nonce, good until `now + seconds`, or until `limit` younger ones are pending.

    Anybody may ask for challenges, so at the limit the oldest gives way: refusing new ones instead would let a
    stranger with a few requests a second keep every enclave out.
    """
    db.execute(delete(nonces).where(nonces.c.expires <= now))
    kept = select(nonces.c.nonce).order_by(nonces.c.expires.desc(), literal_column("rowid").desc()).limit(limit - 1)
    db.execute(delete(nonces).where(nonces.c.nonce.not_in(kept)))
    nonce = secrets.token_bytes(NONCE_BYTES)
    db.execute(insert(nonces).values(nonce=nonce, expires=now + seconds))
    return nonce


def consume(store: Store, nonce: bytes, *, now: int) -> None:
    """Take the nonce out for good, whatever is decided afterwards: its own transaction, committed here.

    Raises `NonceRefused` where it was never issued, was used before, gave way, or has expired.
    """
    with store.write() as db:
        expires = db.execute(delete(nonces).where(nonces.c.nonce == nonce).returning(nonces.c.expires)).scalar()
    if expires is None:
        raise NonceRefused.because("claims nonce", "one that is not pending", "a challenge not used before")
    if expires <= now:
        raise NonceRefused.because("claims nonce", f"expired {now - expires} s ago", "a challenge in its time")
