"""The schema of version 1, as it was released."""

from __future__ import annotations

from alembic import op
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

revision = "0001"
down_revision = None

Amount = BigInteger().with_variant(Integer(), "sqlite")
metadata = MetaData()

meta = Table("meta", metadata, Column("key", String, primary_key=True), Column("value", String, nullable=False))

users = Table(
    "users",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("public_key", LargeBinary, nullable=False, unique=True),
    Column("budget", Amount, nullable=False),
    Column("spent", Amount, nullable=False),
    Column("added_at", Amount, nullable=False),
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

instances = Table(
    "instances",
    metadata,
    Column("id", String, primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("preset", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("manifest_digest", LargeBinary, nullable=False),
    Column("sealed_grant", LargeBinary),
    Column("added_at", Amount, nullable=False),
    Column("removed_at", Amount),
    CheckConstraint("kind IN ('dedicated', 'shared')", name="known_kind"),
    CheckConstraint("(sealed_grant IS NULL) = (removed_at IS NOT NULL)", name="removed_means_shredded"),
)

members = Table(
    "members",
    metadata,
    Column("instance", ForeignKey("instances.id"), primary_key=True),
    Column("user", ForeignKey("users.id"), primary_key=True),
)

leakage_summaries = Table(
    "leakage_summaries",
    metadata,
    Column("instance", ForeignKey("instances.id"), primary_key=True),
    Column("summary", LargeBinary, nullable=False),
)
"""Added within version 1: there are databases without it."""

nonces = Table(
    "nonces",
    metadata,
    Column("nonce", LargeBinary, primary_key=True),
    Column("expires", Amount, nullable=False, index=True),
)

leases = Table(
    "leases",
    metadata,
    Column("handle", LargeBinary, primary_key=True),
    Column("user", ForeignKey("users.id"), nullable=False),
    Column("instance", ForeignKey("instances.id"), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("manifest_digest", LargeBinary, nullable=False),
    Column("audience", String, nullable=False),
    Column("link_key", LargeBinary, nullable=False),
    Column("delegated_until", Amount, nullable=False),
    Column("serial", Amount, nullable=False),
    Column("tokens", Amount, nullable=False),
    Column("fed", Amount, nullable=False),
    Column("not_before", Amount, nullable=False),
    Column("expires", Amount, nullable=False, index=True),
    Column("heartbeat", LargeBinary),
    Column("renewal", LargeBinary),
)

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


def upgrade() -> None:
    db = op.get_bind()
    metadata.create_all(db)
    db.execute(meta.insert().values(key="schema_version", value="1"))
