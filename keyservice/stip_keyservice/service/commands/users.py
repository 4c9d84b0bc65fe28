"""`stip-keyservice users`."""

from __future__ import annotations

import csv
import io
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Group
from rich.table import Table
from sqlalchemy import Connection

from stip_keyservice.service import instances, usage, users
from stip_keyservice.service.auditlog import Trail
from stip_keyservice.service.commands.room import Room, home_option, json_option, moment, open_room, show, table
from stip_keyservice.service.shredding import shred_user
from stip_keyservice.service.users import Device, User
from stip_protocol.errors import ConfigurationError

USAGE_COLUMNS = ("day", "debited", "fed", "leases", "renewals")


@click.group("users")
def group() -> None:
    """Who may use the instances, and how many tokens each may spend."""


@group.command("add")
@click.argument("name")
@click.option(
    "--public-key",
    required=True,
    metavar="HEX|FILE",
    help="The user's Ed25519 public key, as `stip keys` prints it: 64 hex digits, or a file with those or PEM.",
)
@click.option("--budget", type=int, required=True, help="Tokens the user may spend in all (prompt and answer).")
@click.option(
    "--domain",
    metavar="NAME",
    help="Trust domain shared with other users, who accept to be readable by each other.  [default: their own]",
)
@click.option(
    "--device", default=users.FIRST_DEVICE, show_default=True, help="What to call the device that has the key."
)
@click.option("--instance", "allowed", multiple=True, metavar="ID", help="A shared instance to allow. Repeatable.")
@home_option
@json_option
def add(
    name: str,
    public_key: str,
    budget: int,
    domain: str | None,
    device: str,
    allowed: tuple[str, ...],
    home: Path | None,
) -> None:
    """Register NAME under the public key of a first device.

    The user keeps the private key; every session needs a delegation signed with it. A dedicated instance names its
    user, or their domain, itself: `stip-keyservice instances add DIR --dedicated-to NAME`, or `domain:NAME`.
    """
    key = _key(public_key)
    with open_room(home, create=True) as room, room.decision("user_added") as trail, room.store.write() as db:
        user = users.add(db, name, key, budget=budget, now=trail.now, domain=domain, device=device)
        for instance in allowed:
            instances.allow(db, instance, user)
        trail.subject["user"] = user.id
        room.audit.append(db, trail)
        user = users.by_id(db, user.id)
    _show_one(user)


@group.command("allow")
@click.argument("name")
@click.argument("instance")
@home_option
@json_option
def allow(name: str, instance: str, home: Path | None) -> None:
    """Let user NAME use the shared INSTANCE as well."""
    with open_room(home) as room, room.decision("user_allowed") as trail, room.store.write() as db:
        user = _named(db, name, trail)
        instances.allow(db, instance, user)
        trail.subject["instance"] = instance
        room.audit.append(db, trail)
        user = users.by_id(db, user.id)
    _show_one(user)


@group.command("disallow")
@click.argument("name")
@click.argument("instance")
@home_option
@json_option
def disallow(name: str, instance: str, home: Path | None) -> None:
    """Take the shared INSTANCE from user NAME again. Their sessions on it end."""
    with open_room(home) as room, room.decision("user_disallowed") as trail, room.store.write() as db:
        user = _named(db, name, trail)
        instances.disallow(db, instance, user)
        trail.subject["instance"] = instance
        room.audit.append(db, trail)
        user = users.by_id(db, user.id)
    _show_one(user)


@group.command("budget")
@click.argument("name")
@click.argument("tokens", type=int)
@home_option
@json_option
def budget(name: str, tokens: int, home: Path | None) -> None:
    """Set the TOKENS that user NAME may spend in all, those already spent included."""
    with open_room(home) as room, room.decision("budget_set") as trail, room.store.write() as db:
        _named(db, name, trail)
        user = users.set_budget(db, name, tokens)
        room.audit.append(db, trail)
    _show_one(user)


@group.command("disable")
@click.argument("name")
@home_option
@json_option
def disable(name: str, home: Path | None) -> None:
    """Refuse user NAME until `users enable`. Running sessions end; nothing is forgotten."""
    with open_room(home) as room, room.decision("user_disabled") as trail, room.store.write() as db:
        _named(db, name, trail)
        user = users.disable(db, name, now=trail.now)
        room.audit.append(db, trail)
    _show_one(user)


@group.command("enable")
@click.argument("name")
@home_option
@json_option
def enable(name: str, home: Path | None) -> None:
    """Accept the disabled user NAME again."""
    with open_room(home) as room, room.decision("user_enabled") as trail, room.store.write() as db:
        _named(db, name, trail)
        user = users.enable(db, name)
        room.audit.append(db, trail)
    _show_one(user)


