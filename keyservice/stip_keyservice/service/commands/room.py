"""What the commands share: the opened home, output for people and for programs, times."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from stip_keyservice.home import DEFAULT_HOME, HOME_VARIABLE, Home, exists, locate
from stip_keyservice.service.auditlog import AuditLog, Event, Trail
from stip_keyservice.service.state.store import Store, open_store
from stip_keyservice.service.vault import Vault, open_vault
from stip_protocol.errors import ConfigurationError

F = TypeVar("F", bound=Callable[..., Any])

JSON_KEY = "stip_keyservice.json"
"""Where the click context keeps whether the caller is a program."""


def home_option(command: F) -> F:
    """`--home`, handed on as `home`."""
    return click.option(
        "--home",
        type=click.Path(path_type=Path, file_okay=False),
        help=f"The key service's home.  [default: ${HOME_VARIABLE} or {DEFAULT_HOME}]",
    )(command)


def json_option(command: F) -> F:
    """`--json`: one JSON document on stdout instead of a table."""

    def remember(context: click.Context, _: click.Parameter, value: bool) -> None:
        context.find_root().meta[JSON_KEY] = value

    return click.option(
        "--json", is_flag=True, expose_value=False, callback=remember, is_eager=True, help="For programs."
    )(command)


@dataclass(frozen=True)
class Room:
    """An opened home with its store and audit log."""

    home: Home
    store: Store
    vault: Vault
    audit: AuditLog

    @contextmanager
    def decision(self, event: Event) -> Iterator[Trail]:
        """A trail whose refusals are recorded; the caller appends what it grants."""
        trail = Trail(event, int(time.time()))
        with self.audit.refusals(trail):
            yield trail

    def forget(self) -> None:
        """Clear what was destroyed from the database's own files, and say on stderr what that leaves. Raises
        `Unavailable`: what was decided stands."""
        click.echo(f"Destroyed: {self.store.forget()}.", err=True)


@contextmanager
def open_room(home: Path | None, *, create: bool = False) -> Iterator[Room]:
    """Open a home. Only with `create` is a new one made: a mistyped path must not look like an empty service.

    Raises `ConfigurationError`.
    """
    path = locate(home)
    if not create and not exists(path):
        raise ConfigurationError.because("home", f"{path}, which holds no state.db", "the home of a key service")
    opened = Home.open(path)
    store = open_store(opened)
    try:
        yield Room(opened, store, open_vault(opened), AuditLog(store, opened.service))
    finally:
        store.close()


def show(document: object, lines: Callable[[], object]) -> None:
    """Print `document` as JSON for programs, or what `lines()` makes for people."""
    if click.get_current_context().find_root().meta.get(JSON_KEY):
        click.echo(json.dumps(document, indent=2))
    else:
        Console(highlight=False, soft_wrap=True).print(lines())


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> Table | str:
    """A table for people; `empty` where there are no rows."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made if made.row_count else empty


def moment(seconds: int | None) -> str | None:
    """ISO 8601 in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
