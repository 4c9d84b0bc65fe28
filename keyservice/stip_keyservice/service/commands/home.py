"""`stip-keyservice home`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from stip_keyservice.home import Home, exists, locate, locked
from stip_keyservice.rootkey import files, providers, settings
from stip_keyservice.rootkey.settings import DatabaseSettings, HomeSettings, RootKeySettings, SharesSettings
from stip_keyservice.service.commands.keeping import chosen, keeping_options, made_shares
from stip_keyservice.service.commands.room import home_option, json_option, show, table
from stip_keyservice.service.state.postgres import require_sound
from stip_keyservice.service.state.store import open_store
from stip_protocol.errors import ConfigurationError


@click.group("home")
def group() -> None:
    """The folder with the key service's keys: what keeps its root key, and where its database is."""


@group.command("init")
@click.option(
    "--database",
    metavar="URL",
    help="postgresql+psycopg://USER@HOST/NAME?sslmode=verify-full, for several replicas.  "
    "[default: SQLite, in the home]",
)
@click.option(
    "--password-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The database user's password; never in the URL.",
)
@keeping_options("--root-key", required=False, default="file")
@click.option("--threshold", type=click.IntRange(2, settings.MEMBERS), help="shares: how many open the root key.")
@click.option("--shares", "count", type=click.IntRange(2, settings.MEMBERS), help="shares: how many there are.")
@click.option("--share-dir", type=click.Path(path_type=Path, file_okay=False), help="shares: where they are written.")
@home_option
@json_option
def init(
    database: str | None,
    password_file: Path | None,
    kind: str,
    threshold: int | None,
    count: int | None,
    share_dir: Path | None,
    home: Path | None,
    **given: Any,
) -> None:
    """Make a home deliberately, with the root key where you want it.

    Without this, a home is made on first use, with an SQLite database and a root key file. An existing home is never
    changed: `root-key rewrap` moves its root key.

    \b
      stip-keyservice home init --root-key pkcs11 --module /usr/lib/softhsm/libsofthsm2.so --token stip --pin-file pin
      stip-keyservice home init --root-key gramine --database 'postgresql+psycopg:///stip?host=/run/postgresql'
    """
    path = locate(home)
    configured = HomeSettings(database=_database(database, password_file))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(path):
            if exists(path) or files.present(path):
                raise ConfigurationError.because("home", f"{path}, where there is one", "a folder without a home")
            keeper = _quorum(threshold, count, share_dir) if kind == "shares" else chosen(kind, given, None)
            kept = providers.keep(keeper, path, providers.new_root_key())
            settings.store(path, configured.model_copy(update={"root_key": kept}))
    except OSError as error:
        raise ConfigurationError(f"home {path}: {error.strerror}", field="home") from None
    opened = Home.open(path)
    store = open_store(opened)
    store.close()
    if isinstance(kept, SharesSettings):  # they lay beside each other for this first opening only
        settings.store(path, configured.model_copy(update={"root_key": kept.model_copy(update={"files": ()})}))
    _show(opened, store.place)


@group.command("show")
@home_option
@json_option
def show_home(home: Path | None) -> None:
    """What keeps the root key, where the database is, and which keys lie in their files as they are."""
    path = locate(home)
    if not exists(path) and not files.present(path):
        raise ConfigurationError.because("home", f"{path}, which holds none", "the home of a key service")
    opened = Home.open(path)
    place = opened.database
    _show(opened, str(place) if isinstance(place, Path) else place.render_as_string(hide_password=True))


def _quorum(threshold: int | None, count: int | None, folder: Path | None) -> RootKeySettings:
    """Shares in files, and the settings by which they are found there."""
    if threshold is None or count is None or folder is None:
        raise ConfigurationError("shares: --threshold, --shares and --share-dir are needed")
    made, paths = made_shares(folder, threshold, count)
    return made.model_copy(update={"files": tuple(str(path.absolute()) for path in paths[:threshold])})


def _database(url: str | None, password_file: Path | None) -> DatabaseSettings | None:
    if url is None:
        if password_file is not None:
            raise ConfigurationError("--password-file: only with --database")
        return None
    try:
        require_sound(make_url(url))
    except ArgumentError:
        raise ConfigurationError.because(
            "--database", "something else", "postgresql+psycopg://USER@HOST/NAME"
        ) from None
    return DatabaseSettings(url=url, password_file=None if password_file is None else str(password_file.absolute()))


def _show(opened: Home, database: str) -> None:
    configured = opened.settings
    recovery = configured.recovery
    document = {
        "home": str(opened.path),
        "database": database,
        "root_key": {"kind": configured.root_key.kind, "id": opened.root.id.hex()},
        "rewrap": None if configured.rewrap is None else {"to": configured.rewrap.next.kind},
        "recovery": None if recovery is None else {"threshold": recovery.threshold, "shares": recovery.shares},
        "plain_files": list(opened.plain_files()),
    }
    rows = [
        ("home", opened.path),
        ("database", database),
        ("root key", f"{opened.root.id.hex()}, kept by: {configured.root_key.kind}"),
        ("recovery", "none" if recovery is None else f"{recovery.threshold} of {recovery.shares} shares"),
    ]
    if configured.rewrap is not None:
        rows.append(("rewrap", f"interrupted, to: {configured.rewrap.next.kind}; run `root-key rewrap` to finish it"))
    if document["plain_files"]:
        rows.append(("not wrapped", f"{', '.join(opened.plain_files())}; run `state upgrade`"))
    show(document, lambda: table(("", ""), rows, empty=""))
