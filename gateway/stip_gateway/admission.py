"""Leases at the gateway: who may open a session, and how many rows are left.

Rows are counted per lease handle over all links, because one lease may be used on links to several replicas; ids that a
session is fed and ids that a replica generates count as rows. The counts live in memory: a restarted gateway counts
anew, up to the mark the lease itself carries, and the key service's own debit stands whatever the gateway remembers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from stip_protocol.errors import LeaseExpired, LeaseForeign, LeaseSpent, Overloaded
from stip_protocol.lease import Lease, admit

TAG_CONTEXT = b"stip/account\0"
TAG_BYTES = 16


@dataclass
class Account:
    """What has been fed under one lease handle."""

    lease: Lease
    tag: bytes
    """Names the account to a replica, which is fair between accounts: nothing of the lease can be read from it."""
    since: int
    fed: int = 0

    def debit(self, rows: int, now: int) -> None:
        """Count `rows`. Raises `LeaseExpired` or `LeaseSpent` and counts nothing."""
        self.require(rows, now)
        self.fed += rows

    def require(self, rows: int, now: int) -> None:
        """Raise `LeaseExpired` or `LeaseSpent` where `rows` could not be counted."""
        if now >= self.lease.expires:
            raise LeaseExpired.because("lease expires", self.lease.expires, f"later than {now}")
        if self.fed + rows > self.lease.tokens:
            raise LeaseSpent.because("lease tokens", self.fed + rows, f"at most {self.lease.tokens}")

    def debit_rest(self, now: int) -> int:
        """Count all rows that are left, and say how many these are: none where the lease has expired."""
        rest = 0 if now >= self.lease.expires else max(0, self.lease.tokens - self.fed)
        self.fed += rest
        return rest


class Admission:
    """The accounts of one gateway. `clock` gives unix seconds."""

    def __init__(
        self, *, key: Ed25519PublicKey, audience: str, limit: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._key, self._audience, self._limit, self._clock = key, audience, limit, clock
        self._accounts: dict[bytes, Account] = {}

    def now(self) -> int:
        return int(self._clock())

    def open(self, signed: bytes, *, instance: str, epoch: int, manifest_digest: bytes, link_key: bytes) -> Account:
        """The account behind a lease presented with a new session, or renewed in a running link.

        A lower serial than the known one changes nothing. Raises `LeaseError` subclasses and `Overloaded`.
        """
        now = self.now()
        lease = admit(
            signed,
            key=self._key,
            audience=self._audience,
            instance=instance,
            epoch=epoch,
            link_key=link_key,
            now=now,
        )
        if lease.manifest_digest != manifest_digest:
            raise LeaseForeign.because("lease manifest_digest", lease.manifest_digest.hex(), manifest_digest.hex())
        account = self._accounts.get(lease.handle)
        if account is None:
            self._make_room(now)
            account = self._accounts[lease.handle] = Account(lease, account_tag(lease.handle), since=now)
        elif lease.serial > account.lease.serial:
            account.lease = lease
        return account

    def oldest_age(self) -> float:
        """Seconds since the oldest unexpired account was opened; 0 where there is none."""
        now = self.now()
        accounts = list(self._accounts.values())  # a copy at once: metrics are read in a thread of their own
        ages = [now - account.since for account in accounts if account.lease.expires > now]
        return float(max(ages, default=0))

    def _make_room(self, now: int) -> None:
        if len(self._accounts) < self._limit:
            return
        for handle in [handle for handle, account in self._accounts.items() if account.lease.expires <= now]:
            del self._accounts[handle]
        if len(self._accounts) >= self._limit:
            next_end = min(account.lease.expires for account in self._accounts.values())
            raise overloaded("leases", len(self._accounts) + 1, self._limit, retry_after=next_end - now)


def account_tag(handle: bytes) -> bytes:
    """What a lease's handle is called towards replicas."""
    return hashlib.sha256(TAG_CONTEXT + handle).digest()[:TAG_BYTES]


def overloaded(field: str, got: int, limit: int, *, retry_after: float) -> Overloaded:
    """The refusal of one more than a limit allows, with the seconds after which there may be room."""
    error = Overloaded.because(field, got, f"at most {limit}")
    error.retry_after = retry_after
    return error
