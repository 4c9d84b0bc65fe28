"""`stip-keyservice audit-log`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stip_keyservice.service import auditlog
from stip_keyservice.service.auditlog import AuditEntry
from stip_keyservice.service.commands.room import home_option, json_option, moment, open_room, show, table
from stip_protocol.documents import Signed
from stip_protocol.errors import ConfigurationError
from stip_protocol.release import DER_LIMIT
from stip_protocol.runtime.files import read_file


@click.group("audit-log")
def group() -> None:
    """Every decision of the key service, hash-chained."""


@group.command("verify")
@click.option(
    "--head",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A signed head kept elsewhere (`audit-log head`): the log must still contain it.",
)
@home_option
@json_option
def verify(head: Path | None, home: Path | None) -> None:
    """Check the whole log offline: no entry edited, removed, reordered, or cut off.

    Without --head a log that was set back together with its signed head looks whole: keep heads elsewhere.
    Exits 1 where the log does not hold.
    """
    known = None if head is None else Signed.from_bytes(read_file(head, field="head", limit=DER_LIMIT))
    with open_room(home) as room:
        found = auditlog.verify(room.store, room.home.service.public_key(), known=known)
    document = {"verified": True, "entries": found.sequence, "hash": found.hash.hex(), "known_head": head is not None}
    beyond = " and contains the given head" if head is not None else ""
    show(document, lambda: f"The audit log holds{beyond}: {found.sequence} entries, hash {found.hash.hex()}")


@group.command("head")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Where to write it.")
@home_option
@json_option
def head(out: Path, home: Path | None) -> None:
    """Write the signed head of the log, to be kept where this machine's operator cannot reach it."""
    with open_room(home) as room:
        signed = room.audit.head()
    if signed is None:
        raise ConfigurationError("audit log: empty, there is no head yet")
    try:
        out.write_bytes(signed.to_bytes())
    except OSError as error:
        raise ConfigurationError(f"{out}: {error.strerror}") from None
    show({"head": str(out)}, lambda: f"Wrote {out}")


@group.command("list")
@click.option("--last", default=20, show_default=True, type=click.IntRange(1, 100_000), help="How many entries.")
@home_option
@json_option
def list_entries(last: int, home: Path | None) -> None:
    """The latest entries, oldest first, without checking the chain."""
    with open_room(home) as room:
        entries = room.audit.latest(last)
    show([_document(entry) for entry in entries], lambda: _table([_document(entry) for entry in entries]))


def _document(entry: AuditEntry) -> dict[str, Any]:
    fields = entry.model_dump(exclude_none=True) | {"at": moment(entry.at)}
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}


def _table(entries: list[dict[str, Any]]) -> object:
    columns = ("sequence", "at", "event", "kind", "code", "user", "instance", "tokens")
    rows = ([entry.get(column, "") for column in columns] for entry in entries)
    return table(columns, rows, empty="No entries.")
