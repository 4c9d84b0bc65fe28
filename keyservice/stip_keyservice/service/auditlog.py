"""The audit log: every decision of the key service, granted or refused, as a hash chain with a signed head.

    hash₀ = SHA-256("stip/audit-log")        hashₙ = SHA-256(hashₙ₋₁ ‖ entryₙ)

`entryₙ` is the canonical CBOR of an `AuditEntry`. The head (sequence and hash of the last entry, signed by the
service's key) is stored beside the log with every entry, and travels in bundles: an edited, removed or reordered
entry breaks the chain, a shortened log contradicts any head that was kept elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypedDict

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field
from sqlalchemy import Connection, insert, select

from stip_keyservice.service.state.schema import audit, audit_head
from stip_keyservice.service.state.store import Store, insert_into
from stip_protocol.documents import Document, Signed
from stip_protocol.errors import FrameInvalid, IntegrityError, StipError, VersionUnsupported
from stip_protocol.lease import Bytes16, Bytes32, Epoch, InstanceId, Seconds, Tokens
from stip_protocol.release import AuditHead

GENESIS = hashlib.sha256(b"stip/audit-log").digest()
GRANTED = "granted"

Event = Literal[
    "release", "renewal", "user_added", "user_removed", "user_allowed", "user_disabled", "user_enabled",
    "user_shredded", "device_added", "device_removed", "budget_set", "instance_added", "instance_removed",
    "epoch_added", "epoch_activated", "epoch_retired", "revoked", "revocation_lifted", "canaries_added",
    "policy_loaded", "root_key_rewrapped", "recovered", "clock_accepted",
]  # fmt: skip


class Subject(TypedDict, total=False):
    """What an entry may say about its decision. Of a refusal, only `user` and `measurement` were verified."""

    kind: str
    user: str
    device: str
    instance: str
    epoch: int
    revocation: int
    detail: str
    measurement: bytes
    handle: bytes
    tokens: int


@dataclass
class Trail:
    """One decision while it is being made: its entry says what was known when it ended."""

    event: Event
    now: int
    subject: Subject = field(default_factory=Subject)


class AuditEntry(Document):
    """One decision. Users appear by their random id only."""

    context: ClassVar[str] = "stip/audit-entry"

    sequence: Tokens
    at: Seconds
    event: Event
    code: str = Field(max_length=64)
    """`granted`, or the stable code of the refusal."""
    kind: str | None = Field(default=None, max_length=16)
    user: str | None = Field(default=None, max_length=32)
    device: str | None = Field(default=None, max_length=32)
    instance: InstanceId | None = None
    epoch: Epoch | None = None
    revocation: Tokens | None = None
    """Number of the revocation that this entry made or lifted."""
    detail: str | None = Field(default=None, max_length=128)
    """What else names the decision: a digest, a reason of the operator's. Never content."""
    measurement: Bytes32 | None = None
    handle: Bytes16 | None = None
    tokens: Tokens | None = None
    """Tokens debited by this decision."""


