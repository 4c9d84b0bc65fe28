"""Users: data owners by their Ed25519 public key, with a budget and the instances they may use."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from sqlalchemy import Connection, Row, insert, select, update

from stip_keyservice.service.store import members, users
from stip_protocol.errors import ConfigurationError, UserRefused

BUDGET_LIMIT = 2**40
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
KEY_TEXT_LIMIT = 4096


@dataclass(frozen=True)
class User:
    """One user as registered. `id` is random: the audit log and leases use it, no metric does."""

    id: str
    name: str
    public_key: bytes
    """Ed25519, raw, 32 bytes."""
    budget: int
    """Tokens."""
    spent: int
    """Tokens debited so far, in chunks."""
    added_at: int
    removed_at: int | None
    instances: tuple[str, ...]
    """Instances of which the user is a member."""


def parse_public_key(text: bytes) -> bytes:
    """The raw key in 64 hex digits or a PEM SubjectPublicKeyInfo. Raises `ConfigurationError`."""
    if len(text) > KEY_TEXT_LIMIT:
        raise ConfigurationError.because("public key", f"{len(text)} bytes", f"at most {KEY_TEXT_LIMIT}")
    stripped = text.strip()
    if re.fullmatch(rb"[0-9a-fA-F]{64}", stripped):
        return bytes.fromhex(stripped.decode())
    try:
        key = load_pem_public_key(stripped)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigurationError.because("public key", "something else", "Ed25519 as 64 hex digits or PEM")
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def add(db: Connection, name: str, public_key: bytes, *, budget: int, now: int) -> User:
    """Register a user. Raises `UserRefused` where the name is taken or the key was ever registered."""
    if not NAME.fullmatch(name):
        raise ConfigurationError.because("user name", ascii(name)[:80], NAME.pattern)
    _check_budget(budget, at_least=0)
    if db.execute(select(users.c.id).where(users.c.name == name, users.c.removed_at.is_(None))).first():
        raise UserRefused("user name: taken; remove that user first or choose another name", field="name")
    known = db.execute(select(users.c.removed_at).where(users.c.public_key == public_key)).first()
    if known is not None:
        state = "a registered key" if known.removed_at is None else "the key of a removed user"
        raise UserRefused.because("public key", state, "a key that was never registered")
    user = secrets.token_hex(16)
    db.execute(insert(users).values(id=user, name=name, public_key=public_key, budget=budget, spent=0, added_at=now))
    return by_id(db, user)


def remove(db: Connection, name: str, *, now: int) -> User:
    """Refuse the user from now on: no release, and no renewal of any running lease. Raises `UserRefused`."""
    user = by_name(db, name)
    db.execute(update(users).where(users.c.id == user.id).values(removed_at=now))
    return by_id(db, user.id)


def set_budget(db: Connection, name: str, budget: int) -> User:
    """Set the total a user may ever spend. Raises `ConfigurationError` below what was spent."""
    user = by_name(db, name)
    _check_budget(budget, at_least=user.spent)
    db.execute(update(users).where(users.c.id == user.id).values(budget=budget))
    return by_id(db, user.id)


def by_name(db: Connection, name: str) -> User:
    """The present user of that name. Raises `UserRefused`."""
    row = db.execute(select(users).where(users.c.name == name, users.c.removed_at.is_(None))).first()
    if row is None:
        raise UserRefused("user name: no such user; see `stip-keyservice users list`", field="name")
    return _user(db, row)


def by_id(db: Connection, user: str) -> User:
    """The user of a known id, removed or not."""
    return _user(db, db.execute(select(users).where(users.c.id == user)).one())


def by_key(db: Connection, public_key: bytes) -> User | None:
    """The user of that key, removed or not; None where it was never registered."""
    row = db.execute(select(users).where(users.c.public_key == public_key)).first()
    return None if row is None else _user(db, row)


def everyone(db: Connection, *, removed: bool = False) -> Sequence[User]:
    """All present users by name; with `removed`, also those who were removed."""
    query = select(users).order_by(users.c.name, users.c.added_at)
    rows = db.execute(query if removed else query.where(users.c.removed_at.is_(None))).all()
    return [_user(db, row) for row in rows]


def _check_budget(budget: int, *, at_least: int) -> None:
    if not at_least <= budget <= BUDGET_LIMIT:
        raise ConfigurationError.because("budget", budget, f"{at_least} to {BUDGET_LIMIT} tokens")


def _user(db: Connection, row: Row[tuple[object, ...]]) -> User:
    allowed = db.execute(select(members.c.instance).where(members.c.user == row.id).order_by(members.c.instance))
    return User(**row._mapping, instances=tuple(allowed.scalars()))
