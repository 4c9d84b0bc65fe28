"""Budgets: tokens a user may spend, debited in chunks before an enclave uses them.

A chunk that a crashed enclave did not use stays debited: an enclave keeps no state that could vouch for it.
"""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, select, update

from stip_keyservice.service import usage
from stip_keyservice.service.policy import Budgets
from stip_keyservice.service.state.schema import users


def debit(db: Connection, user: str, wanted: int, caps: Budgets, *, now: int) -> int:
    """Take at most `wanted` tokens from the user's budget; returns how many there were, 0 where it is spent.

    `caps` are the policy's, on what a user has been given, in all and on this day.

    Only inside `Store.write()`. The user's row stays locked to the end of the transaction (SQLite locks everything), so
    that two releases never spend one token; the table's own constraint would refuse it once more.
    """
    left, spent = (int(amount) for amount in db.execute(_LOCKED, {"id": user}).one())
    capped = caps.allowance(spent, usage.debited_on(db, user, now=now))
    taken = max(0, min(wanted, left) if capped is None else min(wanted, left, capped))
    if taken:
        db.execute(_DEBIT, {"of": user, "taken": taken})
    return taken


def remaining(db: Connection, user: str) -> int:
    """Tokens not debited yet."""
    return int(db.execute(_LEFT, {"id": user}).one()[0])


_LEFT = select(users.c.budget - users.c.spent, users.c.spent).where(users.c.id == bindparam("id"))
_LOCKED = _LEFT.with_for_update()
_DEBIT = update(users).where(users.c.id == bindparam("of")).values(spent=users.c.spent + bindparam("taken"))
