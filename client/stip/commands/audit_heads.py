"""`stip audit-heads`: what this user was shown of key services' audit logs, for whoever audits them."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stip import heads
from stip.heads import Remembered
from stip_protocol.errors import ConfigurationError

FORKED = 3
"""Exit code of `list` where a log was shown two ways."""
PLAIN_WIDTH = 160

_folder = click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where heads are kept, where the profile says so; by default heads/ in STIP_HOME.",
)


@click.group("audit-heads")
def group() -> None:
    """Signed heads of key services' audit logs that came with your sessions.

    A key service writes every decision into a log. With `service_key` in your profile, each session brings the log's
    signed head, and it is held against all earlier ones: a log that was cut, rewritten or shown two ways is noticed
    (audit_log_forked). An auditor compares yours with the log itself:

    \b
      stip audit-heads export --out heads.json
      stip-keyservice audit-log verify --heads heads.json
    """


@group.command("list")
@_folder
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_(folder: Path | None, as_json: bool) -> int:
    """What is kept of each key service. Exits with 3 where one showed two logs."""
    found = heads.remembered(folder or heads.folder())
    if as_json:
        click.echo(json.dumps([_document(each) for each in found], indent=2))
    else:
        _print(found)
    return FORKED if any(each.forked for each in found) else 0


@group.command("export")
@click.argument("service", default="")
@_folder
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write there instead of standard output.")
def export(service: str, folder: Path | None, out: Path | None) -> None:
    """Write the heads of SERVICE (its id, or how that begins) as one JSON document. Nothing of it is secret.

    SERVICE may be left out where only one is known.
    """
    found = [each for each in heads.remembered(folder or heads.folder()) if each.service.hex().startswith(service)]
    if len(found) != 1:
        got = f"{len(found)} that begin with {service[:64]!a}" if service else f"{len(found)} services"
        raise ConfigurationError.because("service", got, "one of `stip audit-heads list`")
    data = found[0].path.read_bytes()
    if out is None:
        sys.stdout.write(data.decode())
        return
    out.write_bytes(data)
    click.echo(f"wrote {out}: {len(found[0].heads)} heads of service {found[0].service.hex()}")


def _document(each: Remembered) -> dict[str, Any]:
    newest = max(each.heads, key=lambda head: head.sequence, default=None)
    return {
        "service": each.service.hex(),
        "heads": len(each.heads),
        "newest": None if newest is None else {"sequence": newest.sequence, "hash": newest.hash.hex(), "at": newest.at},
        "forked": None if each.forked is None else each.forked.message,
        "file": str(each.path),
    }


def _print(found: list[Remembered]) -> None:
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, soft_wrap=False)
    if not found:
        console.print("no heads yet: they come with sessions whose profile names a service_key", highlight=False)
        return
    table = Table("service", "heads", "newest entry", "at", "log", pad_edge=False)
    for each in found:
        newest = max(each.heads, key=lambda head: head.sequence, default=None)
        entry, at = ("", "") if newest is None else (str(newest.sequence), _utc(newest.at))
        state = Text("one", "green") if each.forked is None else Text("FORKED", "bold red")
        table.add_row(each.service.hex(), str(len(each.heads)), entry, at, state)
    console.print(table)
    for each in found:
        if each.forked is not None:
            console.print(Text(f"{each.forked.message}. Proof: {each.path}", "bold red"))


def _utc(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, tz=UTC):%Y-%m-%dT%H:%M:%SZ}"
