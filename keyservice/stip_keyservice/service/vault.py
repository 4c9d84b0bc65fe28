"""Secrets at rest: envelope encryption.

    root key ─wraps─▶ data key of a domain ─wraps─▶ data key of an epoch ─seals─▶ the grant, the canaries
             ─wraps─────────────────────────────▶ (of a shared instance)

Which root key is the present one, the database says itself (`meta`, `root_key`): where another process rewrapped it, a
replica that still holds the former key asks its home again, or refuses to make keys that nobody would open.

A data key is 32 bytes; it and what it seals are AES-256-GCM (NIST SP 800-38D) with random nonces, bound by their
associated data to the subject of the key and to the row they belong to: the database alone opens nothing, and a row
moved elsewhere does not open either. Destroying a data key shreds everything below it, also in backups of the database
from before, as far as those are read with a root key that was rewrapped since.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from sqlalchemy import Connection, Row, bindparam, insert, select, update

from stip_keyservice.home import Home
from stip_keyservice.rootkey.envelope import KEY_BYTES, lock, unlock
from stip_keyservice.rootkey.ring import RootKey, wrapped_under
from stip_keyservice.service.state.schema import data_keys, meta
from stip_keyservice.service.state.store import insert_into
from stip_protocol import canonical
from stip_protocol.errors import IntegrityError

_ID = 16
_ROOT = "root_key"
"""Where `meta` says under which root key the top-level data keys are, by its id."""


class Vault:
    """The data keys of one store."""

    def __init__(self, root: RootKey) -> None:
        self._root = root

    def __repr__(self) -> str:
        return "Vault()"

    def make(self, db: Connection, subject: str, *, parent: bytes | None, now: int) -> bytes:
        """A fresh data key; returns its id."""
        identity, key = secrets.token_bytes(_ID), secrets.token_bytes(KEY_BYTES)
        context = _key_context(identity, subject)
        wrapped = self._top(db).wrap(key, context) if parent is None else lock(self._key(db, parent), key, context)
        db.execute(insert(data_keys).values(id=identity, subject=subject, parent=parent, wrapped=wrapped, made_at=now))
        return identity

    def find(self, db: Connection, subject: str) -> bytes | None:
        """The id of a subject's data key; None where it has none, or one that was destroyed."""
        query = select(data_keys.c.id).where(data_keys.c.subject == subject, data_keys.c.destroyed_at.is_(None))
        return db.execute(query).scalar()

    def destroy(self, db: Connection, identity: bytes, *, now: int) -> None:
        """Shred a data key, and with it everything it seals and wraps."""
        present = data_keys.c.id == identity, data_keys.c.destroyed_at.is_(None)
        db.execute(update(data_keys).where(*present).values(wrapped=None, destroyed_at=now))

    def root_id(self, db: Connection) -> bytes | None:
        """Under which root key the database says it is; None before it had a data key."""
        said = db.execute(select(meta.c.value).where(meta.c.key == _ROOT)).scalar()
        return None if said is None else bytes.fromhex(said)

    def rewrap(self, db: Connection, root: RootKey) -> int:
        """Put every top-level data key under another root key, and say so in the database; returns how many moved.

        Data keys below those stay as they are. In one transaction: there is no moment at which some have moved.
        """
        moved = [row for row in self._tops(db) if wrapped_under(row.wrapped) != root.id]
        for row in moved:
            context = _key_context(row.id, row.subject)
            wrapped = root.wrap(self._root.unwrap(row.wrapped, context), context)
            db.execute(update(data_keys).where(data_keys.c.id == row.id).values(wrapped=wrapped))
        self._say(db, root.id)
        return len(moved)

    def claim(self, db: Connection) -> None:
        """Say that the database is under this root key. Raises `IntegrityError` where it is under another one."""
        if self.root_id(db) is None:
            self._say(db, self._root.id)
        self._root.under(self.root_id(db) or b"")

    def everything(self, db: Connection) -> Sequence[Row[tuple[object, ...]]]:
        """The data keys that were not destroyed."""
        return db.execute(select(data_keys).where(data_keys.c.destroyed_at.is_(None))).all()

    def try_key(self, db: Connection, identity: bytes) -> None:
        """Raises `IntegrityError` where a data key does not open."""
        self._key(db, identity)

    def _tops(self, db: Connection) -> list[Row[tuple[object, ...]]]:
        return [row for row in self.everything(db) if row.parent is None]

    def _top(self, db: Connection) -> RootKey:
        """The root key for new top-level data keys: the one that the database is under."""
        self.claim(db)
        return self._root.under(self.root_id(db) or b"")

    def _say(self, db: Connection, identity: bytes) -> None:
        stored = insert_into(db, meta).values(key=_ROOT, value=identity.hex())
        db.execute(stored.on_conflict_do_update(index_elements=["key"], set_={"value": stored.excluded.value}))

    def replace(self, db: Connection, identity: bytes, *, now: int) -> None:
        """Put what a data key wraps under a fresh one of the same subject, and destroy it.

        A child that was destroyed stays so for whoever has a copy of its row from before and all that is here now.
        """
        old = self._key(db, identity)
        subject, parent = db.execute(
            select(data_keys.c.subject, data_keys.c.parent).where(data_keys.c.id == identity)
        ).one()
        self.destroy(db, identity, now=now)
        fresh = self.make(db, subject, parent=parent, now=now)
        for child in self.everything(db):
            if child.parent == identity:
                context = _key_context(child.id, child.subject)
                key = unlock(old, child.wrapped, context, "data key")
                moved = {"parent": fresh, "wrapped": lock(self._key(db, fresh), key, context)}
                db.execute(update(data_keys).where(data_keys.c.id == child.id).values(**moved))

    def seal(self, db: Connection, identity: bytes, plain: bytes, row: list[object]) -> bytes:
        """nonce ‖ ciphertext ‖ tag under a data key, bound to `row`: what names the place it is stored in."""
        return lock(self._key(db, identity), plain, canonical.encode(["stip/at-rest", *row]))

    def open(self, db: Connection, identity: bytes, sealed: bytes, row: list[object]) -> bytes:
        """What was sealed. Raises `IntegrityError` where it was altered, moved, or its key destroyed."""
        return unlock(self._key(db, identity), sealed, canonical.encode(["stip/at-rest", *row]), f"stored {row[0]}")

    def require_opens(self, db: Connection, identity: bytes) -> None:
        """Raises `IntegrityError` where a data key cannot be opened."""
        self._key(db, identity)

    def _key(self, db: Connection, identity: bytes) -> bytes:
        row = db.execute(_BY_ID, {"id": identity}).one_or_none()
        if row is None or row.wrapped is None:
            raise IntegrityError("data key: destroyed, or not of this database")
        context = _key_context(identity, row.subject)
        if row.parent is None:
            return self._root.unwrap(row.wrapped, context)
        return unlock(self._key(db, row.parent), row.wrapped, context, "data key")


_BY_ID = select(data_keys).where(data_keys.c.id == bindparam("id"))
"""Built once: every release asks it."""


def open_vault(home: Home) -> Vault:
    """The vault of a home, under the root key that the home has."""
    return Vault(home.root)


def _key_context(identity: bytes, subject: str) -> bytes:
    return canonical.encode(["stip/data-key", identity, subject])
