"""Crypto-shredding of an instance: nothing that was kept of it can be opened any more."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Row, delete

from stip_keyservice.service import instances
from stip_keyservice.service.instances import Instance
from stip_keyservice.service.state.schema import members
from stip_keyservice.service.vault import Vault


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
