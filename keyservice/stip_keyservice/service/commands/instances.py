"""`stip-keyservice instances`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import click
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from sqlalchemy import Connection

from stip_keyservice.service import instances, users
from stip_keyservice.service.commands.room import home_option, json_option, moment, open_room, show, table
from stip_keyservice.service.instances import Epoch, Instance
from stip_keyservice.service.leakage import worst
from stip_keyservice.service.policy import Policy
from stip_keyservice.service.shredding import shred_instance
from stip_protocol.leakage import LeakageCell


@click.group("instances")
def group() -> None:
    """The protected models this service holds the keys of."""


@group.command("add")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--dedicated-to",
    metavar="USER|domain:NAME",
    help="Trust domain of one user, or one that several share: the grant travels in their bundles.",
)
@click.option("--shared", is_flag=True, help="Trust domain of several users, who accept to be readable by each other.")
@click.option(
    "--policy",
    "policy_file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Refuse at once what this policy would refuse at every release: not listed, or above its leakage maxima.",
)
@home_option
@json_option
def add(directory: Path, dedicated_to: str | None, shared: bool, policy_file: Path | None, home: Path | None) -> None:
    """Check an instance DIRECTORY made by `protect`, and keep what opens it.

    Refused unless the manifest is signed by this home's developer key, every file has its digest, the certificate
    is there, and so is the report of the audit that the manifest sums up, if it does, and secrets.sealed belongs to
    this very manifest. The directory is not needed afterwards.

    The first epoch of an instance is released at once. A later one (`protect --instance ID --epoch N`) is for the same
    users, stands by, and is released with `stip-keyservice epochs activate`.

    Any member of a shared instance who colludes with the operator can read the others. Choose --dedicated-to where
    users do not trust each other.
    """
    if shared == (dedicated_to is not None):
        raise click.UsageError(
            "Say who the instance is for: --dedicated-to USER, --dedicated-to domain:NAME or --shared."
        )
    policy = None if policy_file is None else Policy.load(policy_file)
    with open_room(home, create=True) as room, room.decision("instance_added") as trail:
        inspected = instances.inspect(directory, room.home.developer.public_key(), room.home.sealing)
        manifest = inspected.manifest
        trail.subject["instance"] = manifest.instance
        if policy is not None:
            policy.require_listed(inspected.grant.manifest_digest, "shared" if shared else "dedicated")
            policy.require_measured(manifest.leakage, manifest.preset)
        with room.store.write() as db:
            domain = None if dedicated_to is None else _domain(db, dedicated_to)
            trail.subject |= {"kind": "shared" if domain is None else "dedicated", "epoch": manifest.epoch}
            if instances.find(db, manifest.instance) is not None:
                trail.event = "epoch_added"
            instance = instances.add(db, inspected, vault=room.vault, domain=domain, now=trail.now)
            room.audit.append(db, trail)
            found = _listed(db, instance)
    if policy is None:
        audited = "not audited" if manifest.leakage is None else "audited"
        click.echo(f"The instance is {audited}. Whether that will do, the policy decides at release.", err=True)
    _show_one(found)


@group.command("show")
@click.argument("instance")
@home_option
@json_option
def show_instance(instance: str, home: Path | None) -> None:
    """One INSTANCE, removed or not, and what an audit measured of it."""
    with open_room(home) as room, room.store.read() as db:
        found = _listed(db, instances.by_id(db, instance))
    shown = _shown(found.instance)
    cells = [] if shown.leakage is None else [cell.model_dump(mode="json") for cell in shown.leakage.cells]
    show(_document(found) | {"cells": cells}, lambda: Group(_table([found]), "", _cells(shown)))


@group.command("remove")
@click.argument("instance")
@home_option
@json_option
def remove(instance: str, home: Path | None) -> None:
    """Refuse INSTANCE from now on and destroy its stored grant.

    Running sessions end at once where their enclave watches, at their next heartbeat anyway. Without the developer's
    copy of secrets.sealed nobody can open the instance again.
    """
    with open_room(home) as room:
        with room.decision("instance_removed") as trail, room.store.write() as db:
            removed = instances.remove(db, room.vault, instance, now=trail.now)
            trail.subject["instance"] = removed.id
            room.audit.append(db, trail)
            found = _listed(db, removed)
        room.forget()
    _show_one(found)


@group.command("shred")
@click.argument("instance")
@click.option("--yes", is_flag=True, help="Do not ask.")
@home_option
@json_option
def shred(instance: str, yes: bool, home: Path | None) -> None:
    """Remove INSTANCE, removed before or not, and destroy every key it was kept under.

    Says what the database keeps of it all the same. Backups open until the root key is rewrapped. The instance's
    secrets.sealed opens as long as it exists: delete it where it lies.
    """
    if not yes:
        click.confirm(f"Shred {instance}? Nothing brings back what is destroyed", abort=True, err=True)
    with open_room(home) as room:
        with room.decision("instance_shredded") as trail, room.store.write() as db:
            shredded = shred_instance(db, room.vault, instance, now=trail.now)
            trail.subject["instance"] = shredded.id
            room.audit.append(db, trail)
            found = _listed(db, shredded)
        room.forget()
    _show_one(found)


@group.command("list")
@click.option("--removed", is_flag=True, help="Also instances that were removed.")
@home_option
@json_option
def list_instances(removed: bool, home: Path | None) -> None:
    """The registered instances."""
    with open_room(home) as room, room.store.read() as db:
        found = [_listed(db, instance) for instance in instances.everything(db, removed=removed)]
    show([_document(one) for one in found], lambda: _table(found))


@dataclass(frozen=True)
class _Listed:
    """What is shown of one instance."""

    instance: Instance
    users: tuple[str, ...]


def _listed(db: Connection, instance: Instance) -> _Listed:
    return _Listed(instance, instances.users_of(db, instance))


def _domain(db: Connection, given: str) -> str:
    """USER|domain:NAME. No user's name has a colon."""
    kind, _, name = given.rpartition(":")
    return users.require_domain(name) if kind == "domain" else users.by_name(db, given).domain


