"""The audit log: every decision of the key service, granted or refused, as a hash chain with a signed head.

    hash₀ = SHA-256("stip/audit-log")        hashₙ = SHA-256(hashₙ₋₁ ‖ entryₙ)

`entryₙ` is the canonical CBOR of an `AuditEntry`. The head (sequence and hash of the last entry, signed by the
service's key) is stored beside the log with every entry, and travels in bundles: an edited, removed or reordered
entry breaks the chain, a shortened log contradicts any head that was kept elsewhere. Times never go back, except where
the operator accepted an earlier clock (`clock`). Refusals of strangers are recorded up to a bound (`strangers`).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, TypedDict

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field
from sqlalchemy import Connection, insert, select, true

from stip_keyservice.service.clock import settle
from stip_keyservice.service.state.schema import audit, audit_head
from stip_keyservice.service.state.store import Store, insert_of
from stip_keyservice.service.strangers import Folded, Strangers
from stip_protocol.documents import Document, Signed
from stip_protocol.errors import (
    AuditLogForked,
    ConfigurationError,
    FrameInvalid,
    IntegrityError,
    StipError,
    VersionUnsupported,
)
from stip_protocol.lease import Bytes16, Bytes32, Epoch, InstanceId, Seconds, Tokens
from stip_protocol.release import AuditHead

GENESIS = hashlib.sha256(b"stip/audit-log").digest()
GRANTED = "granted"

Event = Literal[
    "release", "renewal", "user_added", "user_removed", "user_allowed", "user_disallowed", "user_disabled",
    "user_enabled", "user_shredded", "device_added", "device_removed", "device_rotated", "budget_set",
    "instance_added", "instance_removed", "instance_shredded", "epoch_added", "epoch_activated", "epoch_retired",
    "revoked", "revocation_lifted", "canaries_added", "policy_loaded", "root_key_rewrapped", "recovered",
    "recovery_shares_made", "clock_accepted",
    "refusals_folded",
]  # fmt: skip
TIMED: frozenset[Event] = frozenset({"release", "renewal"})
"""Decisions that give somebody time: not made by a clock that runs behind. An operator's are, and are dated as late as
the log's last entry: a wrong clock must not keep anybody from revoking."""


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
    count: int
    peer: str


@dataclass
class Trail:
    """One decision while it is being made: its entry says what was known when it ended."""

    event: Event
    now: int
    subject: Subject = field(default_factory=Subject)
    peer: str | None = None
    """Who asked over the network (`ratelimit.peer_name`); None for an operator."""

    @property
    def stranger(self) -> bool:
        """Whether it came over the network and is on behalf of no user of ours, as far as was verified. Evidence alone
        does not count: a sound enclave asks for whoever opens a session with a key that they made themselves."""
        return self.peer is not None and "user" not in self.subject


class AuditEntry(Document):
    """One decision. Users appear by their random id only."""

    context: ClassVar[str] = "stip/audit-entry"
    version: ClassVar[tuple[int, int]] = (1, 1)

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
    count: Tokens | None = None
    """Refusals that this entry stands for, where it is more than one: `strangers`."""
    peer: str | None = Field(default=None, max_length=64)
    """Of folded refusals, whose they were: an IPv4 address, an IPv6 /64, or `others`."""


@dataclass(frozen=True)
class _Tail:
    """The end of the log: its last entry and the head over it."""

    sequence: int
    hash: bytes
    signed: bytes | None


