"""Checks of the state: the database, that it keeps what it says it kept, and the end of the audit log."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import Connection, select, text
from sqlalchemy.exc import DatabaseError

from stip_keyservice.home import database_of, exists
from stip_keyservice.rootkey import settings as home_settings
from stip_keyservice.service.auditlog import StoredEntry, follow_tail, require_end
from stip_keyservice.service.doctor.checking import Finding, Patient, failed, passed, warned
from stip_keyservice.service.state import revisions
from stip_keyservice.service.state.postgres import DURABLE
from stip_keyservice.service.state.schema import audit, audit_head
from stip_keyservice.service.state.store import available, backend
from stip_protocol.documents import Signed
from stip_protocol.errors import ConfigurationError, StipError
from stip_protocol.release import AuditHead
from stip_protocol.runtime.files import read_ed25519

CHECKED_BYTES = 256 << 20
"""Pages of larger files are not read through: that would take longer than a check may."""
DAMAGED = "Stop the service, restore a backup (docs/keyservice.md), and verify the audit log."
NOT_WHOLE = 'Stop the service; docs/keyservice.md, "The audit log does not hold".'
TAIL = 1000
"""Entries of the audit log that are verified; `audit-log verify` does all."""


@contextmanager
def reading(patient: Patient) -> Iterator[Connection]:
    """The state as it is, without making or migrating anything. Raises `ConfigurationError`, `Unavailable`."""
    if not exists(patient.home):
        raise ConfigurationError.because("home", f"{patient.home}, which holds no state", "the home of a key service")
    configured = home_settings.load(patient.home)
    where = database_of(patient.home, configured)
    if isinstance(where, Path) and not where.is_file():
        raise ConfigurationError(f"database: {where} is missing")
    password = None
    if configured.database is not None and configured.database.password_file is not None:
        password = patient.home / configured.database.password_file
    opened = backend(where, password)
    try:
        with available(opened), opened.read() as db:
            yield db
    except DatabaseError as error:
        raise ConfigurationError(f"{opened.place}: not a usable database ({type(error.orig).__name__})") from None
    finally:
        opened.close()


def database(patient: Patient) -> Finding:
    """It answers, and has the schema of this version."""
    with reading(patient) as db:
        found = revisions.find(db)
        kind = db.dialect.name
    if found.revision is None:
        return warned(f"{kind}: empty", "It is prepared when the service starts or a user is added.")
    if not found.present:
        return failed(f"{kind}: revision {found.revision}, not {revisions.REVISION}", f"Run `{revisions.COMMAND}`.")
    return passed(f"{kind}: answers, revision {found.revision}")


def durability(patient: Patient) -> Finding:
    """What was decided survives a power cut: every commit waits for the disk."""
    where = database_of(patient.home, home_settings.load(patient.home))
    if isinstance(where, Path):
        return _sqlite_durability(where)
    with reading(patient) as db:
        wrong = [name for name, allowed in DURABLE.items() if db.execute(text(f"SHOW {name}")).scalar() not in allowed]
    if wrong:
        remedy = "Set it in postgresql.conf and reload: the service refuses such a server."
        return failed(f"not as it must be: {', '.join(wrong)}", remedy)
    return passed(f"{', '.join(DURABLE)} on")


def _sqlite_durability(path: Path) -> Finding:
    """Looked at without the store's own connection, which would set what it looks for."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=2)) as db:
            (journal,) = db.execute("PRAGMA journal_mode").fetchone()
            small = path.stat().st_size < CHECKED_BYTES
            damaged = db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok" if small else False
    except sqlite3.Error as error:
        return failed(f"cannot be read ({type(error).__name__})", DAMAGED)
    if damaged:
        return failed("the database file is damaged", DAMAGED)
    if journal != "wal":
        remedy = "Other software changed the file; the next command of this one sets it again. Ask who did."
        return failed(f"journal {journal}, not wal", remedy)
    return passed("WAL, pages sound" if small else "WAL; the file is large: run PRAGMA integrity_check beside it")


def audit_log(patient: Patient) -> Finding:
    """The last entries continue the chain up to the signed head."""
    key = read_ed25519(patient.home / "service.pub", field="service.pub")
    with reading(patient) as db:
        rows = db.execute(select(audit).order_by(audit.c.sequence.desc()).limit(TAIL + 1)).all()
        signed = db.execute(select(audit_head.c.signed)).scalar()
    if signed is None and not rows:
        return passed("empty")
    if signed is None:
        return failed("its signed head is missing", NOT_WHOLE)
    end = follow_tail([StoredEntry(row.entry, row.sequence, row.hash) for row in reversed(rows)])
    require_end(signed, key, end)
    return passed(f"{end.sequence} entries, the last {min(end.sequence, TAIL)} hold, signed head")


def last_entry_at(patient: Patient) -> int | None:
    """The time of the last entry by its signed head; None where there is none, or none that can be read."""
    try:
        key = read_ed25519(patient.home / "service.pub", field="service.pub")
        with reading(patient) as db:
            signed = db.execute(select(audit_head.c.signed)).scalar()
        return None if signed is None else Signed.from_bytes(signed).open(AuditHead, key).at
    except StipError:  # what is wrong with it, the checks of the state say
        return None