@group.command("remove")
@click.argument("name")
@home_option
@json_option
def remove(name: str, home: Path | None) -> None:
    """Refuse user NAME from now on.

    Running sessions end at once where their enclave watches, at their next heartbeat anyway, which the policy's
    lease.heartbeat_tokens bounds. It is final for their public keys: to let the same person back in, register a new
    one. To refuse them for a while, disable them.
    """
    with open_room(home) as room, room.decision("user_removed") as trail, room.store.write() as db:
        _named(db, name, trail)
        user = users.remove(db, name, now=trail.now)
        room.audit.append(db, trail)
    _show_one(user)


@group.command("shred")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@home_option
@json_option
def shred(name: str, yes: bool, home: Path | None) -> None:
    """Remove user NAME (or, already removed, the one of that id) for good, and forget who that was.

    Destroys the data key of a trust domain of their own, and with it every grant of the instances dedicated to them;
    names of the user and their devices are replaced by random ids. The audit log has random ids only, and stays whole.
    Says what the database keeps of it all the same. Backups open until the root key is rewrapped.
    """
    if not yes:
        click.confirm(f"Shred {name}? Nothing brings back what is destroyed", abort=True, err=True)
    with open_room(home) as room:
        with room.decision("user_shredded") as trail, room.store.write() as db:
            user = users.last_of(db, name)
            trail.subject["user"] = user.id
            user = shred_user(db, room.vault, user, now=trail.now)
            room.audit.append(db, trail)
        room.forget()
    _show_one(user)


@group.command("show")
@click.argument("name")
@home_option
@json_option
def show_user(name: str, home: Path | None) -> None:
    """User NAME (or of that id, removed or not), and every device they ever had."""
    with open_room(home) as room, room.store.read() as db:
        user = users.last_of(db, name)
        devices = users.devices_of(db, user)
    history = [_device(device) for device in devices]
    rows = [
        (each["name"], each["id"], each["public_key"], each["added_at"], each["removed_at"] or "") for each in history
    ]
    columns = ("device", "id", "public key", "added", "removed")
    show(
        _document(user) | {"history": history},
        lambda: Group(_table([user]), "", table(columns, rows, empty="No devices.")),
    )


