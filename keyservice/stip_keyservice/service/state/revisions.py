"""Which schema a database has, and how it gets the present one.

    0001   version 1: instances of one epoch, users with one key, grants under the storage key
    0002   devices, domains, epochs, data keys under the root key, stateless challenges

The steps are Alembic's (`migrations/`), run under the write lock in one transaction. `REVISION` is the newest; a
database of another is refused until `stip-keyservice state upgrade` was run. Alembic itself is loaded only for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, MetaData, PrimaryKeyConstraint, String, Table, insert, inspect, select

from stip_keyservice.service.state.schema import meta, metadata
from stip_protocol.errors import VersionUnsupported

REVISION = "0002"
VERSIONS = {"0001": "1", "0002": "2"}
"""What `meta` says at each revision; databases from before there were revisions say only that."""
COMMAND = "stip-keyservice state upgrade"
_alembic = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


@dataclass(frozen=True)
class Found:
    revision: str | None
    """None: the database is empty."""

    @property
    def present(self) -> bool:
        return self.revision == REVISION


def find(db: Connection) -> Found:
    """The revision of a database. Raises `VersionUnsupported` where it is not one of ours, or newer."""
    names = inspect(db).get_table_names()
    if not names:
        return Found(None)
    said = None
    if meta.name in names:
        said = db.execute(select(meta.c.value).where(meta.c.key == "schema_version")).scalar()
    revision = next((revision for revision, version in VERSIONS.items() if version == said), None)
    stamped = db.execute(select(_alembic.c.version_num)).scalar() if _alembic.name in names else revision
    if revision is None or stamped != revision:
        got = f"version {said or 'none'}, revision {stamped or 'none'}"
        raise VersionUnsupported.because("state schema", got, f"revision {', '.join(VERSIONS)}")
    return Found(revision)


def prepare(db: Connection) -> None:
    """Make the tables of an empty database. Raises `VersionUnsupported` where there are others."""
    found = find(db)
    if found.revision is None:
        metadata.create_all(db)
        db.execute(insert(meta).values(key="schema_version", value=VERSIONS[REVISION]))
        stamp(db, REVISION)
    elif not found.present:
        raise VersionUnsupported.because("state schema", f"revision {found.revision}", f"{REVISION}; run `{COMMAND}`")


def stamp(db: Connection, revision: str) -> None:
    """Say of a database without revisions which one it has."""
    _alembic.create(db, checkfirst=True)
    if db.execute(select(_alembic.c.version_num)).scalar() is None:
        db.execute(insert(_alembic).values(version_num=revision))


def upgrade(db: Connection, to: str = REVISION, *, secrets: Any = None) -> Found:
    """Bring a database to a revision with its data; returns what it was. Inside one exclusive transaction.

    `secrets` is what migrations of sealed rows need (`migrations.Secrets`).
    """
    from alembic import command
    from alembic.config import Config

    found = find(db)
    if found.revision is not None:
        stamp(db, found.revision)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes.update(connection=db, secrets=secrets)
    command.upgrade(config, to)
    return found
