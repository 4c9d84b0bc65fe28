"""Users: data owners with a budget, and the devices whose keys may sign for them.

A trust domain is a name that users share who accept to be readable by each other; a user who is given none is a domain
of their own. A dedicated instance belongs to a domain.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from sqlalchemy import Connection, Row, bindparam, insert, select, union, update

from stip_keyservice.service.state.schema import devices, instances, members, users
from stip_protocol.errors import ConfigurationError, UserRefused

BUDGET_LIMIT = 2**40
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
"""Of a user, a device or a domain."""
KEY_TEXT_LIMIT = 4096
RESERVED = re.compile(r"[0-9a-f]{32}|shredded-.*")
"""What no user is called: it would be taken for another one's id, or for one who was shredded."""
FIRST_DEVICE = "first"
"""What a device is called that came with its user."""


@dataclass(frozen=True)
class Device:
    """One key that may sign delegations for its user. `id` is random: the audit log uses it."""

    id: str
    user: str
    name: str
    public_key: bytes
    """Ed25519, raw, 32 bytes."""
    added_at: int
    removed_at: int | None


@dataclass(frozen=True)
class User:
    """One user as registered. `id` is random: the audit log and leases use it, no metric does."""

    id: str
    name: str
    domain: str
    budget: int
    """Tokens."""
    spent: int
    """Tokens debited so far, in chunks."""
    added_at: int
    disabled_at: int | None
    """Refused while it is set."""
    removed_at: int | None
    devices: tuple[Device, ...]
    """Those that may sign now, oldest first."""
    instances: tuple[str, ...]
    """Instances the user may use: shared ones that list them, and those dedicated to their domain."""


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


def add(
    db: Connection,
    name: str,
    public_key: bytes,
    *,
    budget: int,
    now: int,
    domain: str | None = None,
    device: str = FIRST_DEVICE,
) -> User:
    """Register a user with a first device. Without `domain` they are a domain of their own.

    Raises `UserRefused` where the name is taken or the key was ever registered, `ConfigurationError` for a name or a
    budget that is not allowed.
    """
    _check_name("user name", name)
    if RESERVED.fullmatch(name):
        raise ConfigurationError.because("user name", name, "one that cannot be taken for a user's id")
    _check_name("device name", device)
    _check_budget(budget, at_least=0)
    if domain is not None:
        require_domain(domain)
    if db.execute(select(users.c.id).where(users.c.name == name, users.c.removed_at.is_(None))).first():
        raise UserRefused("user name: taken; remove that user first or choose another name", field="name")
    user = secrets.token_hex(16)
    added = {"id": user, "name": name, "domain": domain or own_domain(user), "budget": budget, "spent": 0}
    db.execute(insert(users).values(**added, added_at=now))
    add_device(db, by_id(db, user), device, public_key, now=now)
    return by_id(db, user)


def add_device(db: Connection, user: User, name: str, public_key: bytes, *, now: int) -> Device:
    """Let another key sign for `user`. Raises `UserRefused` where the key was ever registered or the name is taken."""
    _check_name("device name", name)
    known = db.execute(select(devices.c.removed_at).where(devices.c.public_key == public_key)).first()
    if known is not None:
        state = "a registered key" if known.removed_at is None else "the key of a removed device"
        raise UserRefused.because("public key", state, "a key that was never registered")
    if any(device.name == name for device in user.devices):
        raise UserRefused("device name: taken; remove that device first or choose another name", field="name")
    device = Device(secrets.token_hex(16), user.id, name, public_key, now, None)
    db.execute(insert(devices).values(**vars(device)))
    return device


def remove_device(db: Connection, user: User, name: str, *, now: int) -> Device:
    """Refuse what the device signs from now on. Raises `UserRefused` where the user has none of that name."""
    found = find_device(db, user, name)
    if found.removed_at is not None:
        raise UserRefused.because("device", "one that was removed", _names(user))
    db.execute(update(devices).where(devices.c.id == found.id).values(removed_at=now))
    return found


def find_device(db: Connection, user: User, name: str) -> Device:
    """The user's device of that name: the present one, or else the one removed last. Raises `UserRefused`."""
    named = select(devices).where(devices.c.user == user.id, devices.c.name == name)
    rows = db.execute(named.order_by(devices.c.removed_at.is_(None).desc(), devices.c.removed_at.desc())).first()
    if rows is None:
        raise UserRefused.because("device", "no such device", _names(user))
    return Device(**rows._mapping)


def rotate_device(db: Connection, user: User, name: str, public_key: bytes, *, now: int) -> Device:
    """Replace a device's key by a new one: what the old one signed is refused from now on. Raises `UserRefused`."""
    remove_device(db, user, name, now=now)
    return add_device(db, by_id(db, user.id), name, public_key, now=now)


def remove(db: Connection, name: str, *, now: int) -> User:
    """Refuse the user from now on: no release, and no renewal of any running lease. Raises `UserRefused`."""
    user = by_name(db, name)
    db.execute(update(users).where(users.c.id == user.id).values(removed_at=now))
    db.execute(update(devices).where(devices.c.user == user.id, devices.c.removed_at.is_(None)).values(removed_at=now))
    return by_id(db, user.id)


