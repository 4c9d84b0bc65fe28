"""Usage: what each user's enclaves took and used, by day, for whoever pays and for whoever asks why a budget is gone.

`debited` counts when tokens leave the budget, `fed` when a heartbeat says that they went to a server. A chunk of an
enclave that crashed stays debited and is never fed: the difference over time is what crashes cost. What was fed after
the last heartbeat of a session shows in neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, bindparam, select

from stip_keyservice.service.state.schema import usage
from stip_keyservice.service.state.store import insert_of

DAY_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Usage:
    """One user and day. Amounts in tokens."""

    user: str
    day: int
    """Days since 1970-01-01, UTC."""
    debited: int
    fed: int
    """What enclaves said, in signed heartbeats."""
    leases: int
    """Issued."""
    renewals: int


def record(
    db: Connection, user: str, *, now: int, debited: int, fed: int = 0, leases: int = 0, renewals: int = 0
) -> None:
    """Add to the user's day, in the caller's transaction."""
    amounts = {"debited": debited, "fed": fed, "leases": leases, "renewals": renewals}
    db.execute(_addition(db.dialect.name), {"user": user, "day": now // DAY_SECONDS, **amounts})


def debited_on(db: Connection, user: str, *, now: int) -> int:
    """Tokens that left the user's budget on the day of `now` so far."""
    return db.execute(_TODAY, {"user": user, "day": now // DAY_SECONDS}).scalar() or 0


_TODAY = select(usage.c.debited).where(usage.c.user == bindparam("user"), usage.c.day == bindparam("day"))


@cache
def _addition(dialect: str) -> Any:
    """Built once a database: building a statement costs more than running it."""
    row = insert_of(dialect, usage)
    added = {name: usage.c[name] + row.excluded[name] for name in ("debited", "fed", "leases", "renewals")}
    return row.on_conflict_do_update(index_elements=["user", "day"], set_=added)


def of(db: Connection, user: str, *, since: int) -> Sequence[Usage]:
    """The user's days since that day, oldest first; days without any use have no row."""
    query = select(usage).where(usage.c.user == user, usage.c.day >= since).order_by(usage.c.day)
    return [Usage(**row._mapping) for row in db.execute(query)]
