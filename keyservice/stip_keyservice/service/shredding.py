"""Crypto-shredding of a user: they are refused from now on, and what was kept of theirs cannot be read any more.

What stays: random ids in the audit log, in leases and in the days of usage, and the public keys of their devices, which
are refused for good. Backups from before hold the names and the wrapped keys; what such a key sealed opens only with a
root key that was not rewrapped since.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete

from stip_keyservice.service import instances, users
from stip_keyservice.service.state.schema import members
from stip_keyservice.service.users import User
from stip_keyservice.service.vault import Vault


def shred_user(db: Connection, vault: Vault, user: User, *, now: int) -> User:
    """Remove a user for good and forget their names.

    Where the user is a trust domain of their own, its data key is destroyed, and with it every grant of the instances
    that were dedicated to them. Afterwards `Store.forget()` clears what the database's own log still holds.
    """
    if user.removed_at is None:
        users.remove(db, user.name, now=now)
    db.execute(delete(members).where(members.c.user == user.id))
    if user.domain == users.own_domain(user.id):
        for instance in instances.of_domain(db, user.domain):
            instances.remove(db, vault, instance.id, now=now)
        key = vault.find(db, instances.domain_subject(user.domain))
        if key is not None:
            vault.destroy(db, key, now=now)
    return users.pseudonymise(db, user)
