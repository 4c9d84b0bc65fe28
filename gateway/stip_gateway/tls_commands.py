"""`stip-gateway tls`: the operator's own small PKI."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import click

from stip_gateway import tls
from stip_protocol.runtime.authority import AUTHORITY_LIFE, LEAF_LIFE, RENEWAL_MARGIN, Use

FOLDER = click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default="tls", show_default=True, help="TLS folder."
)
DAYS = click.option(
    "--days", type=click.IntRange(1, LEAF_LIFE.days), default=LEAF_LIFE.days, show_default=True, help="Until it ends."
)
COLUMNS = ("name", "good for", "names", "ends", "days left", "")


@click.group("tls")
def group() -> None:
    """The operator's certificates: an authority, the gateway's, and one for every model server.

    \b
    On the administrator's machine:
      stip-gateway tls init
      stip-gateway tls issue gateway --name gateway.example
      stip-gateway tls issue gateway-client --use client
      stip-gateway tls issue replica-1 --name 10.0.0.11
      stip-gateway tls show --within 30

    Enclaves present certificates of the key service, never of this authority. Parts read theirs when they start:
    restart a part, or roll its replicas, after a renewal.
    """


@group.command()
@FOLDER
@click.option("--subject", default="STIP operator authority", show_default=True, help="Name in the certificate.")
@click.option(
    "--days", type=click.IntRange(1, AUTHORITY_LIFE.days), default=AUTHORITY_LIFE.days, show_default=True,
    help="Until the authority ends.",
)  # fmt: skip
def init(folder: Path, subject: str, days: int) -> None:
    """Make the operator's authority. Its key stays here; operator-ca.pem goes to every host of the operator."""
    click.echo(tls.create(folder, subject=subject, life=timedelta(days=days)))


@group.command()
@click.argument("name")
@click.option("--name", "names", multiple=True, help="DNS name or IP address; may be given again. By default NAME.")
@click.option(
    "--use", "uses", type=click.Choice([use.value for use in Use]), multiple=True, default=[Use.SERVER.value],
    show_default=True, help="What it is good for; may be given again.",
)  # fmt: skip
@DAYS
@FOLDER
def issue(name: str, names: tuple[str, ...], uses: tuple[str, ...], days: int, folder: Path) -> None:
    """Issue NAME.pem over a fresh key. Refuses where there is one: see renew."""
    life = timedelta(days=days)
    click.echo(tls.issue(folder, name, names=names, uses=[Use(use) for use in uses], life=life))


@group.command()
@click.argument("name")
@DAYS
@FOLDER
def renew(name: str, days: int, folder: Path) -> None:
    """Give NAME.pem a new term over its old key, with its old names and uses."""
    click.echo(tls.renew(folder, name, life=timedelta(days=days)))


@group.command()
@click.option(
    "--within", type=click.IntRange(0), default=RENEWAL_MARGIN.days, show_default=True,
    help="Exit 1 where something ends within so many days.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@FOLDER
def show(within: int, as_json: bool, folder: Path) -> None:
    """Every certificate, the one that ends first in front. Exits 1 where one ends soon or has a problem."""
    found = tls.listed(folder)
    if as_json:
        rows = [asdict(one) | {"ends": one.ends.isoformat()} for one in found]
        click.echo(json.dumps({"within_days": within, "certificates": rows}, indent=2))
    else:
        _table(
            [(one.name, one.kind, ", ".join(one.names), f"{one.ends:%Y-%m-%d}", str(one.days_left),
              one.problem or ("renew" if one.days_left <= within else "")) for one in found]
        )  # fmt: skip
    if any(one.problem or one.days_left <= within for one in found):
        raise SystemExit(1)


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
