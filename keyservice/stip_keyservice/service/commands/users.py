"""`stip-keyservice users`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from sqlalchemy import Connection

from stip_keyservice.service import instances, users
from stip_keyservice.service.auditlog import Trail
from stip_keyservice.service.commands.room import Room, home_option, json_option, moment, open_room, show, table
from stip_keyservice.service.users import User
from stip_protocol.errors import ConfigurationError


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
@click.option("--instance", "allowed", multiple=True, metavar="ID", help="A shared instance to allow. Repeatable.")
@home_option
@json_option
def add(name: str, public_key: str, budget: int, allowed: tuple[str, ...], home: Path | None) -> None:
    """Register NAME under a public key.

    The user keeps the private key; every session needs a delegation signed with it. A dedicated instance names its
    user itself: `stip-keyservice instances add DIR --dedicated-to NAME`.
    """
    key = _key(public_key)
    with open_room(home, create=True) as room, room.decision("user_added") as trail, room.store.write() as db:
        user = users.add(db, name, key, budget=budget, now=trail.now)
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


@group.command("remove")
@click.argument("name")
@home_option
@json_option
def remove(name: str, home: Path | None) -> None:
    """Refuse user NAME from now on.

    Running sessions end at their next heartbeat, which the policy's lease.heartbeat_tokens bounds. It is final for
    that public key: to let the same person back in, register a new key.
    """
    with open_room(home) as room, room.decision("user_removed") as trail, room.store.write() as db:
        _named(db, name, trail)
        user = users.remove(db, name, now=trail.now)
        room.audit.append(db, trail)
    _show_one(user)


@group.command("list")
@click.option("--removed", is_flag=True, help="Also users who were removed.")
@home_option
@json_option
def list_users(removed: bool, home: Path | None) -> None:
    """The registered users with their budgets."""
    with open_room(home) as room:
        found = _everyone(room, removed)
    show([_document(user) for user in found], lambda: _table(found))


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


def _table(found: list[User]) -> object:
    rows = (
        (
            user.name,
            f"{user.budget - user.spent:,} of {user.budget:,}",
            "\n".join(user.instances) or "none",
            "\n".join(f"{device.name} {device.public_key.hex()[:16]}…" for device in user.devices) or "none",
            f"removed {moment(user.removed_at)}" if user.removed_at is not None else f"since {moment(user.added_at)}",
        )
        for user in found
    )
    columns = ("user", "tokens left", "instances", "devices", "state")
    return table(columns, rows, empty="No users. Add one with `stip-keyservice users add`.")
