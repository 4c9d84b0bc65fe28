"""Leases on record: issued with a bundle, renewed by heartbeats, ended by doing nothing.

The tokens of a lease are a cumulative mark, and every token below the mark was debited before it was signed. The
serial of the last renewal is the only one that can be renewed: each heartbeat works once, and repeating it gives
the same answer again.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, bindparam, delete, insert, select, update

from stip_keyservice.service import budgets, usage
from stip_keyservice.service.instances import Epoch, Instance
from stip_keyservice.service.policy import Budgets, LeasePolicy
from stip_keyservice.service.release import Applicant
from stip_keyservice.service.state.schema import leases
from stip_keyservice.service.users import Device, User
from stip_protocol.documents import Signed
from stip_protocol.errors import (
    BudgetSpent,
    DelegationRefused,
    LeaseExpired,
    LeaseForeign,
    LeaseSpent,
    NonceRefused,
    RequestInvalid,
)
from stip_protocol.lease import Lease
from stip_protocol.release import Heartbeat

HANDLE_BYTES = 16
KEPT_SECONDS = 24 * 3600
"""How long an ended lease stays on record beyond its grace."""


@dataclass(frozen=True)
class LeaseRecord:
    """One row. Times in Unix seconds, tokens as rows fed since the first serial."""

    handle: bytes
    user: str
    device: str
    instance: str
    epoch: int
    manifest_digest: bytes
    audience: str
    link_key: bytes
    """SubjectPublicKeyInfo (DER) of the claims' link key, which signs heartbeats."""
    link_key_digest: bytes
    """SHA-256 of it: what the lease names the link by."""
    tls_key: bytes
    """SHA-256 of the enclave's RA-TLS key: how an enclave is named where it is revoked."""
    enclave: bytes = field(repr=False)
    """`EnclaveFacts`: what its evidence established."""
    delegated_until: int
    """The delegation's end: no lease outlives the user's word."""
    serial: int
    tokens: int
    fed: int
    not_before: int
    expires: int
    revoked: int | None = None
    """Number of the revocation that ended it."""
    heartbeat: bytes | None = field(default=None, repr=False)
    """SHA-256 of the last heartbeat that was answered."""
    renewal: bytes | None = field(default=None, repr=False)
    """The answer to it, signed."""

    def sign(self, key: Ed25519PrivateKey, audit_head: bytes) -> bytes:
        """The signed `Lease` this record stands for."""
        lease = Lease(
            handle=self.handle,
            serial=self.serial,
            audience=self.audience,
            instance=self.instance,
            epoch=self.epoch,
            manifest_digest=self.manifest_digest,
            link_key=self.link_key_digest,
            not_before=self.not_before,
            expires=self.expires,
            tokens=self.tokens,
            audit_head=audit_head,
        )
        return Signed.sign(lease, key).to_bytes()


def issue(
    db: Connection,
    applicant: Applicant,
    holder: tuple[User, Device],
    of: tuple[Instance, Epoch],
    policy: LeasePolicy,
    *,
    caps: Budgets,
    now: int,
) -> LeaseRecord:
    """Debit a first chunk and record a lease for it. Raises `BudgetSpent`.

    The chunk is what the claims ask for (0: as much as there is in one), at most the policy's and what is left.
    """
    (user, device), (instance, epoch) = holder, of
    wanted = applicant.claims.tokens or policy.tokens
    tokens = budgets.debit(db, user.id, min(wanted, policy.tokens), caps, now=now)
    if tokens == 0:
        raise BudgetSpent.because("budget", "0 tokens left", "at least 1")
    db.execute(_FORGET, {"before": now - policy.grace_seconds - KEPT_SECONDS})
    record = LeaseRecord(
        handle=secrets.token_bytes(HANDLE_BYTES),
        user=user.id,
        device=device.id,
        instance=instance.id,
        epoch=epoch.number,
        manifest_digest=epoch.manifest_digest,
        audience=policy.audience,
        link_key=applicant.claims.link_key,
        link_key_digest=hashlib.sha256(applicant.claims.link_key).digest(),
        tls_key=applicant.claims.tls_key,
        enclave=applicant.enclave.to_bytes(),
        delegated_until=applicant.delegation.expires,
        serial=0,
        tokens=tokens,
        fed=0,
        not_before=now,
        expires=_end(now, policy, applicant.delegation.expires, epoch),
    )
    db.execute(_INSERT, vars(record))
    usage.record(db, user.id, now=now, debited=tokens, leases=1)
    return record