@group.command("usage")
@click.argument("name")
@click.option("--days", default=30, show_default=True, type=click.IntRange(1, 3660), help="Up to today, UTC.")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values on stdout.")
@home_option
@json_option
def show_usage(name: str, days: int, as_csv: bool, home: Path | None) -> None:
    """What user NAME took from the budget and used, by day.

    Tokens are debited in chunks before they are used. What was debited and never fed is what sessions had left over, or
    a crashed enclave took along.
    """
    with open_room(home) as room, room.store.read() as db:
        user = users.last_of(db, name)
        found = usage.of(db, user.id, since=int(time.time()) // usage.DAY_SECONDS - days + 1)
    rows = [_usage(day) for day in found]
    if as_csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, USAGE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        click.echo(text.getvalue(), nl=False)
        return
    total = {name: sum(row[name] for row in rows) for name in USAGE_COLUMNS[1:]}
    shown = [*rows, {"day": "total"} | total] if rows else []
    cells = [[f"{row[name]:,}" if name in total else row[name] for name in USAGE_COLUMNS] for row in shown]
    show(
        {"user": user.id, "days": rows, "total": total, "budget": user.budget, "spent": user.spent},
        lambda: table(USAGE_COLUMNS, cells, empty=f"No use in the last {days} days."),
    )


@group.command("list")
@click.option("--removed", is_flag=True, help="Also users who were removed.")
@home_option
@json_option
def list_users(removed: bool, home: Path | None) -> None:
    """The registered users with their budgets."""
    with open_room(home) as room:
        found = _everyone(room, removed)
    show([_document(user) for user in found], lambda: _table(found))


@group.group("devices")
def devices_group() -> None:
    """The keys that may sign for a user: one for each of their devices."""


@devices_group.command("add")
@click.argument("name")
@click.argument("device")
@click.option("--public-key", required=True, metavar="HEX|FILE", help="As with `users add`.")
@home_option
@json_option
def add_device(name: str, device: str, public_key: str, home: Path | None) -> None:
    """Let the key of another DEVICE sign for user NAME."""
    key = _key(public_key)
    with open_room(home) as room, room.decision("device_added") as trail, room.store.write() as db:
        user = _named(db, name, trail)
        trail.subject["device"] = users.add_device(db, user, device, key, now=trail.now).id
        room.audit.append(db, trail)
        user = users.by_id(db, user.id)
    _show_one(user)


@devices_group.command("remove")
@click.argument("name")
@click.argument("device")
@home_option
@json_option
def remove_device(name: str, device: str, home: Path | None) -> None:
    """Refuse what DEVICE of user NAME signs; sessions that it delegated end. Its key is refused for good."""
    with open_room(home) as room, room.decision("device_removed") as trail, room.store.write() as db:
        user = _named(db, name, trail)
        trail.subject["device"] = users.remove_device(db, user, device, now=trail.now).id
        room.audit.append(db, trail)
        user = users.by_id(db, user.id)
    _show_one(user)


@devices_group.command("rotate")
@click.argument("name")
@click.argument("device")
@click.option("--public-key", required=True, metavar="HEX|FILE", help="The new key, as with `users add`.")
@home_option
@json_option
def rotate_device(name: str, device: str, public_key: str, home: Path | None) -> None:
    """Give DEVICE of user NAME a new key; the old one goes in the same transaction, and sessions under it end."""
    key = _key(public_key)
    with open_room(home) as room, room.decision("device_rotated") as trail, room.store.write() as db:
        user = _named(db, name, trail)
        trail.subject["device"] = users.rotate_device(db, user, device, key, now=trail.now).id
        room.audit.append(db, trail)
        user = users.by_id(db, user.id)
    _show_one(user)


@devices_group.command("list")
@click.argument("name")
@home_option
@json_option
def list_devices(name: str, home: Path | None) -> None:
    """The devices that may sign for user NAME."""
    with open_room(home) as room, room.store.read() as db:
        user = users.last_of(db, name)
    rows = [(device.name, device.id, device.public_key.hex(), moment(device.added_at)) for device in user.devices]
    columns = ("device", "id", "public key", "added")
    show([_device(device) for device in user.devices], lambda: table(columns, rows, empty="No devices."))


def _everyone(room: Room, removed: bool) -> list[User]:
    with room.store.read() as db:
        return list(users.everyone(db, removed=removed))


def _named(db: Connection, name: str, trail: Trail) -> User:
    user = users.by_name(db, name)
    trail.subject["user"] = user.id
    return user


def _key(given: str) -> bytes:
    """HEX|FILE: what is not a file is taken as the key itself."""
    if not os.path.isfile(given):
        return users.parse_public_key(given.encode())
    try:
        with open(given, "rb") as file:
            return users.parse_public_key(file.read(users.KEY_TEXT_LIMIT + 1))
    except OSError as error:
        raise ConfigurationError(f"public key {given}: {error.strerror}") from None


def _device(device: Device) -> dict[str, Any]:
    return {
        "id": device.id,
        "name": device.name,
        "public_key": device.public_key.hex(),
        "added_at": moment(device.added_at),
        "removed_at": moment(device.removed_at),
    }


def _usage(day: usage.Usage) -> dict[str, Any]:
    date = datetime.fromtimestamp(day.day * usage.DAY_SECONDS, UTC).date().isoformat()
    return {"day": date} | {name: getattr(day, name) for name in USAGE_COLUMNS[1:]}


def _state(user: User) -> str:
    if user.removed_at is not None:
        return f"removed {moment(user.removed_at)}"
    return f"disabled {moment(user.disabled_at)}" if user.disabled_at is not None else f"since {moment(user.added_at)}"


def _document(user: User) -> dict[str, Any]:
    return {
        "id": user.id,
        "name": user.name,
        "domain": user.domain,
        "devices": {device.name: device.public_key.hex() for device in user.devices},
        "budget": user.budget,
        "spent": user.spent,
        "instances": list(user.instances),
        "added_at": moment(user.added_at),
        "disabled_at": moment(user.disabled_at),
        "removed_at": moment(user.removed_at),
    }


def _show_one(user: User) -> None:
    show(_document(user), lambda: _table([user]))


def _table(found: list[User]) -> Table | str:
    rows = (
        (
            user.name,
            f"{user.budget - user.spent:,} of {user.budget:,}",
            "\n".join(user.instances) or "none",
            "\n".join(f"{device.name} {device.public_key.hex()[:16]}…" for device in user.devices) or "none",
            "own" if user.domain == users.own_domain(user.id) else user.domain,
            _state(user),
        )
        for user in found
    )
    columns = ("user", "tokens left", "instances", "devices", "domain", "state")
    return table(columns, rows, empty="No users. Add one with `stip-keyservice users add`.")