class AuditLog:
    """The log of one store, written under one service key."""

    def __init__(
        self,
        store: Store,
        key: Ed25519PrivateKey,
        *,
        observe: Callable[[int], None] = lambda length: None,
        decided: Callable[[Event, str], None] = lambda event, code: None,
        refusals_in_full: int = 8,
    ) -> None:
        """`observe` is told the log's length whenever it grows, `decided` of every decision, also of one that is only
        counted. `refusals_in_full`: see `strangers`."""
        self._store, self._key, self._observe, self._decided = store, key, observe, decided
        self._strangers = Strangers(in_full=refusals_in_full)
        self._public = key.public_key()
        self._written: tuple[bytes, AuditHead] | None = None
        self.last_at = 0
        """Time of the last entry that this process knows of."""

    def append(self, db: Connection, trail: Trail, *, code: str = GRANTED) -> Signed:
        """Add an entry in the caller's transaction, so that a decision and its entry stand or fall together.

        Returns the signed `AuditHead`. Raises `IntegrityError` where the log does not end with its signed head:
        nothing is decided on top of a log that was cut; `ClockRefused` where a decision of `TIMED` would be made
        before the last one.
        """
        tail = _tail(db)
        last = self._head_of(tail)
        _require_head(last, tail.sequence, tail.hash, "stored head")
        if code == GRANTED and trail.event in TIMED:
            settle(trail.now, last.at)
        at = trail.now if trail.event == "clock_accepted" else max(trail.now, last.at)
        sequence = tail.sequence + 1
        entry = AuditEntry(sequence=sequence, at=at, event=trail.event, code=code, **trail.subject).to_bytes()
        head = AuditHead(sequence=sequence, hash=_chain(tail.hash, entry), at=at)
        signed = Signed.sign(head, self._key)
        stored = signed.to_bytes()
        db.execute(_INSERT, {"sequence": sequence, "entry": entry, "hash": head.hash})
        db.execute(_keeping(db.dialect.name), {"one": 1, "signed": stored})
        self._written, self.last_at = (stored, head), at
        self._observe(sequence)
        if trail.event != "refusals_folded":  # counted when they were refused
            self._decided(trail.event, code)
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
            recorded = not trail.stranger or self._strangers.recorded(trail.peer or "", error.code, now=trail.now)
            with self._store.write() as db:
                also(db)
                if recorded:
                    self.append(db, trail, code=error.code)
            if not recorded:
                self._decided(trail.event, error.code)
            raise

    def write_folded(self, *, now: int) -> None:
        """Write what was folded in minutes that ended: to be called now and then, also where nobody asks anything."""
        self._write_folded(self._strangers.ended(now=now), now)

    def close(self, *, now: int) -> None:
        """Write what was folded and not written yet."""
        self._write_folded(self._strangers.close(), now)

    def accept_clock(self, *, now: int, reason: str) -> AuditEntry:
        """Take `now` for the time, though the last entry is later. Raises `ConfigurationError` where it is not."""
        with self._store.write() as db:
            last = self._head_of(_tail(db)).at
            if now >= last:
                raise ConfigurationError.because("clock", "one that is not behind", f"before {last}, the last entry's")
            self.append(db, Trail("clock_accepted", now, {"detail": f"from {last}: {reason}"[:128]}))
        return self.latest(1)[0]

    def refresh(self) -> int:
        """Read the time of the last entry again, which another process may have written; returns it.

        Raises `IntegrityError` where the log does not end with its signed head.
        """
        with self._store.read() as db:
            tail = _tail(db)
        head = self._head_of(tail)
        _require_head(head, tail.sequence, tail.hash, "stored head")
        self.last_at = head.at
        return head.at

    def _write_folded(self, folded: Sequence[Folded], now: int) -> None:
        if not folded:
            return
        try:
            with self._store.write() as db:
                for one in folded:
                    subject: Subject = {"detail": one.detail, "count": one.count, "peer": one.peer}
                    self.append(db, Trail("refusals_folded", now, subject), code=one.code)
        except Exception:
            self._strangers.give_back(folded)
            raise

    def _head_of(self, tail: _Tail) -> AuditHead:
        """The signed head of a tail. The one that this process signed last needs no verification again."""
        if self._written is not None and self._written[0] == tail.signed:
            return self._written[1]
        return _open_head(tail.signed, self._public, tail.sequence)

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


def verify(
    store: Store, key: Ed25519PublicKey, *, known: Signed | None = None, heads: Sequence[KnownHead] = ()
) -> AuditHead:
    """Check the whole log of a database; returns its head.

    `known` is a signed head kept elsewhere (from a bundle, or `audit-log head`), `heads` are more of them, as clients
    keep them: the log must contain every one. Raises `IntegrityError` naming the entry where the chain breaks, or the
    head that it does not reach; `AuditLogForked` where it reaches a head and is another log than the one that head was
    shown of; `SignatureInvalid` where a head is not by this service.
    """
    if known is not None:
        heads = (KnownHead("known head", known), *heads)
    with store.read() as db:
        rows = db.execute(select(audit).order_by(audit.c.sequence)).yield_per(1000)
        end = follow((StoredEntry(row.entry, row.sequence, row.hash) for row in rows), key, heads)
        own = _open_head(db.execute(select(audit_head.c.signed)).scalar(), key, end.sequence)
    _require_head(own, end.sequence, end.hash, "stored head")
    return own


