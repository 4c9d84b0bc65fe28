"""Budgets: tokens a user may spend, debited in chunks before an enclave uses them.

A chunk that a crashed enclave did not use stays debited: an enclave keeps no state that could vouch for it.
"""

from __future__ import annotations

from sqlalchemy import Connection, select, update

from stip_keyservice.service.state.schema import users


def debit(db: Connection, user: str, wanted: int) -> int:
    """Take at most `wanted` tokens from the user's budget; returns how many there were, 0 where it is spent.

    Only inside `Store.write()`: the exclusive transaction is what keeps two releases from overspending, and the
    table's own constraint would refuse it once more.
    """
    left = remaining(db, user)
    taken = max(0, min(wanted, left))
    if taken:
        db.execute(update(users).where(users.c.id == user).values(spent=users.c.spent + taken))
    return taken


def remaining(db: Connection, user: str) -> int:
    """Tokens not debited yet."""
    return int(db.execute(select(users.c.budget - users.c.spent).where(users.c.id == user)).scalar_one())
