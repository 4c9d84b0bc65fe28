"""What ends a lease, or supersedes it: one table, for whoever watches and for whoever lists.

Every condition but the last is a matter of the state, whichever process changed it. Time ends a lease on both sides
without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, case, or_, select

from stip_keyservice.service.release import EnclaveFacts
from stip_keyservice.service.state.schema import devices, epochs, instances, leases, members, users

JOINED = (
    leases.join(users, users.c.id == leases.c.user)
    .join(devices, devices.c.id == leases.c.device)
    .join(instances, instances.c.id == leases.c.instance)
    .join(epochs, and_(epochs.c.instance == leases.c.instance, epochs.c.number == leases.c.epoch))
    .outerjoin(members, and_(members.c.instance == leases.c.instance, members.c.user == leases.c.user))
)
"""Leases with everything that they were issued on."""
DRAINING = epochs.c.state == "draining"
RUNNING, SUPERSEDED, EXPIRED = "running", "superseded", "expired"


def endings(now: int) -> dict[str, ColumnElement[bool]]:
    """By its name, each condition that ended a lease of `JOINED`. The first that holds is the one to name.

    None is ever NULL: what negates them must not lose rows.
    """
    return {
        "revoked": leases.c.revoked.is_not(None),
        "user removed": users.c.removed_at.is_not(None),
        "user disabled": users.c.disabled_at.is_not(None),
        "device removed": devices.c.removed_at.is_not(None),
        "user disallowed": and_(instances.c.kind == "shared", members.c.user.is_(None)),
        "epoch removed": epochs.c.state == "removed",
        "epoch drained": and_(DRAINING, epochs.c.drain_until.is_not(None), epochs.c.drain_until <= now),
    }


def ended(now: int) -> ColumnElement[bool]:
    """Whether any of `endings` holds."""
    return or_(*endings(now).values())


@dataclass(frozen=True)
class ListedLease:
    """A lease for people to look at."""

    handle: bytes
    user: str
    """Name."""
    device: str
    """Name."""
    instance: str
    epoch: int
    enclave: bytes
    """SHA-256 of its RA-TLS key: how `revoke enclave` names it."""
    facts: EnclaveFacts
    serial: int
    tokens: int
    fed: int
    not_before: int
    expires: int
    revocation: int | None
    state: str
    """What ended it, or `running`, `superseded` (its epoch drains), `expired`."""


def listed(
    db: Connection,
    *,
    now: int,
    limit: int,
    user: str | None = None,
    instance: str | None = None,
    enclave: bytes | None = None,
    ended_too: bool = False,
) -> Sequence[ListedLease]:
    """The newest `limit` leases on record, newest first, of a user (by id), an instance, an enclave."""
    state = case(
        *((condition, name) for name, condition in endings(now).items()),
        (leases.c.expires <= now, EXPIRED),
        (DRAINING, SUPERSEDED),
        else_=RUNNING,
    )
    query = select(leases, users.c.name, devices.c.name.label("device_name"), state.label("state"))
    query = query.select_from(JOINED).order_by(leases.c.not_before.desc(), leases.c.handle).limit(limit)
    for column, wanted in ((leases.c.user, user), (leases.c.instance, instance), (leases.c.tls_key, enclave)):
        if wanted is not None:
            query = query.where(column == wanted)
    if not ended_too:
        query = query.where(~ended(now), leases.c.expires > now)
    return [
        ListedLease(
            handle=row.handle,
            user=row.name,
            device=row.device_name,
            instance=row.instance,
            epoch=row.epoch,
            enclave=row.tls_key,
            facts=EnclaveFacts.from_bytes(row.enclave),
            serial=row.serial,
            tokens=row.tokens,
            fed=row.fed,
            not_before=row.not_before,
            expires=row.expires,
            revocation=row.revoked,
            state=row.state,
        )
        for row in db.execute(query)
    ]