def _document(listed: _Listed) -> dict[str, Any]:
    instance = listed.instance
    return {
        "id": instance.id,
        "kind": instance.kind,
        "domain": instance.domain,
        "members": list(listed.users),
        "added_at": moment(instance.added_at),
        "removed": instance.removed,
        "epochs": [_epoch(epoch) for epoch in instance.epochs],
    }


def _epoch(epoch: Epoch) -> dict[str, Any]:
    return {
        "epoch": epoch.number,
        "state": epoch.state,
        "preset": epoch.preset,
        "manifest_digest": epoch.manifest_digest.hex(),
        "added_at": moment(epoch.added_at),
        "drain_until": moment(epoch.drain_until),
        "removed_at": moment(epoch.removed_at),
        "leakage": _leakage(epoch),
    }


def _shown(instance: Instance) -> Epoch:
    """The epoch that is released, or else the newest."""
    return instance.released(now=int(time.time())) or instance.epochs[-1]


def _leakage(epoch: Epoch) -> dict[str, Any] | None:
    """None: not audited. A row without a figure: no attack is applicable there."""
    if epoch.leakage is None:
        return None
    rows = worst(epoch.leakage)
    return {
        "report_sha256": epoch.leakage.report_sha256,
        "seed": epoch.leakage.seed,
        "worst": {knowledge: None if found is None else vars(found) for knowledge, found in rows.items()},
    }


def _show_one(listed: _Listed) -> None:
    show(_document(listed), lambda: _table([listed]))


def _table(found: list[_Listed]) -> Table | str:
    rows = (
        (
            listed.instance.id,
            epoch.number,
            epoch.preset,
            listed.instance.kind,
            len(listed.users),
            f"{epoch.state} {moment(epoch.removed_at)}"
            if epoch.removed_at is not None
            else f"{epoch.state} since {moment(epoch.added_at)}",
            _worst(epoch),
        )
        for listed in found
        for epoch in listed.instance.epochs
    )
    columns = ("instance", "epoch", "preset", "kind", "users", "state", "leaks at most")
    return table(columns, rows, empty="No instances. Add one with `stip-keyservice instances add`.")


def _worst(epoch: Epoch) -> str:
    if epoch.leakage is None:
        return "not audited"
    rows = worst(epoch.leakage).items()
    return ", ".join(f"{knowledge} {'-' if found is None else _upper(found.upper)}" for knowledge, found in rows)


def _cells(epoch: Epoch) -> Table | str:
    measured = () if epoch.leakage is None else epoch.leakage.cells
    columns = ("knowledge", "attack", "metric", "measured", "95 % interval")
    return table(columns, (row for cell in measured for row in _figures(cell)), empty="Not audited.")


def _figures(cell: LeakageCell) -> list[tuple[str, ...]]:
    if cell.not_applicable is not None:
        return [(cell.knowledge, cell.attack, "not applicable", "", escape(cell.not_applicable))]
    return [
        (cell.knowledge, cell.attack, metric, _nearest(found.value), f"{_nearest(found.low)} to {_upper(found.high)}")
        for metric, found in cell.metrics.items()
    ]


def _nearest(share: float) -> str:
    return f"{100 * share:.1f} %"


def _upper(share: float) -> str:
    """Rounded up to one decimal: a bound is never shown lower than it is."""
    return f"{ceil(round(share * 1000, 6)) / 10:.1f} %"
