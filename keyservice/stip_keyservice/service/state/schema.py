"""The tables. Times are Unix seconds, amounts are tokens (rows of the residual stream fed to a server).

    users ─┬─ devices                keys that may sign for a user
           ├─ members ── instances   trust domains: who may use which
           └─ leases                 what an enclave runs under
    instances ── epochs ─┬─ grants   what opens an epoch, sealed under a data key
                         ├─ canaries
                         └─ leakage_summaries
    data_keys                        keys of secrets at rest, wrapped by the root key or by another data key
    revocations                      what running enclaves must hear of
    audit, audit_head                every decision

Whatever is secret here is sealed under a data key; the root key is never in the database. A row that is removed for
good leaves its data key destroyed: what backups still hold of it cannot be opened (crypto-shredding).
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

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

audit = Table(
    "audit",
    metadata,
    Column("sequence", Amount, primary_key=True, autoincrement=False),
    Column("entry", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("signed", LargeBinary, nullable=False),
    CheckConstraint("one = 1", name="single_row"),
)

meta = Table(
    "meta",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
)