def find(db: Connection, handle: bytes) -> LeaseRecord:
    """The lease on record. Raises `LeaseForeign`."""
    row = db.execute(_BY_HANDLE, {"handle": handle}).first()
    if row is None:
        raise LeaseForeign.because("heartbeat handle", "one that is not on record", "the handle of a lease")
    return LeaseRecord(**row._mapping)


def known_link_key(db: Connection, link_key: bytes) -> bool:
    """Whether a lease on record, ended or not, names the link key (SHA-256 of its SubjectPublicKeyInfo)."""
    named = select(leases.c.handle).where(leases.c.link_key_digest == link_key).limit(1)
    return db.execute(named).first() is not None


def answered(record: LeaseRecord, heartbeat: bytes) -> bytes | None:
    """The stored answer where `heartbeat` is the last one once more: its reply was lost on the way."""
    if record.heartbeat is None or not hmac.compare_digest(record.heartbeat, hashlib.sha256(heartbeat).digest()):
        return None
    return record.renewal


def renew(
    db: Connection,
    record: LeaseRecord,
    heartbeat: Heartbeat,
    epoch: Epoch,
    policy: LeasePolicy,
    *,
    caps: Budgets,
    now: int,
) -> tuple[LeaseRecord, int]:
    """The record's next serial, and the tokens debited for it.

    The mark rises to what was fed and as many more as are wanted, at most a chunk and what the budget has left;
    it never falls. Raises `NonceRefused` (a serial that was renewed already), `LeaseExpired`,
    `DelegationRefused` (the user's word has run out), `RequestInvalid`, `LeaseSpent`, `BudgetSpent`.
    """
    if heartbeat.serial != record.serial:
        raise NonceRefused.because("heartbeat serial", heartbeat.serial, f"{record.serial}, and that once")
    if now >= record.expires + policy.grace_seconds:
        raise LeaseExpired.because("lease", f"ended {now - record.expires} s ago", f"at most {policy.grace_seconds} s")
    if now >= record.delegated_until:
        raise DelegationRefused.because("delegation expires", record.delegated_until, f"after {now}")
    if heartbeat.fed < record.fed:
        raise RequestInvalid.because("heartbeat fed", heartbeat.fed, f"at least {record.fed}, as reported before")
    if heartbeat.fed > record.tokens:
        raise LeaseSpent.because("heartbeat fed", heartbeat.fed, f"at most {record.tokens}, the lease's mark")
    target = heartbeat.fed + min(heartbeat.wanted, policy.tokens)
    debited = budgets.debit(db, record.user, max(0, target - record.tokens), caps, now=now)
    if heartbeat.wanted and record.tokens + debited <= heartbeat.fed:
        raise BudgetSpent.because("budget", "0 tokens left", "at least 1")
    renewed = replace(
        record,
        serial=record.serial + 1,
        tokens=record.tokens + debited,
        fed=heartbeat.fed,
        not_before=now,
        expires=_end(now, policy, record.delegated_until, epoch),
    )
    usage.record(db, record.user, now=now, debited=debited, fed=heartbeat.fed - record.fed, renewals=1)
    return renewed, debited


def store_renewal(db: Connection, record: LeaseRecord, heartbeat: bytes, renewal: bytes) -> None:
    """Write a renewed record with the answer that a repeated heartbeat gets."""
    record = replace(record, heartbeat=hashlib.sha256(heartbeat).digest(), renewal=renewal)
    db.execute(update(leases).where(leases.c.handle == record.handle).values(**vars(record)))


def _end(now: int, policy: LeasePolicy, delegated_until: int, epoch: Epoch) -> int:
    """No lease outlives the user's word, nor the time in which its epoch drains."""
    ends = (now + policy.seconds, delegated_until, epoch.drain_until)
    return min(end for end in ends if end is not None)


# What every release and renewal does, built once: building a statement costs more than running it.
_FORGET = delete(leases).where(leases.c.expires < bindparam("before"))
_INSERT = insert(leases)
_BY_HANDLE = select(leases).where(leases.c.handle == bindparam("handle"))
