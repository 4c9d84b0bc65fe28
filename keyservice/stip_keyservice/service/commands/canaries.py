"""`stip-keyservice canaries`."""

from __future__ import annotations

from pathlib import Path

import click

from stip_keyservice.service import canaries, instances
from stip_keyservice.service.commands.room import home_option, json_option, open_room, show, table


@click.group("canaries")
def group() -> None:
    """Sessions with a known answer, each given to one enclave once, to try the operator's server with."""


@group.command("add")
@click.argument("instance")
@click.argument("epoch", type=click.IntRange(0, 2**31 - 1))
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@home_option
@json_option
def add(instance: str, epoch: int, file: Path, home: Path | None) -> None:
    """Put the items of FILE into the pool of EPOCH of INSTANCE.

    FILE is a CBOR sequence (.cbor) or has a JSON value a line (.jsonl). An item has 4,096 bytes at most and is handed
    out as it stands there. The policy's canaries.per_bundle says how many go with a bundle.
    """
    items = canaries.parse(file)
    with open_room(home) as room, room.decision("canaries_added") as trail, room.store.write() as db:
        trail.subject |= {"instance": instances.by_id(db, instance).id, "epoch": epoch, "detail": f"{len(items)} items"}
        left = canaries.add(db, room.vault, instance, epoch, items)
        room.audit.append(db, trail)
    document = {"instance": instance, "epoch": epoch, "added": len(items), "left": left}
    show(document, lambda: f"Added {len(items):,}; {left:,} are left to be drawn")


@group.command("list")
@home_option
@json_option
def list_canaries(home: Path | None) -> None:
    """How many canaries each epoch has left."""
    with open_room(home) as room, room.store.read() as db:
        found = [
            {"instance": instance.id, "epoch": epoch.number, "state": epoch.state, "left": left}
            for instance in instances.everything(db)
            for epoch in instance.epochs
            if (left := canaries.remaining(db, instance.id, epoch.number)) or epoch.state != "removed"
        ]
    columns = ("instance", "epoch", "state", "left")
    show(found, lambda: table(columns, [tuple(each.values()) for each in found], empty="No instances."))
