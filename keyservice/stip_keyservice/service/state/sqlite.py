"""SQLite: one file that the service and the commands of one machine share.

WAL lets readers go on beside one writer. A transaction that decides something (a nonce, a budget, the audit
log) starts with BEGIN IMMEDIATE: what it read cannot change before it writes, whichever process it is in
(SQLite, "Write-Ahead Logging"; "BEGIN TRANSACTION").
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError

from stip_protocol.errors import ConfigurationError, Unavailable

BUSY_SECONDS = 10
"""How long a writer waits for another before the request is refused as unavailable."""


class Sqlite:
    """Created, mode 0600, where it does not exist. Raises `ConfigurationError` where the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self._turn = threading.Lock()
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror}") from None
        self._engine = create_engine(
            URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_SECONDS}, hide_parameters=True
        )
        event.listen(self._engine, "connect", _connected)
        event.listen(self._engine, "begin", _begun)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        # This process's threads queue here: SQLite itself has those that wait sleep and try again, up to 100 ms each.
        if not self._turn.acquire(timeout=BUSY_SECONDS):
            raise Unavailable("state: the database is busy")
        try:
            with self._engine.connect().execution_options(begin_mode="IMMEDIATE") as db, db.begin():
                yield db
        finally:
            self._turn.release()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(begin_mode="DEFERRED") as db, db.begin():
            yield db

    def unavailable(self, error: DBAPIError) -> bool:
        return isinstance(error, OperationalError)

    def forget(self) -> str:
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
        return "overwritten in the database file, and the write-ahead log is empty; copies of the file are as they were"

    def close(self) -> None:
        self._engine.dispose()


def _connected(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions are begun below, not guessed by the driver
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begun(connection: Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options()['begin_mode']}")
