"""`stip-keyservice instances`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stip_keyservice.service import instances, users
from stip_keyservice.service.commands.room import home_option, json_option, moment, open_room, show, table
from stip_keyservice.service.instances import Instance


@click.group("instances")
def group() -> None:
    """The protected models this service holds the keys of."""


@group.command("add")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--dedicated-to", metavar="USER", help="Trust domain of one user: the grant travels in their bundle.")
@click.option("--shared", is_flag=True, help="Trust domain of several users, who accept to be readable by each other.")
@home_option
@json_option
def add(directory: Path, dedicated_to: str | None, shared: bool, home: Path | None) -> None:
    """Check an instance DIRECTORY made by `protect`, and keep what opens it.

    Refused unless the manifest is signed by this home's developer key, every file has its digest, the certificate
    is there and secrets.sealed belongs to this very manifest. The directory is not needed afterwards.

    Any member of a shared instance who colludes with the operator can read the others. Choose --dedicated-to where
    users do not trust each other.
    """
    if shared == (dedicated_to is not None):
        raise click.UsageError("Say who the instance is for: either --dedicated-to USER or --shared.")
    with open_room(home, create=True) as room, room.decision("instance_added") as trail:
        inspected = instances.inspect(directory, room.home.developer.public_key(), room.home.sealing)
        trail.subject["instance"] = inspected.manifest.instance
        with room.store.write() as db:
            owner = None if dedicated_to is None else users.by_name(db, dedicated_to)
            trail.subject["kind"] = "shared" if owner is None else "dedicated"
            instance = instances.add(db, inspected, storage_key=room.home.storage_key, owner=owner, now=trail.now)
            room.audit.append(db, trail)
    _show_one(instance)


@group.command("remove")
@click.argument("instance")
@home_option
@json_option
def remove(instance: str, home: Path | None) -> None:
    """Refuse INSTANCE from now on and destroy its stored grant.

    Running sessions end at their next heartbeat. Without the developer's copy of secrets.sealed nobody can open the
    instance again.
    """
    with open_room(home) as room:
        with room.decision("instance_removed") as trail, room.store.write() as db:
            removed = instances.remove(db, instance, now=trail.now)
            trail.subject["instance"] = removed.id
            room.audit.append(db, trail)
        room.store.forget()
    _show_one(removed)


@group.command("list")
@click.option("--removed", is_flag=True, help="Also instances that were removed.")
@home_option
@json_option
def list_instances(removed: bool, home: Path | None) -> None:
    """The registered instances."""
    with open_room(home) as room, room.store.read() as db:
        found = list(instances.everything(db, removed=removed))
    show([_document(instance) for instance in found], lambda: _table(found))


def _document(instance: Instance) -> dict[str, Any]:
    return {
        "id": instance.id,
        "epoch": instance.epoch,
        "preset": instance.preset,
        "kind": instance.kind,
        "manifest_digest": instance.manifest_digest.hex(),
        "members": list(instance.members),
        "added_at": moment(instance.added_at),
        "removed_at": moment(instance.removed_at),
    }


def _show_one(instance: Instance) -> None:
    show(_document(instance), lambda: _table([instance]))


def _table(found: list[Instance]) -> object:
    rows = (
        (
            instance.id,
            instance.epoch,
            instance.preset,
            instance.kind,
            len(instance.members),
            f"removed {moment(instance.removed_at)}"
            if instance.removed_at is not None
            else f"since {moment(instance.added_at)}",
        )
        for instance in found
    )
    columns = ("instance", "epoch", "preset", "kind", "users", "state")
    return table(columns, rows, empty="No instances. Add one with `stip-keyservice instances add`.")