@dataclass(frozen=True)
class StoredEntry:
    """An entry as it is kept; an export has its bytes alone."""

    entry: bytes
    sequence: int | None = None
    hash: bytes | None = None


@dataclass(frozen=True)
class KnownHead:
    """A signed head that somebody was shown, and where it comes from."""

    source: str
    signed: Signed


@dataclass(frozen=True)
class ChainEnd:
    """Where a chain ends that holds."""

    sequence: int
    hash: bytes
    at: int


def follow(entries: Iterable[StoredEntry], key: Ed25519PublicKey, heads: Sequence[KnownHead] = ()) -> ChainEnd:
    """Follow the chain entry by entry. Raises as `verify` does; the head at the end is the caller's to compare."""
    expected: dict[int, list[tuple[str, AuditHead]]] = {}
    for one in heads:
        head = one.signed.open(AuditHead, key)
        expected.setdefault(head.sequence, []).append((one.source, head))
    end = ChainEnd(0, GENESIS, 0)
    _require_known(expected, end)
    for stored in entries:
        end = _next(stored, end)
        _require_known(expected, end)
    for sequence in sorted(expected):
        if sequence > end.sequence:
            (source, _), *_ = expected[sequence]
            raise IntegrityError.because("audit log", f"{end.sequence} entries, cut", f"the {source}'s {sequence}")
    return end


def follow_tail(entries: Sequence[StoredEntry]) -> ChainEnd:
    """Follow the last entries of a log alone, from the first one's stored hash; from the beginning where they are all.

    Raises as `follow`. What comes before them is not looked at.
    """
    if not entries:
        return ChainEnd(0, GENESIS, 0)
    first, *rest = entries
    if first.sequence == 1 or first.sequence is None or first.hash is None:
        return _followed(entries, ChainEnd(0, GENESIS, 0))
    return _followed(rest, ChainEnd(first.sequence, first.hash, _entry(first.entry, first.sequence).at))


def _followed(entries: Iterable[StoredEntry], end: ChainEnd) -> ChainEnd:
    for stored in entries:
        end = _next(stored, end)
    return end


def _next(stored: StoredEntry, end: ChainEnd) -> ChainEnd:
    number = end.sequence + 1
    entry = _entry(stored.entry, number)
    for found in (entry.sequence, stored.sequence):
        if found is not None and found != number:
            raise IntegrityError.because("audit entry", f"number {found}", f"number {number}")
    hashed = _chain(end.hash, stored.entry)
    if stored.hash is not None and not hmac.compare_digest(hashed, stored.hash):
        raise IntegrityError(f"audit entry {number}: its hash does not continue the chain")
    if entry.at < end.at and entry.event != "clock_accepted":
        raise IntegrityError.because(f"time of audit entry {number}", entry.at, f"at least {end.at}")
    return ChainEnd(number, hashed, entry.at)


def _require_known(expected: dict[int, list[tuple[str, AuditHead]]], end: ChainEnd) -> None:
    for source, head in expected.get(end.sequence, ()):
        if not hmac.compare_digest(head.hash, end.hash):
            raise AuditLogForked(f"audit entry {end.sequence}: another hash than the {source}'s, of another log")


def require_end(signed: bytes, key: Ed25519PublicKey, end: ChainEnd) -> AuditHead:
    """The signed head that stands for a chain's end. Raises `IntegrityError`, `SignatureInvalid`."""
    head = _open_head(signed, key, end.sequence)
    _require_head(head, end.sequence, end.hash, "signed head")
    return head


_TAIL = (
    select(audit.c.sequence, audit.c.hash, audit_head.c.signed)
    .select_from(audit.outerjoin(audit_head, true()))
    .order_by(audit.c.sequence.desc())
    .limit(1)
)
_INSERT = insert(audit)


@cache
def _keeping(dialect: str) -> Any:
    kept = insert_of(dialect, audit_head)
    return kept.on_conflict_do_update(index_elements=["one"], set_={"signed": kept.excluded.signed})


def _tail(db: Connection) -> _Tail:
    row = db.execute(_TAIL).first()
    if row is not None:
        return _Tail(row.sequence, row.hash, row.signed)
    return _Tail(0, GENESIS, db.execute(select(audit_head.c.signed)).scalar())


def _open_head(stored: bytes | None, key: Ed25519PublicKey, length: int) -> AuditHead:
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
