"""What is asked of the state about leases gives the same on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, insert, select

from stip_keyservice.home import Home
from stip_keyservice.service import budgets, canaries, endings, instances, revocations, usage, users
from stip_keyservice.service.leases import LeaseRecord
from stip_keyservice.service.policy import Budgets
from stip_keyservice.service.release import EnclaveFacts
from stip_keyservice.service.shredding import shred_user
from stip_keyservice.service.state.schema import leases
from stip_keyservice.service.state.store import Store
from stip_keyservice.service.usage import Usage
from stip_keyservice.service.vault import Vault, open_vault
from stip_keyservice.service.watching import Standing, standings

from ..services.postgres import Server
from .conftest import MEASUREMENT, MadeInstance, make_instance

NOW, GRACE = 10_000, 300
FACTS = EnclaveFacts(
    measurement=MEASUREMENT,
    signer=bytes(32),
    isv_prod_id=0,
    isv_svn=0,
    platforms=(),
    tcb_status="UpToDate",
    advisories=(),
    tcb_evaluation_number=1,
    simulated=True,
)


class Book:
    """A store with one shared instance in two epochs, two users, and leases written by hand."""

    def __init__(self, store: Store, home: Home, folder: Path) -> None:
        self.store, self.vault = store, open_vault(home)
        self.made: MadeInstance = make_instance(folder / "0", home)
        second = make_instance(folder / "1", home, instance=self.made.id, epoch=1)
        with store.write() as db:
            for name in ("alice", "bob"):
                users.add(db, name, hashlib.sha256(name.encode()).digest(), budget=100, now=1)
            for made in (self.made, second):
                inspected = instances.inspect(made.directory, home.developer.public_key(), home.sealing)
                instances.add(db, inspected, vault=self.vault, domain=None, now=1)
            for name in ("alice", "bob"):
                instances.allow(db, self.made.id, users.by_name(db, name))

    def lease(self, number: int, name: str, *, epoch: int = 0, key: int = 1, expires: int = NOW + 900) -> bytes:
        """Of `name`, for the link key of that number; returns its handle."""
        with self.store.write() as db:
            user = users.by_name(db, name)
            record = LeaseRecord(
                handle=bytes([number]) * 16,
                user=user.id,
                device=user.devices[0].id,
                instance=self.made.id,
                epoch=epoch,
                manifest_digest=bytes(32),
                audience="gateway.test",
                link_key=bytes(91),
                link_key_digest=bytes([key]) * 32,
                tls_key=bytes([key]) * 32,
                enclave=FACTS.to_bytes(),
                delegated_until=NOW + 3600,
                serial=0,
                tokens=10,
                fed=0,
                not_before=NOW,
                expires=expires,
            )
            db.execute(insert(leases).values(**vars(replace(record))))
        return record.handle

    def found(self, key: int = 1, *, now: int = NOW) -> Standing:
        with self.store.read() as db:
            return standings(db, {bytes([key]) * 32}, now=now, grace=GRACE).get(bytes([key]) * 32, Standing())

    def states(self) -> dict[int, str]:
        with self.store.read() as db:
            return {lease.handle[0]: lease.state for lease in endings.listed(db, now=NOW, limit=99, ended_too=True)}


@pytest.fixture(params=["sqlite", "postgresql"])
def book(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Book]:
    home = Home.open(tmp_path / "home")
    if request.param == "sqlite":
        store = Store(home.database)
    else:
        server: Server = request.getfixturevalue("postgres")
        store = Store(server.url(server.database()))
    yield Book(store, home, tmp_path)
    store.close()


def test_each_revocation_ends_the_leases_of_its_subject_and_no_other(book: Book) -> None:
    first, second, third = book.lease(1, "alice"), book.lease(2, "bob"), book.lease(3, "bob", key=2)
    assert book.found() == Standing()
    with book.store.write() as db:
        made, ended = revocations.revoke(db, "enclave", (bytes([1]) * 32).hex(), reason="a test", now=NOW)
    assert (made.number, ended) == (1, 2)
    assert book.found().ended.keys() == {first, second}
    assert book.found(2) == Standing()
    with book.store.write() as db:
        made, ended = revocations.revoke(db, "measurement", MEASUREMENT.hex(), reason="a test", now=NOW)
        assert (made.number, ended) == (2, 1)
        assert revocations.standing(db, [("enclave", (bytes([1]) * 32).hex()), ("user", "nobody")])[0].number == 1
        assert revocations.standing(db, []) == []
    assert book.found(2) == Standing(ended={third: (book.made.id, 0)})
    assert book.states() == {1: "revoked", 2: "revoked", 3: "revoked"}


def test_what_was_closed_is_told_with_the_widest_name(book: Book) -> None:
    old, new = book.lease(1, "alice", epoch=0), book.lease(2, "alice", epoch=1)
    with book.store.write() as db:
        revocations.revoke(db, "epoch", f"{book.made.id}/0", reason="a test", now=NOW)
    assert book.found() == Standing(ended={old: (book.made.id, 0)}, closed=frozenset({(book.made.id, 0)}))
    with book.store.write() as db:
        revocations.revoke(db, "instance", book.made.id, reason="a test", now=NOW)
    both = {old: (book.made.id, 0), new: (book.made.id, 1)}
    assert book.found() == Standing(ended=both, closed=frozenset({(book.made.id, None)}))


def test_leases_that_are_over_are_heard_of_no_more_but_what_was_closed_is(book: Book) -> None:
    book.lease(1, "alice", expires=NOW - GRACE)
    with book.store.write() as db:
        revocations.revoke(db, "instance", book.made.id, reason="a test", now=NOW)
    assert book.found() == Standing(closed=frozenset({(book.made.id, None)}))


def test_epochs_supersede_drain_and_go(book: Book) -> None:
    handle = book.lease(1, "alice")
    with book.store.write() as db:
        instances.activate(db, book.made.id, 1, drain_until=NOW + 60)
    assert book.found() == Standing(superseded=frozenset({handle}))
    assert book.found(now=NOW + 60) == Standing(ended={handle: (book.made.id, 0)})
    assert book.states() == {1: "superseded"}
    with book.store.write() as db:
        instances.retire(db, book.vault, book.made.id, 0, now=NOW)
    assert book.found() == Standing(ended={handle: (book.made.id, 0)}, closed=frozenset({(book.made.id, 0)}))
    assert book.states() == {1: "epoch removed"}


def test_users_and_their_devices_end_their_own_leases(book: Book) -> None:
    hers, his = book.lease(1, "alice"), book.lease(2, "bob")
    with book.store.write() as db:
        instances.disallow(db, book.made.id, users.by_name(db, "alice"))
        users.disable(db, "bob", now=NOW)
    assert book.found().ended.keys() == {hers, his}
    assert book.states() == {1: "user disallowed", 2: "user disabled"}
    with book.store.write() as db:
        shred_user(db, book.vault, users.by_name(db, "alice"), now=NOW)
        users.enable(db, "bob")
        users.remove_device(db, users.by_name(db, "bob"), "first", now=NOW)
    assert book.states() == {1: "user removed", 2: "device removed"}


def test_a_measurement_is_revoked_however_many_leases_there_are(book: Book) -> None:
    """Databases take some 30,000 parameters in a statement; on the night it matters there are more leases than that."""
    parameters: list[int] = []

    def count(_: object, __: object, statement: str, given: Any, *___: object) -> None:
        if statement.startswith("UPDATE leases"):
            parameters.append(len(given))

    for number in range(40):
        book.lease(number, "alice")
    with book.store.write() as db:
        event.listen(db, "before_cursor_execute", count)
        assert revocations.revoke(db, "measurement", MEASUREMENT.hex(), reason="a test", now=NOW)[1] == 40
    assert parameters
    assert max(parameters) < 10


def test_the_newest_of_many_leases_are_listed(book: Book) -> None:
    first = book.lease(0, "alice")
    with book.store.write() as db:
        row = dict(db.execute(select(leases)).one()._mapping)
        more = [row | {"handle": number.to_bytes(16, "big"), "not_before": NOW - number} for number in range(1, 10_001)]
        db.execute(insert(leases), more)
    with book.store.read() as db:
        found = endings.listed(db, now=NOW, limit=100)
        assert [lease.handle for lease in found] == [first, *(number.to_bytes(16, "big") for number in range(1, 100))]
        assert len(endings.listed(db, now=NOW, limit=100_000, user=row["user"])) == 10_001
        assert instances.running_leases(db, book.made.id, now=NOW) == {0: 10_001}


def test_usage_and_the_days_budget_turn_at_midnight_utc(book: Book) -> None:
    midnight, caps = 3 * usage.DAY_SECONDS, Budgets(tokens_per_day=30)
    with book.store.write() as db:
        alice = users.by_name(db, "alice").id

        def debit(wanted: int, now: int) -> int:
            taken = budgets.debit(db, alice, wanted, caps, now=now)
            usage.record(db, alice, now=now, debited=taken)
            return taken

        assert [debit(20, midnight - 1), debit(20, midnight - 1), debit(20, midnight), debit(20, midnight)] == [
            20, 10, 20, 10
        ]  # fmt: skip
        assert [(day.day, day.debited) for day in usage.of(db, alice, since=0)] == [(2, 30), (3, 30)]


def test_canaries_and_usage(book: Book) -> None:
    vault: Vault = book.vault
    with book.store.write() as db:
        assert canaries.add(db, vault, book.made.id, 0, [b"one", b"two", b"three"]) == 3
        drawn = [*canaries.draw(db, vault, book.made.id, 0, 2), *canaries.draw(db, vault, book.made.id, 0, 2)]
        assert sorted(drawn) == [b"one", b"three", b"two"]
        user = users.by_name(db, "alice").id
        for _ in range(2):
            usage.record(db, user, now=86_400 * 7 + 5, debited=10, fed=4, leases=1)
        assert usage.of(db, user, since=7) == [Usage(user, 7, debited=20, fed=8, leases=2, renewals=0)]
        assert usage.of(db, user, since=8) == []
