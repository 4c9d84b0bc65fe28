"""The store under several writers at once, and what it refuses to open."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from stip_keyservice.home import Home
from stip_keyservice.rootkey import files
from stip_keyservice.service import budgets, instances, users
from stip_keyservice.service.auditlog import verify
from stip_keyservice.service.policy import Budgets
from stip_keyservice.service.state import revisions
from stip_keyservice.service.state.store import Store, backend
from stip_keyservice.service.state.upgrading import upgrade
from stip_keyservice.service.vault import open_vault
from stip_protocol import rpc
from stip_protocol.documents import Signed
from stip_protocol.errors import ConfigurationError, StipError, VersionUnsupported
from stip_protocol.release import Grant

from ..services.kills import died
from .conftest import Serve
from .place import Place

VERSION_1 = Path(__file__).with_name("version1")
"""A home and a database that version 1 itself made, with users, instances, a removed one, leases and a log."""


@pytest.fixture
def version_1(place: Place) -> dict[str, Any]:
    """That home, in its place; returns what is known of it."""
    place.home.mkdir(mode=0o700)
    for path in VERSION_1.iterdir():
        if path.suffix in (".key", ".pub", ".pem"):
            shutil.copy(path, place.home)
            (place.home / path.name).chmod(0o600)
    with sqlite3.connect(place.home / "state.db") as db:
        db.executescript((VERSION_1 / "state.sql").read_text())
    db.close()
    facts: dict[str, Any] = json.loads((VERSION_1 / "facts.json").read_text())
    return facts


def test_a_home_of_version_1_is_refused_until_it_is_upgraded_with_all_its_data(
    place: Place, version_1: dict[str, Any]
) -> None:
    refused = place.call_here("users", "list", code=2)
    assert refused["error"]["code"] == "version_unsupported"
    assert "`stip-keyservice state upgrade`" in refused["error"]["message"]
    log_before = _log(place)
    done = place.call_here("state", "upgrade")
    assert (done["before"], done["after"]) == ("0001", "0002")
    assert sorted(done["wrapped"]) == sorted(files.SECRET_FILES)
    assert not (place.home / "storage.key").exists()
    assert _log(place) == log_before

    home = Home.open(place.home)
    store = Store(home.database)
    with store.read() as db:
        for name, spent in version_1["spent"].items():
            user = users.by_name(db, name)
            assert (user.spent, user.domain) == (spent, f"user/{user.id}")
            assert [(one.name, one.public_key.hex()) for one in user.devices] == [("first", version_1["users"][name])]
        carol = users.by_key(db, bytes.fromhex(version_1["users"]["carol"]))
        assert carol is not None
        assert carol[0].removed_at is not None
        assert carol[1].removed_at is not None
        alice, bob = (users.by_name(db, name).id for name in ("alice", "bob"))
        found = {name: instances.by_id(db, version_1[name]) for name in ("dedicated", "shared", "removed", "audited")}
        assert instances.users_of(db, found["dedicated"]) == (alice,)
        assert instances.users_of(db, found["shared"]) == tuple(sorted((alice, bob)))
        assert found["removed"].removed
        assert [epoch.number for one in found.values() for epoch in one.epochs] == [0] * 4
        leakage = found["audited"].epochs[0].leakage
        assert leakage is not None
        assert leakage.cells[0].attack == "A"
        for instance, grant in version_1["grants"].items():
            assert instances.grant(db, open_vault(home), instance, 0) == Grant.from_bytes(bytes.fromhex(grant))
        assert db.execute(text("SELECT count(*) FROM leases")).scalar() == 0
    known = Signed.from_bytes(bytes.fromhex(version_1["head"]))
    assert verify(store, home.service.public_key(), known=known).sequence == version_1["entries"]
    store.close()
    assert _shape(place.home / "state.db") == _shape_of_a_fresh_one(place.folder)
    again = place.call_here("state", "upgrade")
    assert (again["before"], again["wrapped"]) == ("0002", [])
    assert place.call_here("state", "check")["plain"] == []


def test_what_the_storage_key_opened_is_in_no_file_after_the_upgrade(place: Place, version_1: dict[str, Any]) -> None:
    with sqlite3.connect(place.home / "state.db") as db:
        sealed = [row[0] for row in db.execute("SELECT sealed_grant FROM instances WHERE sealed_grant IS NOT NULL")]
    db.close()
    assert len(sealed) == 3
    place.call_here("state", "upgrade")
    for path in place.home.iterdir():
        assert not any(one in path.read_bytes() for one in sealed), path.name


@pytest.mark.parametrize("fault", ["missing", "another", "short"])
def test_an_upgrade_that_cannot_open_a_grant_changes_nothing(
    place: Place, version_1: dict[str, Any], fault: str
) -> None:
    key = place.home / "storage.key"
    right = key.read_bytes()
    before = _log(place), _shape(place.home / "state.db")
    if fault == "missing":
        key.unlink()
    else:
        key.write_bytes(bytes(32) if fault == "another" else bytes(31))
    place.call_here("state", "upgrade", code=1 if fault == "another" else 2)
    assert (_log(place), _shape(place.home / "state.db")) == before
    key.write_bytes(right)
    key.chmod(0o600)
    place.call_here("state", "upgrade")
    place.call_here("state", "check")


@pytest.mark.long
def test_an_upgrade_that_is_killed_at_any_point_is_run_again(place: Place, version_1: dict[str, Any]) -> None:
    pristine = place.folder / "pristine"
    shutil.copytree(place.home, pristine)
    at = 0
    while True:
        shutil.rmtree(place.home)
        shutil.copytree(pristine, place.home)
        if not died(lambda: upgrade(Home.open(place.home)), at):
            break
        upgrade(Home.open(place.home))
        assert place.call_here("state", "check")["plain"] == []
        at += 1
    assert at > 10


def _log(place: Place) -> list[Any]:
    with sqlite3.connect(place.home / "state.db") as db:
        rows = db.execute("SELECT sequence, entry, hash FROM audit ORDER BY sequence").fetchall()
        head = db.execute("SELECT signed FROM audit_head").fetchall()
    db.close()
    return [rows, head]


def _shape(path: Path) -> list[str]:
    """The schema as SQLite wrote it down, without white space."""
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'alembic%'").fetchall()
    db.close()
    return sorted("".join(sql.split()) for (sql,) in rows)


def _shape_of_a_fresh_one(folder: Path) -> list[str]:
    Store(folder / "fresh.db").close()
    return _shape(folder / "fresh.db")


def test_migrations_make_the_schema_that_the_tables_say(tmp_path: Path) -> None:
    stepped = backend(tmp_path / "stepped.db")
    with stepped.write() as db:
        assert revisions.upgrade(db).revision is None
    stepped.close()
    assert _shape(tmp_path / "stepped.db") == _shape_of_a_fresh_one(tmp_path)
    Store(tmp_path / "stepped.db").close()


def test_the_newest_migration_is_the_revision_that_is_required() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(revisions.__file__).with_name("migrations")))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_current_head() == revisions.REVISION
    assert {script.revision for script in scripts.walk_revisions()} == set(revisions.VERSIONS)


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
