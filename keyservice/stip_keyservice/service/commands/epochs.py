"""`stip-keyservice epochs`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from stip_keyservice.service import canaries, instances
from stip_keyservice.service.commands.room import home_option, json_option, moment, open_room, show, table
from stip_keyservice.service.instances import Epoch, Instance

DRAIN_LIMIT = 366 * 24 * 3600


@click.group("epochs")
def group() -> None:
    """Sets of keys of one instance: a new one joins, new sessions go there, old ones drain.

    \b
    stip-keyservice protect MODEL --instance ID --epoch 1 --out NEXT
    stip-keyservice instances add NEXT --dedicated-to alice       (it stands by)
    (its servers join the gateway, its enclave part is brought to the enclaves)
    stip-keyservice epochs activate ID 1 --drain-seconds 86400
    stip-keyservice epochs retire ID 0                            (once it has drained)
    """


@group.command("activate")
@click.argument("instance")
@click.argument("epoch", type=click.IntRange(0, 2**31 - 1))
@click.option(
    "--drain-seconds",
    type=click.IntRange(0, DRAIN_LIMIT),
    help="How long sessions of the epoch before go on.  [default: until `epochs retire`]",
)
@home_option
@json_option
def activate(instance: str, epoch: int, drain_seconds: int | None, home: Path | None) -> None:
    """Release EPOCH of INSTANCE from now on; the one released so far drains.

    Enclaves that hold the new epoch get it for every new session. Running sessions of the old one go on, their leases
    are renewed while it drains, and an enclave that has no files of the new one yet still gets the old one.
    """
    with open_room(home) as room, room.decision("epoch_activated") as trail, room.store.write() as db:
        trail.subject |= {"instance": instances.by_id(db, instance).id, "epoch": epoch}
        until = None if drain_seconds is None else trail.now + drain_seconds
        found = instances.activate(db, instance, epoch, drain_until=until)
        room.audit.append(db, trail)
    _show(found, {})


@group.command("retire")
@click.argument("instance")
@click.argument("epoch", type=click.IntRange(0, 2**31 - 1))
@click.option("--now", "at_once", is_flag=True, help="End the sessions that still run on it.")
@home_option
@json_option
def retire(instance: str, epoch: int, at_once: bool, home: Path | None) -> None:
    """End EPOCH of INSTANCE, which drains or stands by, and destroy its stored grant and its canaries.

    Refused while leases run on it, unless --now says so. Without the developer's copy of secrets.sealed nobody can open
    it again.
    """
    with open_room(home) as room:
        with room.decision("epoch_retired") as trail, room.store.write() as db:
            trail.subject |= {"instance": instances.by_id(db, instance).id, "epoch": epoch}
            if not at_once:
                instances.require_idle(db, instance, epoch, now=trail.now)
            found = instances.retire(db, room.vault, instance, epoch, now=trail.now)
            room.audit.append(db, trail)
        room.forget()
    _show(found, {})


@group.command("list")
@click.argument("instance")
@home_option
@json_option
def list_epochs(instance: str, home: Path | None) -> None:
    """The epochs of INSTANCE, with the leases that still run on each."""
    with open_room(home) as room, room.store.read() as db:
        found = instances.by_id(db, instance)
        running = instances.running_leases(db, instance, now=int(time.time()))
        left = {epoch.number: canaries.remaining(db, instance, epoch.number) for epoch in found.epochs}
    _show(found, running, left)


def _show(found: Instance, running: dict[int, int], left: dict[int, int] | None = None) -> None:
    documents = [_document(epoch, running, left or {}) for epoch in found.epochs]
    columns = ("epoch", "state", "preset", "added", "drains until", "running leases", "canaries left")
    keys = ("epoch", "state", "preset", "added_at", "drain_until", "running_leases", "canaries")
    rows = [["" if document[key] is None else document[key] for key in keys] for document in documents]
    show({"instance": found.id, "epochs": documents}, lambda: table(columns, rows, empty="No epochs."))


def _document(epoch: Epoch, running: dict[int, int], left: dict[int, int]) -> dict[str, Any]:
    return {
        "epoch": epoch.number,
        "state": epoch.state,
        "preset": epoch.preset,
        "manifest_digest": epoch.manifest_digest.hex(),
        "added_at": moment(epoch.added_at),
        "drain_until": moment(epoch.drain_until),
        "removed_at": moment(epoch.removed_at),
        "running_leases": running.get(epoch.number, 0),
        "canaries": left.get(epoch.number, 0),
    }
