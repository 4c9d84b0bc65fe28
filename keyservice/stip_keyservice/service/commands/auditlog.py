"""`stip-keyservice audit-log`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from stip_keyservice.service import auditexport, auditlog
from stip_keyservice.service.auditlog import AuditEntry, KnownHead
from stip_keyservice.service.commands.room import home_option, json_option, moment, open_room, show, table
from stip_protocol.documents import Signed
from stip_protocol.errors import ConfigurationError
from stip_protocol.release import DER_LIMIT
from stip_protocol.runtime.files import read_ed25519, read_file


@click.group("audit-log")
def group() -> None:
    """Every decision of the key service, hash-chained."""


@group.command("verify")
@click.option(
    "--head",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A signed head kept elsewhere (`audit-log head`): the log must still contain it.",
)
@click.option(
    "--heads",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="Heads that a client kept: each must be on this log. Repeat for the files of several clients.",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Verify this file (`audit-log export`) instead of a database; needs --public-key, and no home.",
)
@click.option(
    "--public-key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The key service's public key (`service.pub`), with --export.",
)
@home_option
@json_option
def verify(
    head: Path | None, heads: tuple[Path, ...], export: Path | None, public_key: Path | None, home: Path | None
) -> None:
    """Check the whole log offline: no entry edited, removed, reordered, or cut off.

    Without --head or --heads a log that was set back together with its signed head looks whole, and a log that was
    shown to others in another form cannot be told: keep heads elsewhere, and collect those of clients.

    \b
      stip-keyservice audit-log verify --heads alice.json --heads bob.json
      stip-keyservice audit-log verify --export audit.jsonl --public-key service.pub --heads alice.json

    Exits 1 where the log does not hold, and names the entry or the head where it breaks.
    """
    if (export is None) != (public_key is None):
        raise click.UsageError("--export and --public-key go together")
    if export is not None and public_key is not None:
        key = read_ed25519(public_key, field="public key")
        kept = _kept(head, heads, key)
        found = auditexport.verify_file(export, key, kept).head
    else:
        with open_room(home) as room:
            key = room.home.service.public_key()
            kept = _kept(head, heads, key)
            found = auditlog.verify(room.store, key, heads=kept)
    document = {"verified": True, "entries": found.sequence, "hash": found.hash.hex(), "known_heads": len(kept)}
    beyond = f" and contains each of {len(kept)} given heads" if kept else ""
    show(document, lambda: f"The audit log holds{beyond}: {found.sequence} entries, hash {found.hash.hex()}")


def _kept(head: Path | None, heads: tuple[Path, ...], key: Ed25519PublicKey) -> list[KnownHead]:
    kept = auditexport.read_heads(heads, key)
    if head is not None:
        kept.append(KnownHead("known head", Signed.from_bytes(read_file(head, field="head", limit=DER_LIMIT))))
    return kept


@group.command("export")
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@home_option
@json_option
def export_log(out: Path, home: Path | None) -> None:
    """Write the whole log to one new file, for `audit-log verify --export` on any machine.

    The file names users by their random id, folded refusals by the peer's network, and holds no secret.
    """
    with open_room(home) as room:
        end = auditexport.write(room.store, room.home.service.public_key(), out, now=int(time.time()))
    document = {"export": str(out), "entries": end.sequence, "hash": end.hash.hex()}
    show(document, lambda: f"Wrote {out}: {end.sequence} entries, hash {end.hash.hex()}")


@group.command("accept-clock")
@click.option("--reason", required=True, help="Why the clock is right and the log's last entry is not; is recorded.")
@home_option
@json_option
def accept_clock(reason: str, home: Path | None) -> None:
    """Go on by this machine's clock, though the last entry was made later: after a clock that was ahead was set right.

    Until then nothing is released or renewed (`clock_refused`). Check the time against a source you trust first: with a
    clock that was really set back, leases and delegations that ended would be good again.
    """
    with open_room(home) as room:
        entry = room.audit.accept_clock(now=int(time.time()), reason=reason)
    show(_document(entry), lambda: f"Accepted {moment(entry.at)} as the time (entry {entry.sequence})")


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
@click.option("--export", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Of this file instead.")
@home_option
@json_option
def list_entries(last: int, export: Path | None, home: Path | None) -> None:
    """The latest entries, oldest first, without checking the chain."""
    entries: Sequence[AuditEntry]
    if export is not None:
        entries = deque(auditexport.entries_of(export), maxlen=last)
    else:
        with open_room(home) as room:
            entries = room.audit.latest(last)
    show([_document(entry) for entry in entries], lambda: _table([_document(entry) for entry in entries]))


def _document(entry: AuditEntry) -> dict[str, Any]:
    fields = entry.model_dump(exclude_none=True) | {"at": moment(entry.at)}
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}


def _table(entries: list[dict[str, Any]]) -> object:
    columns = ("sequence", "at", "event", "kind", "code", "user", "instance", "tokens", "count", "peer")
    rows = ([entry.get(column, "") for column in columns] for entry in entries)
    return table(columns, rows, empty="No entries.")