class AuditLog:
    """The log of one store, written under one service key."""

    def __init__(
        self, store: Store, key: Ed25519PrivateKey, *, observe: Callable[[int], None] = lambda length: None
    ) -> None:
        """`observe` is told the log's length whenever it grows."""
        self._store, self._key, self._observe = store, key, observe

    def append(self, db: Connection, trail: Trail, *, code: str = GRANTED) -> Signed:
        """Add an entry in the caller's transaction, so that a decision and its entry stand or fall together.

        Returns the signed `AuditHead`. Raises `IntegrityError` where the log does not end with its signed head:
        nothing is decided on top of a log that was cut.
        """
        last = db.execute(select(audit).order_by(audit.c.sequence.desc()).limit(1)).first()
        length, previous = (last.sequence, last.hash) if last else (0, GENESIS)
        _require_head(_stored_head(db, self._key.public_key(), length), length, previous, "stored head")
        sequence = length + 1
        entry = AuditEntry(sequence=sequence, at=trail.now, event=trail.event, code=code, **trail.subject).to_bytes()
        head = AuditHead(sequence=sequence, hash=_chain(previous, entry), at=trail.now)
        signed = Signed.sign(head, self._key)
        db.execute(insert(audit).values(sequence=sequence, entry=entry, hash=head.hash))
        stored = insert_into(db, audit_head).values(one=1, signed=signed.to_bytes())
        db.execute(stored.on_conflict_do_update(index_elements=["one"], set_={"signed": stored.excluded.signed}))
        self._observe(sequence)
        return signed

    @contextmanager
    def refusals(self, trail: Trail, *, also: Callable[[Connection], None] = lambda db: None) -> Iterator[None]:
        """Record a refusal raised inside, in a transaction of its own: whatever it undid, its entry stands.

        `also` writes in that transaction what the refusal costs whoever was refused.
        """
        try:
            yield
        except StipError as error:
            trail.subject.pop("tokens", None)
            with self._store.write() as db:
                also(db)
                self.append(db, trail, code=error.code)
            raise

    def head(self) -> Signed | None:
        """The signed head as stored; None while nothing was decided yet."""
        with self._store.read() as db:
            stored = db.execute(select(audit_head.c.signed)).scalar()
        return None if stored is None else Signed.from_bytes(stored)

    def latest(self, count: int) -> Sequence[AuditEntry]:
        """The last `count` entries, oldest first, unverified."""
        with self._store.read() as db:
            rows = db.execute(select(audit.c.entry).order_by(audit.c.sequence.desc()).limit(count)).scalars().all()
        return [AuditEntry.from_bytes(row) for row in reversed(rows)]

    def length(self) -> int:
        """Entries in the log."""
        with self._store.read() as db:
            return db.execute(select(audit.c.sequence).order_by(audit.c.sequence.desc()).limit(1)).scalar() or 0


def verify(store: Store, key: Ed25519PublicKey, *, known: Signed | None = None) -> AuditHead:
    """Check the whole log offline; returns its head.

    `known` is a signed head kept elsewhere (from a bundle, or `audit-log head`): the log must contain it.
    Raises `IntegrityError` naming the entry where the chain breaks, or what is missing; `SignatureInvalid`
    where a head is not by this service.
    """
    expected = None if known is None else known.open(AuditHead, key)
    with store.read() as db:
        sequence, previous = 0, GENESIS
        for row in db.execute(select(audit).order_by(audit.c.sequence)).yield_per(1000):
            entry = _entry(row.entry, sequence + 1)
            if row.sequence != sequence + 1 or entry.sequence != row.sequence:
                raise IntegrityError.because("audit entry", f"number {row.sequence}", f"number {sequence + 1}")
            if not hmac.compare_digest(_chain(previous, row.entry), row.hash):
                raise IntegrityError(f"audit entry {row.sequence}: its hash does not continue the chain")
            sequence, previous = row.sequence, row.hash
            if expected is not None and expected.sequence == sequence:
                _require_head(expected, sequence, previous, "known head")
        own = _stored_head(db, key, sequence)
    _require_head(own, sequence, previous, "stored head")
    if expected is not None and expected.sequence > sequence:
        raise IntegrityError.because("audit log", f"{sequence} entries", f"the known head's {expected.sequence}")
    return own


def _stored_head(db: Connection, key: Ed25519PublicKey, length: int) -> AuditHead:
    stored = db.execute(select(audit_head.c.signed)).scalar()
    if stored is not None:
        try:
            return Signed.from_bytes(stored).open(AuditHead, key)
        except FrameInvalid:
            raise IntegrityError("audit head: not a signed head") from None
    if length:
        raise IntegrityError("audit head: missing, though the log has entries")
    return AuditHead(sequence=0, hash=GENESIS, at=0)


def _require_head(head: AuditHead, sequence: int, found: bytes, what: str) -> None:
    if head.sequence != sequence:
        raise IntegrityError.because("audit log", f"{sequence} entries", f"the {what}'s {head.sequence}")
    if not hmac.compare_digest(head.hash, found):
        raise IntegrityError(f"audit entry {sequence}: another hash than the {what}'s")


def _entry(data: bytes, sequence: int) -> AuditEntry:
    try:
        return AuditEntry.from_bytes(data)
    except (FrameInvalid, VersionUnsupported):
        raise IntegrityError(f"audit entry {sequence}: not an entry") from None


def _chain(previous: bytes, entry: bytes) -> bytes:
    return hashlib.sha256(previous + entry).digest()
