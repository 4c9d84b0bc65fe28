"""The audit log: whatever is done to it afterwards shows."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from stip_keyservice.service.auditlog import AuditEntry, AuditLog, Trail, verify
from stip_keyservice.service.state.store import Store
from stip_protocol import canonical
from stip_protocol.documents import Signed
from stip_protocol.errors import BudgetSpent, IntegrityError, SignatureInvalid
from stip_protocol.release import AuditHead

KEY = Ed25519PrivateKey.generate()
ENTRIES = 6


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "state.db")
    log = AuditLog(opened, KEY)
    for number in range(ENTRIES):
        with opened.write() as db:
            log.append(db, Trail("renewal", 100 + number, {"handle": bytes(16), "tokens": number}))
    yield opened
    opened.close()


def edit(store: Store, *statements: str) -> None:
    db = sqlite3.connect(store.place)
    with db:
        for statement in statements:
            db.execute(statement)
    db.close()


def forged_entry(store: Store) -> None:
    entry = AuditEntry(sequence=3, at=102, event="renewal", code="granted", handle=bytes(16), tokens=0)
    edit(store, f"UPDATE audit SET entry = x'{entry.to_bytes().hex()}' WHERE sequence = 3")


def other_version(store: Store) -> None:
    entry = canonical.encode({"ctx": AuditEntry.context, "version": [9, 0]})
    edit(store, f"UPDATE audit SET entry = x'{entry.hex()}' WHERE sequence = 3")


TAMPERING: dict[str, Callable[[Store], None]] = {
    "an edited entry": forged_entry,
    "an entry that is no entry": lambda store: edit(store, "UPDATE audit SET entry = x'a0' WHERE sequence = 3"),
    "an edited hash": lambda store: edit(store, f"UPDATE audit SET hash = x'{'00' * 32}' WHERE sequence = 3"),
    "a deleted row": lambda store: edit(store, "DELETE FROM audit WHERE sequence = 3"),
    "a deleted row closed up": lambda store: edit(
        store, "DELETE FROM audit WHERE sequence = 3", "UPDATE audit SET sequence = sequence - 1 WHERE sequence > 3"
    ),
    "a deleted first row": lambda store: edit(store, "DELETE FROM audit WHERE sequence = 1"),
    "two rows swapped": lambda store: edit(
        store,
        "UPDATE audit SET sequence = 99 WHERE sequence = 2",
        "UPDATE audit SET sequence = 2 WHERE sequence = 3",
        "UPDATE audit SET sequence = 3 WHERE sequence = 99",
    ),
    "a truncated tail": lambda store: edit(store, "DELETE FROM audit WHERE sequence > 4"),
    "an emptied log": lambda store: edit(store, "DELETE FROM audit"),
    "no signed head": lambda store: edit(store, "DELETE FROM audit_head"),
    "a head that is no document": lambda store: edit(store, "UPDATE audit_head SET signed = x'a0'"),
    "an entry of another major version": other_version,
}


def test_an_untouched_log_verifies(store: Store) -> None:
    log = AuditLog(store, KEY)
    head = verify(store, KEY.public_key(), known=log.head())
    assert (head.sequence, head.at) == (ENTRIES, 100 + ENTRIES - 1)
    assert [entry.tokens for entry in log.latest(3)] == [3, 4, 5]


def test_an_empty_log_verifies(tmp_path: Path) -> None:
    store = Store(tmp_path / "empty.db")
    assert verify(store, KEY.public_key()).sequence == 0
    assert AuditLog(store, KEY).head() is None
    store.close()


@pytest.mark.parametrize("tampering", TAMPERING.values(), ids=TAMPERING.keys())
def test_verification_detects(store: Store, tampering: Callable[[Store], None]) -> None:
    tampering(store)
    with pytest.raises(IntegrityError):
        verify(store, KEY.public_key())


def test_a_log_set_back_together_with_its_head_contradicts_a_head_kept_elsewhere(store: Store) -> None:
    log = AuditLog(store, KEY)
    before = log.head()
    with store.write() as db:
        known = log.append(db, Trail("renewal", 200))
    assert before is not None
    edit(
        store,
        f"DELETE FROM audit WHERE sequence > {ENTRIES}",
        f"UPDATE audit_head SET signed = x'{before.to_bytes().hex()}'",
    )
    assert verify(store, KEY.public_key()).sequence == ENTRIES
    with pytest.raises(IntegrityError, match="known head"):
        verify(store, KEY.public_key(), known=known)
    with store.write() as db:
        log.append(db, Trail("renewal", 201))
    with pytest.raises(IntegrityError, match="known head"):
        verify(store, KEY.public_key(), known=known)


def test_a_head_by_another_service_is_refused(store: Store) -> None:
    foreign = Signed.sign(AuditHead(sequence=1, hash=bytes(32), at=0), Ed25519PrivateKey.generate())
    with pytest.raises(SignatureInvalid):
        verify(store, KEY.public_key(), known=foreign)
    with pytest.raises(SignatureInvalid):
        verify(store, Ed25519PrivateKey.generate().public_key())


def test_nothing_is_decided_on_top_of_a_log_that_was_cut(store: Store) -> None:
    edit(store, "DELETE FROM audit WHERE sequence > 4")
    with pytest.raises(IntegrityError), store.write() as db:
        AuditLog(store, KEY).append(db, Trail("renewal", 300))


def test_a_refusal_is_recorded_although_its_transaction_is_undone(store: Store) -> None:
    log, trail = AuditLog(store, KEY), Trail("release", 300, {"tokens": 5, "kind": "bundle"})

    def granted_and_then_refused() -> None:
        with log.refusals(trail), store.write() as db:
            log.append(db, trail)
            raise BudgetSpent("spent")

    with pytest.raises(BudgetSpent):
        granted_and_then_refused()
    (last,) = log.latest(1)
    assert (last.sequence, last.code, last.kind, last.tokens) == (ENTRIES + 1, "budget_spent", "bundle", None)
    verify(store, KEY.public_key())
