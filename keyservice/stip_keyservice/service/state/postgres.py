"""PostgreSQL: one database for several replicas of the key service.

A transaction that decides something takes an advisory lock first, in READ COMMITTED: it waits for whoever decides
before it, and each statement after that sees all that the other committed. (In REPEATABLE READ the snapshot would be
from before the wait: PostgreSQL, "Transaction Isolation".) The lock ends with the transaction, also where the
replica or the network does. A reader gets one consistent view, REPEATABLE READ READ ONLY.

What a client was answered is on the disk: a server that does not wait for its log (`synchronous_commit`, `fsync`) is
refused. A commit whose answer was lost counts as unavailable: it may have happened, whole, with its audit entry.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, create_engine, event, text
from sqlalchemy.exc import DBAPIError, OperationalError

from stip_keyservice.rootkey.asking import read_line
from stip_protocol.errors import ConfigurationError

DRIVER = "postgresql+psycopg"
CONNECTIONS = 8
"""Of one process; as many as it has threads that decide, and some for readers."""
CONNECT_SECONDS = 5
LOCK_SECONDS = 10
"""How long a decision waits for others before the request is refused as unavailable."""
STATEMENT_SECONDS = 30
IDLE_SECONDS = 60
"""After so long the server ends a transaction whose replica says nothing more: it would hold everybody up."""
DECISIONS = 0x5354_4950_5354_4154
"""Key of the advisory lock: "STIPSTAT"."""
DURABLE = {"synchronous_commit": ("on", "remote_apply"), "fsync": ("on",), "full_page_writes": ("on",)}
"""What a server must say of itself (PostgreSQL, "Write Ahead Log")."""
FORGETFUL = ("data_keys", "grants", "canaries", "leakage_summaries", "users", "devices", "members")
"""Tables whose rows are destroyed, or lose the names in them."""
QUERY = {
    *("host", "port", "sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslcrldir", "ssl_min_protocol_version"),
    *("channel_binding", "require_auth", "target_session_attrs", "load_balance_hosts", "tcp_user_timeout"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
}
"""Parameters of a URL that neither hold a secret nor lead elsewhere than its host (libpq, "Parameter Key Words")."""
ENVIRONMENT = ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGPASSWORD", "PGSSLMODE")
"""What libpq would take where the URL is silent, past these checks (libpq, "Environment Variables")."""
_LOCAL = ("localhost", "127.0.0.1", "::1")
_RETRIED = ("25006", "25P03", "40001", "40P01", "57P01", "57P02", "57P03")
"""SQLSTATEs that psycopg does not class as operational, or not always: read-only after a failover, ended as idle,
serialization failure, deadlock, and a server that shuts down, crashed or starts."""


class Postgres:
    """Raises `ConfigurationError` for a URL that cannot be meant."""

    def __init__(self, url: URL, password_file: Path | None) -> None:
        require_sound(url)
        self.place = url.render_as_string(hide_password=True)
        options = {
            "lock_timeout": LOCK_SECONDS,
            "statement_timeout": STATEMENT_SECONDS,
            "idle_in_transaction_session_timeout": IDLE_SECONDS,
        }
        self._engine = create_engine(
            url,
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=LOCK_SECONDS,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={
                "application_name": "stip-keyservice",
                "connect_timeout": CONNECT_SECONDS,
                "options": " ".join(f"-c {name}={seconds}s" for name, seconds in options.items()),
            },
        )
        if password_file is not None:

            @event.listens_for(self._engine, "do_connect")
            def _with_password(_: object, __: object, ___: object, given: dict[str, Any]) -> None:
                given["password"] = read_line(password_file, "database password")

        event.listen(self._engine, "connect", _require_durable)
        self._writing = self._engine.execution_options(isolation_level="READ COMMITTED")
        self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        with self._writing.begin() as db:
            db.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": DECISIONS})
            yield db

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._reading.begin() as db:
            yield db

    def unavailable(self, error: DBAPIError) -> bool:
        state = getattr(error.orig, "sqlstate", None)
        return isinstance(error, OperationalError) or error.connection_invalidated or state in _RETRIED

    def forget(self) -> str:
        """Clear dead rows from the tables, as far as no other transaction still sees them.

        VACUUM truncates or reuses their room; it overwrites nothing in the write-ahead log, in archives, on replicas
        or in base backups, and freed pages of the disk stay as they are. There, destroyed data keys are what protects:
        what they sealed opens under no root key that was rewrapped since.
        """
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            for table in FORGETFUL:
                db.execute(text(f"VACUUM {table}"))
        return (
            "dead rows are vacuumed; the write-ahead log, archives, replicas and base backups keep them: "
            "run `root-key rewrap`, after which no root key of this home opens them"
        )

    def close(self) -> None:
        self._engine.dispose()


def require_sound(url: URL) -> None:
    """Refuse a database URL that is of another kind, holds a password, or goes over a network without checking whom it
    reaches. Raises `ConfigurationError`."""
    if url.drivername != DRIVER:
        raise ConfigurationError.because("database url", url.drivername, f"{DRIVER}://…")
    if url.password is not None:
        raise ConfigurationError.because("database url", "one with a password", "none in it; name a password_file")
    others = sorted(url.query.keys() - QUERY)
    if others:
        raise ConfigurationError.because("database url parameters", ", ".join(others)[:80], ", ".join(sorted(QUERY)))
    set_outside = [name for name in ENVIRONMENT if name in os.environ]
    if set_outside:
        raise ConfigurationError.because("environment", ", ".join(set_outside), "none of them; home.toml says it all")
    host = url.host or str(url.query.get("host", ""))
    over_network = host and not host.startswith("/") and host not in _LOCAL
    if over_network and url.query.get("sslmode") != "verify-full":
        got = url.query.get("sslmode", "none")
        raise ConfigurationError.because("database url sslmode", got, "verify-full, as the database is not local")


def _require_durable(connection: Any, _: object) -> None:
    with connection.cursor() as cursor:
        for name, allowed in DURABLE.items():
            cursor.execute(f"SHOW {name}")
            (found,) = cursor.fetchone()
            if found not in allowed:
                raise ConfigurationError.because(f"database {name}", found, " or ".join(allowed))
    connection.rollback()
