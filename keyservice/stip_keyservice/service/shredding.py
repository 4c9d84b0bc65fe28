"""Crypto-shredding: what was kept of a user or an instance cannot be opened any more.

Afterwards `Store.forget()` clears what the database's own files still hold, and says what it cannot. Backups from
before hold names and wrapped keys; what such a key sealed opens only with a root key that was not rewrapped since.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Row, delete

from stip_keyservice.service import instances, users
from stip_keyservice.service.instances import Instance
from stip_keyservice.service.state.schema import members
from stip_keyservice.service.users import User
from stip_keyservice.service.vault import Vault


def shred_user(db: Connection, vault: Vault, user: User, *, now: int) -> User:
    """Remove a user for good and forget their names.

    Where the user is a trust domain of their own, its data key is destroyed, and with it every grant of the instances
    that were dedicated to them. What stays: random ids in the audit log, in leases and in the days of usage, and the
    public keys of their devices, which are refused for good; of a shared domain, its name and its instances.
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


def shred_instance(db: Connection, vault: Vault, instance: str, *, now: int) -> Instance:
    """Remove an instance, removed before or not, and destroy its data keys.

    The key of its domain is replaced, which wrapped them: whoever has a backup from before *and* the present database
    would else unwrap the backup's rows by today's key. Backups themselves open until the root key is rewrapped; the
    instance's `secrets.sealed` opens as long as it and the home's sealing key exist. Raises `InstanceRefused`.
    """
    found = instances.by_id(db, instance)
    parents = {row.parent for row in _keys(db, vault, instance)}
    if not found.removed:
        instances.remove(db, vault, instance, now=now)
    for row in _keys(db, vault, instance):
        vault.destroy(db, row.id, now=now)
    if found.domain is not None:
        parents.add(vault.find(db, f"domain/{found.domain}"))
    for parent in parents - {None}:
        vault.replace(db, parent, now=now)
    db.execute(delete(members).where(members.c.instance == instance))
    return instances.by_id(db, instance)


def _keys(db: Connection, vault: Vault, instance: str) -> Sequence[Row[tuple[object, ...]]]:
    return [row for row in vault.everything(db) if row.subject.startswith(f"epoch/{instance}/")]