def disable(db: Connection, name: str, *, now: int) -> User:
    """Refuse the user until `enable`. Raises `UserRefused`."""
    user = by_name(db, name)
    db.execute(update(users).where(users.c.id == user.id, users.c.disabled_at.is_(None)).values(disabled_at=now))
    return by_id(db, user.id)


def enable(db: Connection, name: str) -> User:
    """Accept a disabled user again. Raises `UserRefused`."""
    user = by_name(db, name)
    db.execute(update(users).where(users.c.id == user.id).values(disabled_at=None))
    return by_id(db, user.id)


def set_budget(db: Connection, name: str, budget: int) -> User:
    """Set the total a user may ever spend. Raises `ConfigurationError` below what was spent, `UserRefused`."""
    user = by_name(db, name)
    _check_budget(budget, at_least=user.spent)
    db.execute(update(users).where(users.c.id == user.id).values(budget=budget))
    return by_id(db, user.id)


def pseudonymise(db: Connection, user: User) -> User:
    """Replace the names of a removed user and of their devices by what their random ids say."""
    db.execute(update(users).where(users.c.id == user.id).values(name=f"shredded-{user.id}"))
    for identity in db.execute(select(devices.c.id).where(devices.c.user == user.id)).scalars().all():
        db.execute(update(devices).where(devices.c.id == identity).values(name=f"shredded-{identity}"))
    return by_id(db, user.id)


def own_domain(user: str) -> str:
    """The trust domain of a user (by id) who shares none. No name that anybody may choose looks like it."""
    return f"user/{user}"


def require_domain(name: str) -> str:
    """A domain's name that an operator chose. Raises `ConfigurationError`."""
    _check_name("domain", name)
    return name


def by_name(db: Connection, name: str) -> User:
    """The present user of that name. Raises `UserRefused`."""
    row = db.execute(select(users).where(users.c.name == name, users.c.removed_at.is_(None))).first()
    if row is None:
        raise UserRefused("user name: no such user; see `stip-keyservice users list`", field="name")
    return _user(db, row)


def last_of(db: Connection, name_or_id: str) -> User:
    """The present user of that name, or the one of that id, removed or not. Raises `UserRefused`."""
    row = db.execute(select(users).where(users.c.id == name_or_id)).first()
    return by_name(db, name_or_id) if row is None else _user(db, row)


def by_id(db: Connection, user: str) -> User:
    """The user of a known id, removed or not."""
    return _user(db, db.execute(_BY_ID, {"id": user}).one())


def by_key(db: Connection, public_key: bytes) -> tuple[User, Device] | None:
    """Whose key that is, and of which device, removed or not; None where it was never registered."""
    row = db.execute(_BY_KEY, {"key": public_key}).first()
    return None if row is None else (by_id(db, row.user), Device(**row._mapping))


def device(db: Connection, identity: str) -> Device:
    """The device of a known id, removed or not."""
    return Device(**db.execute(_DEVICE, {"id": identity}).one()._mapping)


def known_device(db: Connection, identity: str) -> Device:
    """The device of an id that somebody typed. Raises `UserRefused`."""
    row = db.execute(select(devices).where(devices.c.id == identity)).first()
    if row is None:
        raise UserRefused(
            "device: no such device; name it USER/DEVICE, see `stip-keyservice users list`", field="device"
        )
    return Device(**row._mapping)


def devices_of(db: Connection, user: User) -> Sequence[Device]:
    """All devices of a user, removed ones included, oldest first."""
    query = select(devices).where(devices.c.user == user.id).order_by(devices.c.added_at, devices.c.name)
    return [Device(**row._mapping) for row in db.execute(query)]


def everyone(db: Connection, *, removed: bool = False) -> Sequence[User]:
    """All present users by name; with `removed`, also those who were removed."""
    query = select(users).order_by(users.c.name, users.c.added_at)
    rows = db.execute(query if removed else query.where(users.c.removed_at.is_(None))).all()
    return [_user(db, row) for row in rows]


def _names(user: User) -> str:
    return "; ".join(one.name for one in user.devices) or "none"


def _check_name(field: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigurationError.because(field, ascii(name)[:80], NAME.pattern)


def _check_budget(budget: int, *, at_least: int) -> None:
    if not at_least <= budget <= BUDGET_LIMIT:
        raise ConfigurationError.because("budget", budget, f"{at_least} to {BUDGET_LIMIT} tokens")


def _user(db: Connection, row: Row[tuple[object, ...]]) -> User:
    allowed = db.execute(_ALLOWED, {"user": row.id, "domain": row.domain}).scalars()
    return User(
        **row._mapping,
        devices=tuple(Device(**one._mapping) for one in db.execute(_SIGNING, {"user": row.id})),
        instances=tuple(sorted(allowed)),
    )


# What every release and renewal asks, built once: building a statement costs more than running it.
_BY_ID = select(users).where(users.c.id == bindparam("id"))
_BY_KEY = select(devices).where(devices.c.public_key == bindparam("key"))
_DEVICE = select(devices).where(devices.c.id == bindparam("id"))
_SIGNING = (
    select(devices)
    .where(devices.c.user == bindparam("user"), devices.c.removed_at.is_(None))
    .order_by(devices.c.added_at, devices.c.name)
)
_ALLOWED = union(
    select(members.c.instance).where(members.c.user == bindparam("user")),
    select(instances.c.id).where(instances.c.domain == bindparam("domain")),
)
