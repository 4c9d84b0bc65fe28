"""Devices and domains of users, epochs of instances, data keys under the root key, challenges that are not stored.

A user's key becomes their first device, and each user a domain of their own. An instance becomes its one epoch; a
dedicated one belongs to its user's domain. Grants move from under the storage key to data keys. Leases and nonces are
dropped: what leases must say now (the evidence they were issued on, the enclave's TLS key) nobody wrote down then, so
running enclaves attest again. The audit log stays as it is, byte for byte.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from alembic import context, op
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    inspect,
)

from stip_keyservice.rootkey.envelope import KEY_BYTES, lock
from stip_keyservice.service.state.migrations import Secrets
from stip_keyservice.service.state.migrations.versions import revision_0001 as before
from stip_protocol import canonical
from stip_protocol.errors import ConfigurationError, IntegrityError

revision = "0002"
down_revision = "0001"

Amount = BigInteger().with_variant(Integer(), "sqlite")
"""Seconds and tokens: up to 2⁴⁰. SQLite's INTEGER has 64 bits, and only that makes a primary key of its own."""

metadata = MetaData()

users = Table(
    "users",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("domain", String, nullable=False),
    Column("budget", Amount, nullable=False),
    Column("spent", Amount, nullable=False),
    Column("added_at", Amount, nullable=False),
    Column("disabled_at", Amount),
    Column("removed_at", Amount),
    CheckConstraint("spent >= 0 AND spent <= budget", name="never_overspent"),
)
Index(
    "one_user_of_a_name",
    users.c.name,
    unique=True,
    sqlite_where=users.c.removed_at.is_(None),
    postgresql_where=users.c.removed_at.is_(None),
)

devices = Table(
    "devices",
    metadata,
    Column("id", String, primary_key=True),
    Column("user", ForeignKey("users.id"), nullable=False, index=True),
    Column("name", String, nullable=False),
    Column("public_key", LargeBinary, nullable=False, unique=True),
    Column("added_at", Amount, nullable=False),
    Column("removed_at", Amount),
)
Index(
    "one_device_of_a_name",
    devices.c.user,
    devices.c.name,
    unique=True,
    sqlite_where=devices.c.removed_at.is_(None),
    postgresql_where=devices.c.removed_at.is_(None),
)

data_keys = Table(
    "data_keys",
    metadata,
    Column("id", LargeBinary, primary_key=True),
    Column("subject", String, nullable=False),
    Column("parent", ForeignKey("data_keys.id")),
    Column("wrapped", LargeBinary),
    Column("made_at", Amount, nullable=False),
    Column("destroyed_at", Amount),
    CheckConstraint("(wrapped IS NULL) = (destroyed_at IS NOT NULL)", name="destroyed_means_gone"),
)
Index(
    "one_data_key_of_a_subject",
    data_keys.c.subject,
    unique=True,
    sqlite_where=data_keys.c.destroyed_at.is_(None),
    postgresql_where=data_keys.c.destroyed_at.is_(None),
)
"""`subject`: what it is the key of, `domain/<domain>` or `epoch/<instance>/<number>`. `parent`: the data key that wraps
it; without one the root key does."""

