"""The store under several writers at once, and what it refuses to open."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import grpc.aio
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from stip_keyservice.home import Home
from stip_keyservice.service import budgets, users
from stip_keyservice.service.auditlog import verify
from stip_keyservice.service.policy import Budgets
from stip_keyservice.service.state.store import Store
from stip_protocol import rpc
from stip_protocol.errors import ConfigurationError, StipError, VersionUnsupported

from .conftest import Serve


async def test_concurrent_releases_at_the_end_of_a_budget_never_overspend(serve: Serve) -> None:
    async with serve() as one, serve() as two:  # two replicas on one database
        alice = one.person("alice", budget=1500)
        instance = one.instance(members=(alice,))

        async def ask(number: int) -> int | str:
            world = (one, two)[number % 2]
            try:
                _, lease = await world.bundle(world.enclave(), alice, instance.id, tokens=1000)
            except grpc.aio.AioRpcError as error:
                return rpc.from_rpc(error).code
            return lease.tokens

        answers = await asyncio.gather(*(ask(number) for number in range(8)))
        assert sorted(map(str, answers)) == sorted(["1000", "500", *["budget_spent"] * 6])
        assert one.user(alice).spent == 1500
        assert verify(one.store, one.home.service.public_key()).sequence == 8


async def test_concurrent_renewals_of_one_serial_debit_once(serve: Serve) -> None:
    async with serve() as one, serve() as two:
        alice = one.person("alice")
        instance = one.instance(members=(alice,))
        enclave = one.enclave()
        _, lease = await one.bundle(enclave, alice, instance.id)

        async def renew(number: int) -> int | str:
            try:
                _, renewed = await (one, two)[number % 2].renew(enclave, lease, fed=64, wanted=100)
            except grpc.aio.AioRpcError as error:
                return rpc.from_rpc(error).code
            return renewed.serial

        answers = await asyncio.gather(*(renew(number) for number in range(6)))
        assert sorted(map(str, answers)) == ["1", *["nonce_refused"] * 5]
        assert one.user(alice).spent == 164


def test_one_nonce_is_spent_by_one_of_many_processes(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Store(path).close()
    program = """
import sys
from pathlib import Path
from stip_keyservice.service import nonces
from stip_keyservice.service.state.store import Store
from stip_protocol.errors import NonceRefused
store, won = Store(Path(sys.argv[1])), 0
for number in range(40):
    try:
        with store.write() as db:
            nonces.spend(db, number.to_bytes(32, "big"), expires=10, now=5)
        won += 1
    except NonceRefused:
        pass
print(won)
"""
    racers = [
        subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    won = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert sum(won) == 40


def test_the_table_itself_refuses_to_overspend(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    with store.write() as db:
        user = users.add(db, "alice", bytes(32), budget=10, now=1)
        assert budgets.debit(db, user.id, 7, Budgets(), now=1) == 7
    with pytest.raises(IntegrityError), store.write() as db:
        db.execute(text("UPDATE users SET spent = 11"))
    with store.read() as db:
        assert budgets.remaining(db, user.id) == 3
    store.close()


def test_a_refusal_undoes_its_transaction(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")

    def added_twice() -> None:
        with store.write() as db:
            users.add(db, "alice", bytes(32), budget=10, now=1)
            users.add(db, "alice", bytes(31) + b"\1", budget=10, now=1)

    with pytest.raises(StipError):
        added_twice()
    with store.read() as db:
        assert users.everyone(db) == []
    store.close()


def test_the_database_is_for_its_owner_alone(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    store = Store(home.database)
    with store.write() as db:
        users.add(db, "alice", bytes(32), budget=10, now=1)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.path.iterdir()}
    assert {name for name in modes if name.startswith("state.db")} == {"state.db", "state.db-wal", "state.db-shm"}
    assert set(modes.values()) == {0o600}
    store.close()


@pytest.mark.parametrize("version", ["1", "3", "", "one"])
def test_a_schema_of_another_version_is_refused(tmp_path: Path, version: str) -> None:
    Store(tmp_path / "state.db").close()
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("UPDATE meta SET value = ?", (version,))
    db.close()
    with pytest.raises(VersionUnsupported):
        Store(tmp_path / "state.db")


def test_a_refused_database_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '3'")
        db.execute("DROP TABLE leakage_summaries")
    with pytest.raises(VersionUnsupported):
        Store(path)
    assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'leakage_summaries'").fetchall()
    db.close()


def test_another_programs_database_and_a_file_that_is_none_are_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE notes (note TEXT)")
    db.close()
    with pytest.raises(VersionUnsupported):
        Store(tmp_path / "other.db")
    (tmp_path / "text.db").write_bytes(b"not a database " * 100)
    with pytest.raises(ConfigurationError):
        Store(tmp_path / "text.db")
    with pytest.raises(ConfigurationError):
        Store(tmp_path / "missing" / "state.db")
