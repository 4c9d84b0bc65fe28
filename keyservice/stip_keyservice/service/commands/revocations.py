"""`stip-keyservice revoke` and `stip-keyservice revocations`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from stip_keyservice.service import revocations
from stip_keyservice.service.auditlog import Subject
from stip_keyservice.service.commands.room import home_option, json_option, moment, open_room, show, table
from stip_keyservice.service.revocations import Revocation


@click.command("revoke")
@click.argument("kind", type=click.Choice(revocations.KINDS))
@click.argument("subject")
@click.option("--reason", required=True, help="One line for the audit log: an incident's number, not its story.")
@home_option
@json_option
def revoke(kind: revocations.Kind, subject: str, reason: str, home: Path | None) -> None:
    """Refuse a SUBJECT at once, and end every lease of it.

    \b
    KIND         SUBJECT
    user         a name or an id
    device       USER/DEVICE, or an id
    enclave      SHA-256 of its TLS key: the column of `leases list`
    measurement  MRENCLAVE, 64 hex digits
    instance     an id
    epoch        INSTANCE/NUMBER

    Running enclaves hear of it at once where they watch; at their next heartbeat anyway, which the policy's
    lease.heartbeat_tokens bounds. An instance's or an epoch's stored grant is kept: `instances remove` and `epochs
    retire` destroy it. `revocations lift` lets new releases through again.
    """
    with open_room(home) as room, room.decision("revoked") as trail, room.store.write() as db:
        named = revocations.subject_of(db, kind, subject)
        made, ended = revocations.revoke(db, kind, named, reason=reason, now=trail.now)
        trail.subject |= _audited(made) | {"detail": reason}
        room.audit.append(db, trail)
    one = "1 lease" if ended == 1 else f"{ended} leases"
    show(_document(made) | {"leases_ended": ended}, lambda: f"Revocation {made.number}: {kind} {named}; ended {one}")


@click.group("revocations")
def group() -> None:
    """What was revoked, and what still is."""


@group.command("list")
@click.option("--all", "lifted", is_flag=True, help="Also those that were lifted.")
@home_option
@json_option
def list_revocations(lifted: bool, home: Path | None) -> None:
    """The revocations that stand."""
    with open_room(home) as room, room.store.read() as db:
        found = revocations.everything(db, lifted=lifted)
    columns = ("number", "kind", "subject", "reason", "at", "lifted")
    rows = [
        (each.number, each.kind, each.subject, escape(each.reason), moment(each.at), moment(each.lifted_at) or "")
        for each in found
    ]
    show([_document(each) for each in found], lambda: table(columns, rows, empty="Nothing is revoked."))


@group.command("lift")
@click.argument("number", type=click.IntRange(1, 2**31 - 1))
@home_option
@json_option
def lift(number: int, home: Path | None) -> None:
    """Let new releases through that revocation NUMBER refuses. The leases that it ended stay ended."""
    with open_room(home) as room, room.decision("revocation_lifted") as trail, room.store.write() as db:
        lifted = revocations.lift(db, number, now=trail.now)
        trail.subject |= _audited(lifted)
        room.audit.append(db, trail)
    show(_document(lifted), lambda: f"Lifted revocation {number}: {lifted.kind} {lifted.subject}")


def _audited(made: Revocation) -> Subject:
    """What the audit log says of it, in the fields that it has for such a subject."""
    subject = Subject(kind=made.kind, revocation=made.number)
    if made.kind == "user":
        subject["user"] = made.subject
    elif made.kind == "device":
        subject["device"] = made.subject
    elif made.kind == "measurement":
        subject["measurement"] = bytes.fromhex(made.subject)
    elif made.kind in ("instance", "epoch"):
        instance, _, number = made.subject.partition("/")
        subject["instance"] = instance
        if number:
            subject["epoch"] = int(number)
    return subject


def _document(made: Revocation) -> dict[str, Any]:
    return {
        "number": made.number,
        "kind": made.kind,
        "subject": made.subject,
        "reason": made.reason,
        "at": moment(made.at),
        "lifted_at": moment(made.lifted_at),
    }
