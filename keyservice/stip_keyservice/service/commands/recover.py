"""`stip-keyservice recover`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from stip_keyservice.home import Home, database_of, locate
from stip_keyservice.rootkey import providers, settings, shares
from stip_keyservice.service.auditlog import AuditLog, Trail
from stip_keyservice.service.commands.keeping import chosen, keeping_options
from stip_keyservice.service.commands.room import home_option, json_option, show
from stip_keyservice.service.commands.state import recovery_table
from stip_keyservice.service.state import recovery
from stip_keyservice.service.state.store import Store
from stip_protocol.errors import ConfigurationError


@click.command("recover")
@click.option(
    "--share",
    "share_files",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    help="A file with one share; repeatable. Without any, shares are asked for.",
)
@click.option("--dry-run", is_flag=True, help="Show that these shares open everything, and change nothing.")
@keeping_options("--to", required=False)
@home_option
@json_option
def recover(share_files: tuple[Path, ...], dry_run: bool, kind: str | None, home: Path | None, **given: Any) -> None:
    """Open the root key with shares, and hand it to a provider of this machine.

    For a home whose provider is lost: a broken CPU or token, a new enclave that cannot open what the former sealed, a
    restored backup. Rehearse with --dry-run, with the real shares, on a copy or on the home itself. Exits 1 where a
    secret does not open.

    \b
      stip-keyservice recover --dry-run --share a.txt --share b.txt
      stip-keyservice recover --to gramine
    """
    if dry_run == (kind is not None):
        raise click.UsageError("Say either --dry-run, or what is to keep the root key from now on (--to).")
    path = locate(home)
    recovery.require_home(path)
    configured = settings.load(path)
    keeper = providers.require_recovery(configured)
    root = recovery.unlock(path, shares.read(keeper.settings, share_files))
    database = database_of(path, configured)
    if isinstance(database, Path) and not database.is_file():
        raise ConfigurationError.because("home", f"{path}, which holds no state.db", "a home with its database")
    password = configured.database and configured.database.password_file
    store = Store(database, password_file=path / password if password else None)
    try:
        report = recovery.rehearse(path, root, store)
        if kind is not None:
            recovery.require_whole(report)
            recovery.recover(path, root, chosen(kind, given, configured))
            opened = Home.open(path)
            with store.write() as db:
                AuditLog(store, opened.service).append(db, Trail("recovered", int(time.time()), {"detail": kind}))
    finally:
        store.close()
    document = {"dry_run": dry_run, "root_key": root.id.hex(), "checks": [vars(one) for one in report]}
    show(document, lambda: recovery_table(report))
    recovery.require_whole(report)
