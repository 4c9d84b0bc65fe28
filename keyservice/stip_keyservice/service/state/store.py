"""The key service's state: one database that its replicas and the commands share.

SQLite by default, PostgreSQL for several machines. On both, a transaction that decides something is the only one of its
kind at its time, over all processes; the two modules say how.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import URL, Connection, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from stip_keyservice.home import Home
from stip_keyservice.service.state import revisions
from stip_keyservice.service.state.postgres import Postgres
from stip_keyservice.service.state.sqlite import Sqlite
from stip_protocol.errors import ConfigurationError, Unavailable


class Backend(Protocol):
    """What differs between databases."""

    place: str
    """Where it is, for messages."""

    def write(self) -> AbstractContextManager[Connection]:
        """One exclusive transaction."""

    def read(self) -> AbstractContextManager[Connection]:
        """One consistent view."""

    def unavailable(self, error: DBAPIError) -> bool:
        """Whether trying again may help."""

    def forget(self) -> str:
        """Clear what committed transactions deleted, as far as the database can; says how far that is."""

    def close(self) -> None:
        """Give back connections."""


class Store:
    """A database, usable from any thread.

    Raises `ConfigurationError` where it cannot be opened or is no database, `Unavailable` where it does not answer,
    `VersionUnsupported` where its schema is of another version. A new SQLite file and an empty database are prepared.
    """

    def __init__(self, where: Path | URL, *, password_file: Path | None = None) -> None:
        self._backend = backend(where, password_file)
        self.observe: Callable[[str, float], None] = lambda kind, seconds: None
        """Told of every transaction: its kind (read, write), and how long it took with what it waited for."""
        with usable(self._backend), self.write() as db:
            revisions.prepare(db)

    @property
    def place(self) -> str:
        """Where it is, for people; without a password."""
        return self._backend.place

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One exclusive transaction: committed at the end, undone by an exception. Raises `Unavailable`."""
        with self._timed("write"), available(self._backend), self._backend.write() as db:
            yield db

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent view. Raises `Unavailable`."""
        with self._timed("read"), available(self._backend), self._backend.read() as db:
            yield db

    def forget(self) -> str:
        """Clear what was deleted, as far as the database can; returns how far that is. Raises `Unavailable`."""
        with available(self._backend):
            return self._backend.forget()

    def close(self) -> None:
        self._backend.close()

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.observe(kind, time.perf_counter() - began)


def open_store(home: Home) -> Store:
    """The database of a home. Raises what `Store` raises."""
    return Store(home.database, password_file=home.password_file)


def backend(where: Path | URL, password_file: Path | None = None) -> Backend:
    """The database at a path, or of a URL, whatever its schema."""
    return Sqlite(where) if isinstance(where, Path) else Postgres(where, password_file)


@contextmanager
def available(database: Backend) -> Iterator[None]:
    """Raises `Unavailable` for what trying again may mend."""
    try:
        yield
    except PoolTimeout:
        raise Unavailable("state: every connection to the database is in use") from None
    except DBAPIError as error:
        if database.unavailable(error):
            raise Unavailable("state: the database is busy, unreachable or cannot be written") from None
        raise


@contextmanager
def usable(database: Backend) -> Iterator[None]:
    """Raises `ConfigurationError` for a file or tables that are not this program's, or a role that may not make any."""
    try:
        yield
    except DatabaseError as error:
        kind = type(error.orig).__name__
        raise ConfigurationError(f"{database.place}: not a usable database ({kind})") from None


def insert_into(db: Connection, table: Table) -> Any:
    """An INSERT that knows ON CONFLICT, which both databases have and SQLAlchemy's own form has not."""
    return insert_of(db.dialect.name, table)


def insert_of(dialect: str, table: Table) -> Any:
    """The same for a dialect by name: for statements that are built once."""
    return {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect](table)
