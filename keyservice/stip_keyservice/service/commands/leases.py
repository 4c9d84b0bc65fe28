"""`stip-keyservice leases`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from stip_keyservice.service import endings, instances, revocations, users
from stip_keyservice.service.commands.room import home_option, json_option, moment, open_room, show, table
from stip_keyservice.service.endings import ListedLease


@click.group("leases")
def group() -> None:
    """What enclaves run under: who for, how far, and what ended it."""


@group.command("list")
@click.option("--user", metavar="NAME|ID", help="Of this user.")
@click.option("--instance", metavar="ID", help="Of this instance.")
@click.option("--enclave", metavar="HEX", help="Of the enclave with this key digest, as this table shows it.")
@click.option("--all", "ended_too", is_flag=True, help="Also those that ended: they stay on record for a day.")
@click.option("--last", default=100, show_default=True, type=click.IntRange(1, 100_000), help="How many, newest first.")
@home_option
@json_option
def list_leases(
    user: str | None, instance: str | None, enclave: str | None, ended_too: bool, last: int, home: Path | None
) -> None:
    """Running leases. The enclave's key digest is what `revoke enclave` takes."""
    with open_room(home) as room, room.store.read() as db:
        found = endings.listed(
            db,
            now=int(time.time()),
            limit=last,
            user=None if user is None else users.last_of(db, user).id,
            instance=None if instance is None else instances.by_id(db, instance).id,
            enclave=None if enclave is None else bytes.fromhex(revocations.subject_of(db, "enclave", enclave)),
            ended_too=ended_too,
        )
    columns = ("user", "device", "instance", "epoch", "enclave", "fed of tokens", "expires", "state")
    rows = [
        (
            f"{lease.user}",
            lease.device,
            lease.instance,
            lease.epoch,
            lease.enclave.hex(),
            f"{lease.fed:,} of {lease.tokens:,}",
            moment(lease.expires),
            lease.state if lease.revocation is None else f"{lease.state} ({lease.revocation})",
        )
        for lease in found
    ]
    show([_document(lease) for lease in found], lambda: table(columns, rows, empty="No leases."))


def _document(lease: ListedLease) -> dict[str, Any]:
    return {
        "handle": lease.handle.hex(),
        "user": lease.user,
        "device": lease.device,
        "instance": lease.instance,
        "epoch": lease.epoch,
        "enclave": lease.enclave.hex(),
        "measurement": lease.facts.measurement.hex(),
        "tcb_status": lease.facts.tcb_status,
        "serial": lease.serial,
        "tokens": lease.tokens,
        "fed": lease.fed,
        "not_before": moment(lease.not_before),
        "expires": moment(lease.expires),
        "state": lease.state,
        "revocation": lease.revocation,
    }
