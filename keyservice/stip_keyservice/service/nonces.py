"""Challenges: nonces that are good once, for a short time.

    nonce = expires (8 bytes, big-endian Unix seconds) ‖ 8 random bytes ‖ HMAC-SHA256(key, the 16 bytes before)[:16]

Issuing one writes nothing: anybody may ask, and no stranger fills a table or pushes a waiting enclave's nonce out of
it. Every replica of the service has the key and knows a nonce of every other. What is remembered are nonces that were
spent, until some time after they would have expired; the row is written in the transaction of the decision it was spent
on, whichever that was.
"""

from __future__ import annotations

import hmac
import secrets
from functools import cache
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import Connection, bindparam, delete

from stip_keyservice.service.state.schema import spent_nonces
from stip_keyservice.service.state.store import insert_of
from stip_protocol.errors import NonceRefused
from stip_protocol.lease import CLOCK_SKEW
from stip_protocol.release import NONCE_BYTES

_HEAD, _TAG = 16, 16
_KEY_INFO = b"stip/challenge-nonces"
KEPT_SECONDS = 2 * CLOCK_SKEW
"""A spent nonce is remembered for so long after its end: replicas' clocks differ."""


class Nonces:
    """The challenges of one service, on every replica that has its signing key."""

    def __init__(self, service: Ed25519PrivateKey) -> None:
        """The MAC key is HKDF-SHA256 (RFC 5869) over the service's signing key."""
        kdf = HKDF(hashes.SHA256(), 32, salt=None, info=_KEY_INFO)
        self._key = kdf.derive(service.private_bytes_raw())

    def issue(self, *, now: int, seconds: int) -> bytes:
        """A fresh nonce, good until `now + seconds`."""
        head = (now + seconds).to_bytes(8, "big") + secrets.token_bytes(8)
        return head + self._tag(head)

    def require(self, nonce: bytes, *, now: int, seconds: int) -> int:
        """When a nonce expires. Whether it was spent, `spend` says.

        Raises `NonceRefused` where it is not one of ours, has expired, or was issued at a time to come.
        """
        ours = len(nonce) == NONCE_BYTES and hmac.compare_digest(self._tag(nonce[:_HEAD]), nonce[_HEAD:])
        if not ours:
            raise NonceRefused.because("claims nonce", "one that was never issued", "a challenge of this service")
        expires = int.from_bytes(nonce[:8], "big")
        if expires <= now:
            raise NonceRefused.because("claims nonce", f"expired {now - expires} s ago", "a challenge in its time")
        if expires > now + seconds + CLOCK_SKEW:
            raise NonceRefused.because("claims nonce", "one from a time to come", "a challenge in its time")
        return expires

    def _tag(self, head: bytes) -> bytes:
        return hmac.digest(self._key, head, "sha256")[:_TAG]


def spend(db: Connection, nonce: bytes, *, expires: int, now: int) -> None:
    """Take a nonce out for good, with the caller's transaction. Raises `NonceRefused` where it was spent before."""
    db.execute(_FORGET, {"before": now - KEPT_SECONDS})
    if db.execute(_spending(db.dialect.name), {"nonce": nonce, "expires": expires}).first() is None:
        raise NonceRefused.because("claims nonce", "one that was spent", "a challenge not used before")


_FORGET = delete(spent_nonces).where(spent_nonces.c.expires < bindparam("before"))


@cache
def _spending(dialect: str) -> Any:
    """Returns the nonce where it was not there: drivers differ in what they count. Built once a database."""
    return insert_of(dialect, spent_nonces).on_conflict_do_nothing().returning(spent_nonces.c.nonce)
