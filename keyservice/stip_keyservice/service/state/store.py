"""The key service's state: one SQLite file that the service and the CLI share.

WAL lets readers go on beside one writer. A transaction that decides something (a nonce, a budget, the audit
log) starts with BEGIN IMMEDIATE: what it read cannot change before it writes, whichever process it is in
(SQLite, "Write-Ahead Logging"; "BEGIN TRANSACTION").
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, insert, inspect, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError, OperationalError

from stip_keyservice.service.state.schema import meta, metadata
from stip_protocol.errors import ConfigurationError, Unavailable, VersionUnsupported

SCHEMA_VERSION = 2
BUSY_SECONDS = 10
"""How long a writer waits for another before the request is refused as unavailable."""


class Store:
    """The database behind one path, usable from any thread. Created, mode 0600, where it does not exist.

    Raises `ConfigurationError` where the file cannot be opened or is no database, `VersionUnsupported` where
    its schema is of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror}") from None
        self._engine = _engine(path)
        try:
            with self._transaction("IMMEDIATE") as db:
                _prepare(db)
        except DatabaseError as error:
            raise ConfigurationError(f"{path}: not a usable SQLite database ({type(error.orig).__name__})") from None

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One exclusive transaction: committed at the end, undone by an exception. Raises `Unavailable`."""
        with self._available(), self._transaction("IMMEDIATE") as db:
            yield db

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent view. Raises `Unavailable`."""
        with self._available(), self._transaction("DEFERRED") as db:
            yield db

    def forget(self) -> None:
        """Empty the write-ahead log, where what a committed transaction overwrote can still be read.

        `secure_delete` clears the file itself. Raises `Unavailable` where another process holds the log for longer
        than `BUSY_SECONDS`; what was committed stands.
        """
        connection = self._engine.raw_connection()
        try:
            (busy, _, _) = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            connection.close()
        if busy:
            raise Unavailable("state: done, but another process still reads the write-ahead log; stop it to clear that")

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except OperationalError:
            raise Unavailable("state: the database is busy or cannot be written") from None

    @contextmanager
    def _transaction(self, mode: Literal["IMMEDIATE", "DEFERRED"]) -> Iterator[Connection]:
        with self._engine.connect().execution_options(begin_mode=mode) as db, db.begin():
            yield db


def insert_into(db: Connection, table: Table) -> Any:
    """An INSERT that knows ON CONFLICT, which both databases have and SQLAlchemy's own form has not."""
    return {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[db.dialect.name](table)


def _engine(path: Path) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_SECONDS}, hide_parameters=True
    )

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions are begun below, not guessed by the driver
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {connection.get_execution_options()['begin_mode']}")

    return engine


def _prepare(db: Connection) -> None:
    names = inspect(db).get_table_names()
    if not names:
        meta.create(db)
        db.execute(insert(meta).values(key="schema_version", value=str(SCHEMA_VERSION)))
    found = None
    if not names or meta.name in names:
        found = db.execute(select(meta.c.value).where(meta.c.key == "schema_version")).scalar()
    if found != str(SCHEMA_VERSION):
        raise VersionUnsupported.because("state.db schema version", found or "none", SCHEMA_VERSION)
    metadata.create_all(db)  # tables that were added within this version; programs from before them ignore them
