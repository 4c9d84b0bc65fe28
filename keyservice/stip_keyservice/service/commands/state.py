"""`stip-keyservice state`."""

from __future__ import annotations

from pathlib import Path

import click

from stip_keyservice.home import Home, exists, locate
from stip_keyservice.service import auditlog
from stip_keyservice.service.commands.room import home_option, json_option, open_room, show, table
from stip_keyservice.service.state import recovery
from stip_keyservice.service.state.upgrading import upgrade
from stip_protocol.errors import ConfigurationError


@click.group("state")
def group() -> None:
    """The database and the home's files: their version, and whether everything opens."""


@group.command("upgrade")
@home_option
@json_option
def upgrade_(home: Path | None) -> None:
    """Bring a home and its database from an earlier version to this one, with their data.

    Stop the service and back the home up first: the way back is the backup. Private keys that lay in their files as
    they were are wrapped under the root key. The audit log stays as it is. Leases are dropped on the way from version
    1: running enclaves attest again.
    """
    path = locate(home)
    if not exists(path):
        raise ConfigurationError.because("home", f"{path}, which holds no database", "the home of a key service")
    done = upgrade(Home.open(path))
    rows = [
        ("schema", f"{done.before} → {done.after}" if done.before != done.after else f"{done.after}, as it was"),
        ("wrapped", ", ".join(done.wrapped) or "nothing was left to wrap"),
        ("overwritten data", done.cleared),
    ]
    show(vars(done) | {"wrapped": list(done.wrapped)}, lambda: table(("", ""), rows, empty=""))


@group.command("check")
@home_option
@json_option
def check(home: Path | None) -> None:
    """Open every secret of the home and the database, and walk the audit log.

    Changes nothing. Exits 1 where something does not open.
    """
    with open_room(home) as room:
        report = recovery.rehearse(room.home.path, room.home.root, room.store)
        log = auditlog.verify(room.store, room.home.service.public_key())
        document = {"database": room.store.place, "audit_entries": log.sequence, "plain": list(room.home.plain_files())}
    show(document | {"checks": [vars(one) for one in report]}, lambda: recovery_table(report))
    recovery.require_whole(report)


def recovery_table(report: list[recovery.Checked]) -> object:
    rows = [(one.what, one.there, one.opens, "as it should be" if one.whole else one.fault) for one in report]
    return table(("what", "there", "opens", ""), rows, empty="Nothing is there.")
