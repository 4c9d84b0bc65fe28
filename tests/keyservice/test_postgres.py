"""The store on a real PostgreSQL: the promises that it keeps on SQLite, and the database's own refusals."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import URL, inspect, make_url, select, text
from sqlalchemy.exc import IntegrityError

from stip_keyservice.home import Home
from stip_keyservice.rootkey import settings
from stip_keyservice.rootkey.settings import DatabaseSettings, HomeSettings
from stip_keyservice.service import budgets, canaries, instances, users
from stip_keyservice.service.auditlog import AuditLog, Trail, verify
from stip_keyservice.service.policy import Budgets
from stip_keyservice.service.shredding import shred_user
from stip_keyservice.service.state import postgres as backend_module
from stip_keyservice.service.state import revisions
from stip_keyservice.service.state.migrations import Secrets
from stip_keyservice.service.state.migrations.versions.revision_0001 import metadata as version_1
from stip_keyservice.service.state.schema import data_keys
from stip_keyservice.service.state.store import Store, backend
from stip_keyservice.service.vault import open_vault
from stip_protocol.errors import ConfigurationError, NonceRefused, StipError, Unavailable, VersionUnsupported
from stip_protocol.release import Heartbeat
from stip_stack.tee import SimulatedPlatform

from ..services.cutting import Cutting
from ..services.postgres import PASSWORD, Server
from .conftest import make_instance, refusal, served
from .place import Place

VERSION_1 = Path(__file__).with_name("version1")


@pytest.fixture
def url(postgres: Server) -> URL:
    return postgres.url(postgres.database())


@pytest.fixture
def store(url: URL) -> Iterator[Store]:
    opened = Store(url)
    yield opened
    opened.close()


def test_a_decision_waits_for_the_one_before_it_and_sees_what_that_wrote(store: Store) -> None:
    with store.write() as db:
        alice = users.add(db, "alice", bytes(32), budget=1000, now=1)
    taken: list[int] = []

    def take() -> None:
        for _ in range(4):
            with store.write() as db:
                taken.append(budgets.debit(db, alice.id, 30, Budgets(), now=1))

    racers = [threading.Thread(target=take) for _ in range(20)]  # more than there are connections
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sum(taken) == 1000
    assert sorted(taken)[-33:] == [30] * 33


PROGRAM = """
import sys
from pathlib import Path
from sqlalchemy import make_url
from stip_keyservice.home import Home
from stip_keyservice.service import budgets, canaries, nonces
from stip_keyservice.service.policy import Budgets
from stip_keyservice.service.state.store import Store
from stip_keyservice.service.vault import open_vault
from stip_protocol.errors import NonceRefused
store, user, instance = Store(make_url(sys.argv[1])), sys.argv[2], sys.argv[3]
vault = open_vault(Home.open(Path(sys.argv[4])))
won, taken, drawn = 0, 0, []
for number in range(25):
    try:
        with store.write() as db:
            nonces.spend(db, number.to_bytes(32, "big"), expires=10, now=5)
        won += 1
    except NonceRefused:
        pass
    with store.write() as db:
        taken += budgets.debit(db, user, 7, Budgets(), now=1)
        drawn += [int(item) for item in canaries.draw(db, vault, instance, 0, 1)]