instances = Table(
    "instances",
    metadata,
    Column("id", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("domain", String),
    Column("added_at", Amount, nullable=False),
    CheckConstraint("kind IN ('dedicated', 'shared')", name="known_kind"),
    CheckConstraint("(kind = 'dedicated') = (domain IS NOT NULL)", name="dedicated_means_to_a_domain"),
)
"""`domain`: of a dedicated instance, the trust domain whose users may have it."""

epochs = Table(
    "epochs",
    metadata,
    Column("instance", ForeignKey("instances.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("state", String, nullable=False),
    Column("preset", String, nullable=False),
    Column("manifest_digest", LargeBinary, nullable=False),
    Column("added_at", Amount, nullable=False),
    Column("drain_until", Amount),
    Column("removed_at", Amount),
    CheckConstraint("state IN ('standby', 'active', 'draining', 'removed')", name="known_state"),
    CheckConstraint("(state = 'removed') = (removed_at IS NOT NULL)", name="removed_has_a_time"),
)
Index(
    "one_active_epoch",
    epochs.c.instance,
    unique=True,
    sqlite_where=epochs.c.state == "active",
    postgresql_where=epochs.c.state == "active",
)

grants = Table(
    "grants",
    metadata,
    Column("instance", String, primary_key=True),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("data_key", ForeignKey("data_keys.id"), nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    ForeignKeyConstraint(["instance", "epoch"], ["epochs.instance", "epochs.number"]),
)

leakage_summaries = Table(
    "leakage_summaries",
    metadata,
    Column("instance", String, primary_key=True),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("summary", LargeBinary, nullable=False),
    ForeignKeyConstraint(["instance", "epoch"], ["epochs.instance", "epochs.number"]),
)
"""What the signed manifest says an audit measured, as JSON; no row where the epoch was not audited."""

canaries = Table(
    "canaries",
    metadata,
    Column("instance", String, primary_key=True),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("sealed", LargeBinary, nullable=False),
    ForeignKeyConstraint(["instance", "epoch"], ["epochs.instance", "epochs.number"]),
)
"""Canaries that were not drawn yet: whoever draws one deletes its row."""

members = Table(
    "members",
    metadata,
    Column("instance", ForeignKey("instances.id"), primary_key=True),
    Column("user", ForeignKey("users.id"), primary_key=True),
)
"""Who may use a shared instance. A dedicated one is for the users of its domain."""

spent_nonces = Table(
    "spent_nonces",
    metadata,
    Column("nonce", LargeBinary, primary_key=True),
    Column("expires", Amount, nullable=False, index=True),
)

leases = Table(
    "leases",
    metadata,
    Column("handle", LargeBinary, primary_key=True),
    Column("user", ForeignKey("users.id"), nullable=False, index=True),
    Column("device", ForeignKey("devices.id"), nullable=False),
    Column("instance", ForeignKey("instances.id"), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("manifest_digest", LargeBinary, nullable=False),
    Column("audience", String, nullable=False),
    Column("link_key", LargeBinary, nullable=False),
    Column("link_key_digest", LargeBinary, nullable=False, index=True),
    Column("tls_key", LargeBinary, nullable=False),
    Column("enclave", LargeBinary, nullable=False),
    Column("delegated_until", Amount, nullable=False),
    Column("serial", Amount, nullable=False),
    Column("tokens", Amount, nullable=False),
    Column("fed", Amount, nullable=False),
    Column("not_before", Amount, nullable=False),
    Column("expires", Amount, nullable=False, index=True),
    Column("revoked", Integer),
    Column("heartbeat", LargeBinary),
    Column("renewal", LargeBinary),
)
"""`tls_key`: SHA-256 of the enclave's RA-TLS key, by which an enclave is revoked. `enclave`: what its evidence
established (`stip_keyservice.service.release.EnclaveFacts`), so that a renewal is held against the policy of its own
time. `revoked`: the revocation that ended the lease."""

revocations = Table(
    "revocations",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("at", Amount, nullable=False),
    Column("lifted_at", Amount),
    CheckConstraint("kind IN ('user', 'device', 'enclave', 'measurement', 'instance', 'epoch')", name="known_kind"),
)
"""In the order they were made. `subject`: a user's or a device's id, the hex of an enclave's TLS key digest or
measurement, an instance id, or `<instance>/<epoch>`."""

usage = Table(
    "usage",
    metadata,
    Column("user", ForeignKey("users.id"), primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("debited", Amount, nullable=False),
    Column("fed", Amount, nullable=False),
    Column("leases", Amount, nullable=False),
    Column("renewals", Amount, nullable=False),
)
"""By user and day (Unix days, UTC): tokens debited in chunks, tokens that enclaves said they fed, and how often."""


Rows = Sequence[Mapping[Any, Any]]


def upgrade() -> None:
    db = op.get_bind()
    present = set(inspect(db).get_table_names())
    gone = [table for table in reversed(before.metadata.sorted_tables) if table.name in present - KEPT]
    old = {table.name: db.execute(table.select()).mappings().all() for table in gone}
    for table in gone:
        table.drop(db)
    metadata.create_all(db)
    _carry_users(db, old["users"])
    _carry_instances(db, old, context.config.attributes["secrets"])
    db.execute(before.meta.update().where(before.meta.c.key == "schema_version").values(value="2"))


KEPT = {"meta", "audit", "audit_head"}


def _carry_users(db: Connection, old: Rows) -> None:
    for user in old:
        fields = {name: user[name] for name in ("id", "name", "budget", "spent", "added_at", "removed_at")}
        db.execute(users.insert().values(**fields, domain=_domain_of(user["id"])))
        device = {name: user[name] for name in ("public_key", "added_at", "removed_at")}
        db.execute(devices.insert().values(**device, id=secrets.token_hex(16), user=user["id"], name="first"))


def _carry_instances(db: Connection, old: Mapping[str, Rows], given: Secrets | None) -> None:
    allowed: dict[str, list[str]] = {}
    for member in old["members"]:
        allowed.setdefault(member["instance"], []).append(member["user"])
    domain_keys: dict[str, tuple[bytes, bytes]] = {}
    for one in old["instances"]:
        of = allowed.get(one["id"], [])
        domain = None
        if one["kind"] == "dedicated":
            if len(of) != 1:
                raise IntegrityError.because("state: users of a dedicated instance", len(of), "1")
            domain = _domain_of(of[0])
        fields = {"id": one["id"], "kind": one["kind"], "domain": domain, "added_at": one["added_at"]}
        db.execute(instances.insert().values(**fields))
        _carry_epoch(db, one)
        if domain is None:
            for user in of:
                db.execute(members.insert().values(instance=one["id"], user=user))
        if one["sealed_grant"] is not None:
            _carry_grant(db, one, domain, domain_keys, given)
    for row in old.get("leakage_summaries", []):
        (epoch,) = [one["epoch"] for one in old["instances"] if one["id"] == row["instance"]]
        db.execute(leakage_summaries.insert().values(**row, epoch=epoch))


def _carry_epoch(db: Connection, one: Mapping[Any, Any]) -> None:
    fields = {name: one[name] for name in ("preset", "manifest_digest", "added_at", "removed_at")}
    state = "active" if one["removed_at"] is None else "removed"
    db.execute(epochs.insert().values(**fields, instance=one["id"], number=one["epoch"], state=state))


def _carry_grant(
    db: Connection,
    one: Mapping[Any, Any],
    domain: str | None,
    domain_keys: dict[str, tuple[bytes, bytes]],
    given: Secrets | None,
) -> None:
    if given is None or given.storage_key is None:
        raise ConfigurationError("storage.key: missing from the home, and it opens this database's grants")
    where = one["id"], one["epoch"]
    try:
        sealed, bound = one["sealed_grant"], canonical.encode(["stip/grant-at-rest", *where])
        grant = AESGCM(given.storage_key).decrypt(sealed[:12], sealed[12:], bound)
    except (InvalidTag, ValueError):
        raise IntegrityError("stored grant: altered, moved, or under another storage key") from None
    at = one["added_at"]
    if domain is not None and domain not in domain_keys:
        domain_keys[domain] = _data_key(db, f"domain/{domain}", None, given, at)
    parent = None if domain is None else domain_keys[domain]
    data_key, key = _data_key(db, f"epoch/{where[0]}/{where[1]}", parent, given, at)
    again = lock(key, grant, canonical.encode(["stip/at-rest", "grant", *where]))
    db.execute(grants.insert().values(instance=where[0], epoch=where[1], data_key=data_key, sealed=again))


def _data_key(
    db: Connection, subject: str, parent: tuple[bytes, bytes] | None, given: Secrets, at: int
) -> tuple[bytes, bytes]:
    """A fresh data key in the form that it had at this revision: its id, and the key."""
    identity, key = secrets.token_bytes(16), secrets.token_bytes(KEY_BYTES)
    bound = canonical.encode(["stip/data-key", identity, subject])
    wrapped = given.root.wrap(key, bound) if parent is None else lock(parent[1], key, bound)
    above = None if parent is None else parent[0]
    db.execute(data_keys.insert().values(id=identity, subject=subject, parent=above, wrapped=wrapped, made_at=at))
    return identity, key


def _domain_of(user: str) -> str:
    return f"user/{user}"