print(won, taken, *drawn)
"""


def test_replicas_never_grant_a_nonce_a_chunk_or_a_canary_twice(store: Store, url: URL, tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    made = make_instance(tmp_path / "made", home)
    vault = open_vault(home)
    with store.write() as db:
        alice = users.add(db, "alice", bytes(32), budget=300, now=1)
        inspected = instances.inspect(made.directory, home.developer.public_key(), home.sealing)
        instances.add(db, inspected, vault=vault, domain=None, now=1)
        canaries.add(db, vault, made.id, 0, [str(number).encode() for number in range(40)])
    place = url.render_as_string(hide_password=False)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, place, alice.id, made.id, str(home.path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [[int(word) for word in racer.communicate(timeout=60)[0].split()] for racer in racers]
    assert all(racer.returncode == 0 for racer in racers)
    assert sum(won for won, *_ in said) == 25
    assert sum(taken for _, taken, *_ in said) == 300
    drawn = [number for _, _, *numbers in said for number in numbers]
    assert sorted(drawn) == list(range(40))
    assert len([one for one in said if len(one) > 2]) > 1, "one racer alone drew everything: nothing raced"


def test_a_reader_has_one_view_though_others_write_and_cannot_write_itself(store: Store) -> None:
    with store.read() as db:
        assert users.everyone(db) == []
        with store.write() as other:
            users.add(other, "alice", bytes(32), budget=1, now=1)
        assert users.everyone(db) == []
    with store.read() as db:
        assert [user.name for user in users.everyone(db)] == ["alice"]
    with pytest.raises(Unavailable), store.read() as db:
        users.add(db, "bob", bytes(31) + b"1", budget=1, now=1)


def test_a_refusal_undoes_its_transaction_and_the_table_refuses_to_overspend(store: Store) -> None:
    with store.write() as db:
        users.add(db, "alice", bytes(32), budget=10, now=1)

    def refused() -> None:
        with store.write() as db:
            db.execute(text("UPDATE users SET spent = 5"))
            raise NonceRefused("no")

    with pytest.raises(NonceRefused):
        refused()
    with pytest.raises(IntegrityError), store.write() as db:
        db.execute(text("UPDATE users SET spent = 11"))
    with store.read() as db:
        assert db.execute(text("SELECT spent FROM users")).scalar() == 0


def test_a_decision_that_waits_too_long_is_refused_as_unavailable(url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "LOCK_SECONDS", 1)
    one, two = Store(url), Store(url)
    with one.write() as db:
        users.add(db, "alice", bytes(32), budget=1, now=1)
        with pytest.raises(Unavailable), two.write():
            pytest.fail("two decisions at once")
    with two.write() as db:
        assert [user.name for user in users.everyone(db)] == ["alice"]
    one.close()
    two.close()


def test_a_table_that_somebody_holds_makes_decisions_unavailable_and_not_endless(
    postgres: Server, url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "LOCK_SECONDS", 1)
    store = Store(url)
    with psycopg.connect(host=str(postgres.folder), port=postgres.port, user="stip", dbname=url.database) as stuck:
        stuck.execute("LOCK TABLE users")
        with pytest.raises(Unavailable), store.write() as db:
            users.add(db, "alice", bytes(32), budget=1, now=1)
    with store.write() as db:
        users.add(db, "alice", bytes(32), budget=1, now=1)
    store.close()


def test_more_readers_than_connections_are_refused_as_unavailable(url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "LOCK_SECONDS", 1)
    monkeypatch.setattr(backend_module, "CONNECTIONS", 2)
    store = Store(url)
    with store.read(), store.read(), pytest.raises(Unavailable, match="every connection"), store.read():
        pytest.fail("a third of two connections")
    with store.read() as db:
        assert users.everyone(db) == []
    store.close()


@pytest.fixture
def cutting(postgres: Server) -> Iterator[Cutting]:
    with tempfile.TemporaryDirectory(prefix="stip-cut-") as folder:  # short: a socket's path has 107 bytes at most
        made = Cutting(postgres, Path(folder))
        yield made
        made.close()


async def test_a_commit_whose_answer_is_lost_grants_nothing_twice_and_its_chunk_counts_as_spent(
    cutting: Cutting, postgres: Server, tmp_path: Path, platform: SimulatedPlatform, policy_tables: dict[str, Any]
) -> None:
    (tmp_path / "home").mkdir(mode=0o700)
    place = cutting.url(postgres.database())
    configured = DatabaseSettings(url=place.render_as_string(hide_password=False))
    settings.store(tmp_path / "home", HomeSettings(database=configured))
    async with served(tmp_path, platform, policy_tables) as world:
        alice = world.person("alice", budget=250)
        instance, enclave = world.instance(owner=alice), world.enclave()
        delegation = alice.delegate(enclave, instance.id)
        request = enclave.request(enclave.claims(await world.challenge(), delegation, instance.id), delegation)
        cutting.arm()
        assert await refusal(world.stub.Release(request)) == "unavailable"
        assert world.user(alice).spent == 100
        granted = [(entry.code, entry.tokens) for entry in world.entries() if entry.event == "release"]
        assert granted[0] == ("granted", 100)
        assert await refusal(world.stub.Release(request)) == "nonce_refused"
        _, lease = await world.bundle(enclave, alice, instance.id)
        assert world.user(alice).spent == 200
        beat = Heartbeat(handle=lease.handle, serial=lease.serial, nonce=bytes(32), fed=100, wanted=30)
        cutting.arm()
        assert await refusal(world.send(beat, enclave)) == "unavailable"
        _, renewed = await world.send(beat, enclave)  # the same once more: the answer that was lost
        assert (renewed.serial, renewed.tokens, world.user(alice).spent) == (lease.serial + 1, 130, 230)
        assert verify(world.store, world.home.service.public_key()).sequence == len(world.entries())


def test_a_connection_that_is_lost_amid_a_decision_leaves_nothing_of_it(
    store: Store, postgres: Server, url: URL
) -> None:

    def interrupted() -> None:
        with store.write() as db:
            users.add(db, "alice", bytes(32), budget=1, now=1)
            postgres.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{url.database}'")
            users.add(db, "bob", bytes(31) + b"1", budget=1, now=1)

    with pytest.raises(Unavailable):
        interrupted()
    with store.write() as db:  # the pool notices, and connects anew
        assert users.everyone(db) == []


@pytest.mark.parametrize("setting", ["synchronous_commit=off", "synchronous_commit=local"])
def test_a_server_that_may_forget_what_it_answered_is_refused(postgres: Server, setting: str) -> None:
    name = postgres.database()
    postgres.run(f"ALTER DATABASE {name} SET {setting.replace('=', ' = ')}")
    with pytest.raises(ConfigurationError, match=r"synchronous_commit: got (off|local), allowed: on"):
        Store(postgres.url(name))


def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        Store(make_url(f"postgresql+psycopg:///stip?host={tmp_path}"))


def test_the_password_is_read_from_its_file_at_each_connection(postgres: Server, tmp_path: Path) -> None:
    name, secret = postgres.database(), tmp_path / "password"
    place = URL.create("postgresql+psycopg", username="stip", host="127.0.0.1", port=postgres.port, database=name)
    secret.write_text("another")
    secret.chmod(0o644)
    with pytest.raises(ConfigurationError, match="others may read"):
        Store(place, password_file=secret)
    secret.chmod(0o600)
    with pytest.raises(Unavailable) as refused:
        Store(place, password_file=secret)
    assert "another" not in str(refused.value)
    secret.write_text(PASSWORD + "\n")
    opened = Store(place, password_file=secret)
    assert PASSWORD not in opened.place + repr(opened)
    opened.close()


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("postgresql+psycopg://stip:secret@localhost/stip", "none in it; name a password_file"),
        ("postgresql://stip@localhost/stip", "postgresql\\+psycopg"),
        ("mysql://stip@localhost/stip", "postgresql\\+psycopg"),
        ("postgresql+psycopg://stip@db.example/stip", "sslmode: got none, allowed: verify-full"),
        ("postgresql+psycopg://stip@db.example/stip?sslmode=require", "sslmode: got require, allowed: verify-full"),
        ("postgresql+psycopg:///stip?host=db.example", "sslmode: got none, allowed: verify-full"),
        ("postgresql+psycopg:///stip?host=localhost,db.example", "sslmode: got none, allowed: verify-full"),
        ("postgresql+psycopg:///stip?host=localhost&host=db.example", "sslmode: got none, allowed: verify-full"),
        ("postgresql+psycopg://stip@localhost/stip?hostaddr=192.0.2.1", "parameters: got hostaddr"),
        ("postgresql+psycopg://stip@localhost/stip?service=elsewhere", "parameters: got service"),
        ("postgresql+psycopg://stip@localhost/stip?password=secret", "parameters: got password"),
        ("postgresql+psycopg://stip@localhost/stip?sslpassword=secret", "parameters: got sslpassword"),
        ("postgresql+psycopg://stip@localhost/stip?options=-csynchronous_commit%3Doff", "parameters: got options"),
    ],
)
def test_a_url_with_a_password_or_without_checks_is_refused(place: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as refused:
        Store(make_url(place))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", backend_module.ENVIRONMENT)
def test_an_environment_that_would_lead_elsewhere_or_holds_the_password_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "secret.example")
    with pytest.raises(ConfigurationError, match=f"environment: got {name}") as refused:
        Store(make_url("postgresql+psycopg:///stip"))
    assert "secret" not in str(refused.value)


def test_the_log_is_one_chain_though_many_append(store: Store, tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")

    def append() -> None:
        log = AuditLog(store, home.service)
        for _ in range(10):
            with store.write() as db:
                log.append(db, Trail("policy_loaded", 1))

    racers = [threading.Thread(target=append) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert verify(store, home.service.public_key()).sequence == 40


def test_migrations_make_the_schema_that_the_tables_say(postgres: Server) -> None:
    fresh, stepped = postgres.url(postgres.database()), postgres.url(postgres.database())
    Store(fresh).close()
    migrated = backend(stepped)
    with migrated.write() as db:
        assert revisions.upgrade(db).revision is None
    migrated.close()
    assert _shape(postgres, stepped) == _shape(postgres, fresh)
    Store(stepped).close()


def _shape(postgres: Server, place: URL) -> list[Any]:
    """Columns, constraints and indexes, as the catalogue has them."""
    name = str(place.database)
    columns = "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns"
    constraints = "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
    return [
        sorted(postgres.run(f"{columns} WHERE table_schema = 'public'", name)),
        sorted(postgres.run(f"{constraints} WHERE connamespace = 'public'::regnamespace", name)),
        sorted(postgres.run("SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'", name)),
    ]


def test_the_data_of_version_1_are_carried_over_on_postgresql_as_on_sqlite(
    postgres: Server, url: URL, tmp_path: Path
) -> None:
    """Version 1 had SQLite alone: its rows, put into the same schema here."""
    home = Home.open(tmp_path / "home")
    with sqlite3.connect(tmp_path / "state.db") as lite:
        lite.row_factory = sqlite3.Row
        lite.executescript((VERSION_1 / "state.sql").read_text())
        old = {name: [dict(row) for row in lite.execute(f'SELECT * FROM "{name}"')] for name in version_1.tables}
    lite.close()
    stepped = backend(url)
    with stepped.write() as db:
        revisions.upgrade(db, "0001")
        db.execute(version_1.tables["meta"].delete())
        for table in version_1.sorted_tables:
            if old[table.name]:
                db.execute(table.insert(), old[table.name])
    secrets = Secrets(home.root, (VERSION_1 / "storage.key").read_bytes())
    with stepped.write() as db:
        assert revisions.upgrade(db, secrets=secrets).revision == "0001"
    stepped.close()
    facts = json.loads((VERSION_1 / "facts.json").read_text())
    store = Store(url)
    with store.read() as db:
        for instance, grant in facts["grants"].items():
            assert instances.grant(db, open_vault(home), instance, 0).to_bytes().hex() == grant
        assert {user.name: user.spent for user in users.everyone(db)} == facts["spent"]
    fresh = postgres.url(postgres.database())
    Store(fresh).close()
    assert _shape(postgres, url) == _shape(postgres, fresh)
    store.close()


@pytest.mark.parametrize("tables", [["notes (note TEXT)"], ["meta (key TEXT)"], ["meta (key TEXT, value TEXT)"]])
def test_another_programs_tables_are_neither_used_nor_upgraded(
    postgres: Server, url: URL, place: Place, tables: list[str]
) -> None:
    for table in tables:
        postgres.run(f"CREATE TABLE {table}", str(url.database))
    configured = DatabaseSettings(url=url.render_as_string(hide_password=False))
    place.home.mkdir(mode=0o700)
    settings.store(place.home, HomeSettings(database=configured))
    for command in (("users", "list"), ("state", "upgrade")):
        refused = place.call_here(*command, code=2)
        assert refused["error"]["code"] in ("version_unsupported", "configuration_invalid")
    found = postgres.run("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", str(url.database))
    assert found == [(table.partition(" ")[0],) for table in tables]


def test_another_programs_database_and_another_revision_are_refused(postgres: Server, url: URL) -> None:
    other = postgres.database()
    postgres.run("CREATE TABLE notes (note TEXT)", other)
    with pytest.raises(VersionUnsupported):
        Store(postgres.url(other))
    stepped = backend(url)
    with stepped.write() as db:
        revisions.upgrade(db, "0001")
    with pytest.raises(VersionUnsupported, match="stip-keyservice state upgrade"):
        Store(url)
    with stepped.write() as db:
        assert revisions.upgrade(db).revision == "0001"
        assert "devices" in inspect(db).get_table_names()
    stepped.close()
    Store(url).close()


def test_a_shredded_key_is_gone_from_the_table_and_what_is_not_cleared_is_said(
    store: Store, url: URL, postgres: Server, tmp_path: Path
) -> None:
    home = Home.open(tmp_path / "home")
    vault = open_vault(home)
    with store.write() as db:
        key = vault.make(db, "domain/acme", parent=None, now=1)
    with store.write() as db:
        vault.destroy(db, key, now=2)
    assert _dead(postgres, url, "data_keys") == 1
    assert re.search("write-ahead log.*rewrap", store.forget())
    with store.read() as db:
        assert db.execute(select(data_keys.c.wrapped)).scalars().all() == [None]
    assert _dead(postgres, url, "data_keys") == 0


def test_a_shredded_users_names_are_in_no_dead_row(store: Store, url: URL, postgres: Server, tmp_path: Path) -> None:
    with store.write() as db:
        alice = users.add(db, "alice", bytes(32), budget=1, now=1)
    with store.write() as db:
        shred_user(db, open_vault(Home.open(tmp_path / "home")), alice, now=2)
    assert _dead(postgres, url, "users", "devices") == 4
    store.forget()
    assert _dead(postgres, url, "users", "devices") == 0


def _dead(postgres: Server, url: URL, *tables: str) -> int:
    """Rows that were deleted or overwritten and still lie in the tables."""
    postgres.run("CREATE EXTENSION IF NOT EXISTS pgstattuple", str(url.database))
    counted = "SELECT " + " + ".join(f"(pgstattuple('{name}')).dead_tuple_count" for name in tables)
    return int(str(postgres.run(counted, str(url.database))[0][0]))


def test_errors_name_no_address_and_no_parameters(postgres: Server, url: URL) -> None:
    store = Store(url)

    def interrupted() -> None:
        with store.write() as db:
            postgres.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{url.database}'")
            db.execute(text("SELECT :secret"), {"secret": "a secret"})

    with pytest.raises(StipError) as refused:
        interrupted()
    assert "a secret" not in str(refused.value)
    assert str(postgres.folder) not in str(refused.value)
    store.close()
