"""Revocations: what an operator takes back at once, and the leases that end with it.

    kind          subject                          refused from then on
    user          a user's id                      releases to any of their devices
    device        a device's id                    releases to what it signs
    enclave       SHA-256 of its RA-TLS key, hex   releases to that enclave
    measurement   MRENCLAVE, hex                   releases to every enclave of that code
    instance      an instance's id                 releases of any of its epochs
    epoch         <instance>/<number>              releases of that epoch

Every matching lease is marked in the same transaction and is never renewed again, also where the revocation is lifted
later: lifting lets new releases through, it does not bring back what was ended.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import ColumnElement, Connection, and_, bindparam, func, insert, select, update

from stip_keyservice.service import instances, users
from stip_keyservice.service.release import EnclaveFacts
from stip_keyservice.service.state.schema import leases, revocations
from stip_protocol.errors import ConfigurationError, EnclaveRevoked, InstanceRefused, StipError, UserRefused

Kind = Literal["user", "device", "enclave", "measurement", "instance", "epoch"]
KINDS: tuple[Kind, ...] = get_args(Kind)
REASON = re.compile(r"[ -~]{1,128}")
"""One line of printable ASCII: it stands in the audit log, tables and JSON."""
DIGEST = re.compile(r"[0-9a-f]{64}")

Subject = tuple[str, str]
"""A kind and who of it."""


@dataclass(frozen=True)
class Revocation:
    """One row. `number` is its place in the order in which they were made."""

    number: int
    kind: Kind
    subject: str
    reason: str
    at: int
    lifted_at: int | None


def epoch_subject(instance: str, number: int) -> str:
    """How an epoch is named in a revocation."""
    return f"{instance}/{number}"


def revoke(db: Connection, kind: Kind, subject: str, *, reason: str, now: int) -> tuple[Revocation, int]:
    """Revoke a subject, and end its leases: the revocation and how many leases it ended now.

    `subject` is as `subject_of` gives it. Where it is revoked already, that revocation stands, and ends what is left.
    Raises `ConfigurationError` for a reason that is none.
    """
    if not REASON.fullmatch(reason):
        raise ConfigurationError.because("reason", ascii(reason)[:80], "1 to 128 printable ASCII characters")
    found = standing(db, [(kind, subject)])
    made = found[0] if found else _make(db, kind, subject, reason, now)
    open_ones = leases.c.revoked.is_(None)
    ended = update(leases).where(open_ones, _MATCHING[kind](db, subject)).values(revoked=made.number)
    return made, db.execute(ended).rowcount


def subject_of(db: Connection, kind: Kind, given: str) -> str:
    """The subject that an operator named: a user by name or id, a device as USER/DEVICE or by id, an epoch as
    INSTANCE/NUMBER, the others as they stand in a revocation.

    Raises `UserRefused`, `InstanceRefused` where nobody is registered so, `ConfigurationError`.
    """
    return _NAMED[kind](db, given)


def lift(db: Connection, number: int, *, now: int) -> Revocation:
    """Let new releases through again; the leases that were ended stay so. Raises `ConfigurationError`."""
    here = revocations.c.number == number
    row = db.execute(select(revocations).where(here)).one_or_none()
    if row is None or row.lifted_at is not None:
        got = "no such revocation" if row is None else "one that was lifted"
        raise ConfigurationError.because(f"revocation {number}", got, "one of `stip-keyservice revocations list`")
    db.execute(update(revocations).where(here).values(lifted_at=now))
    return Revocation(**dict(row._mapping) | {"lifted_at": now})


def everything(db: Connection, *, lifted: bool = False) -> Sequence[Revocation]:
    """All that stand, oldest first; with `lifted`, also those that do not any more."""
    query = select(revocations).order_by(revocations.c.number)
    if not lifted:
        query = query.where(revocations.c.lifted_at.is_(None))
    return [Revocation(**row._mapping) for row in db.execute(query)]


def standing(db: Connection, subjects: Collection[Subject]) -> Sequence[Revocation]:
    """Those that stand against any of the subjects, oldest first."""
    rows = db.execute(_STANDING, {"subjects": [name for _, name in subjects]})
    return [Revocation(**row._mapping) for row in rows if (row.kind, row.subject) in subjects]


_STANDING = (
    select(revocations)
    .where(revocations.c.lifted_at.is_(None), revocations.c.subject.in_(bindparam("subjects", expanding=True)))
    .order_by(revocations.c.number)
)
"""Built once: building a statement costs more than running it."""


def require_none(found: Sequence[Revocation]) -> None:
    """Raises `UserRefused`, `EnclaveRevoked` or `InstanceRefused` for the first of what stands against a release."""
    for each in found:
        raise _REFUSALS[each.kind].because(each.kind, f"one that was revoked (revocation {each.number})", "another one")


_REFUSALS: dict[Kind, type[StipError]] = {
    "user": UserRefused,
    "device": UserRefused,
    "enclave": EnclaveRevoked,
    "measurement": EnclaveRevoked,
    "instance": InstanceRefused,
    "epoch": InstanceRefused,
}


def _make(db: Connection, kind: Kind, subject: str, reason: str, now: int) -> Revocation:
    newest = db.execute(select(func.max(revocations.c.number))).scalar() or 0
    made = Revocation(newest + 1, kind, subject, reason, now, None)
    db.execute(insert(revocations).values(**vars(made)))
    return made


def _of_measurement(db: Connection, subject: str) -> ColumnElement[bool]:
    """What evidence established is one document in a lease's row. There are as many different ones as machines and
    states of theirs, not as leases: a statement takes that many parameters."""
    found = db.execute(select(leases.c.enclave).where(leases.c.revoked.is_(None)).distinct()).scalars()
    wanted = bytes.fromhex(subject)
    return leases.c.enclave.in_([facts for facts in found if EnclaveFacts.from_bytes(facts).measurement == wanted])


def _of_epoch(db: Connection, subject: str) -> ColumnElement[bool]:
    instance, number = subject.split("/")
    return and_(leases.c.instance == instance, leases.c.epoch == int(number))


_MATCHING: dict[Kind, Callable[[Connection, str], ColumnElement[bool]]] = {
    "user": lambda db, subject: leases.c.user == subject,
    "device": lambda db, subject: leases.c.device == subject,
    "enclave": lambda db, subject: leases.c.tls_key == bytes.fromhex(subject),
    "measurement": _of_measurement,
    "instance": lambda db, subject: leases.c.instance == subject,
    "epoch": _of_epoch,
}
"""Which leases end with a subject."""


def _digest(kind: str, given: str) -> str:
    if not DIGEST.fullmatch(given.lower()):
        raise ConfigurationError.because(kind, ascii(given)[:80], "64 hex digits, as `leases list --json` shows them")
    return given.lower()


def _device(db: Connection, given: str) -> str:
    user, _, name = given.rpartition("/")
    found = users.find_device(db, users.last_of(db, user), name) if user else users.known_device(db, name)
    return found.id


def _epoch(db: Connection, given: str) -> str:
    instance, _, number = given.rpartition("/")
    if not re.fullmatch(r"[0-9]{1,9}", number):
        raise ConfigurationError.because("epoch", ascii(given)[:80], "INSTANCE/NUMBER")
    if instances.by_id(db, instance).epoch(int(number)) is None:
        raise InstanceRefused.because(f"epoch {int(number)}", "not registered", "an epoch of the instance")
    return epoch_subject(instance, int(number))


_NAMED: dict[Kind, Callable[[Connection, str], str]] = {
    "user": lambda db, given: users.last_of(db, given).id,
    "device": _device,
    "enclave": lambda db, given: _digest("enclave", given),
    "measurement": lambda db, given: _digest("measurement", given),
    "instance": lambda db, given: instances.by_id(db, given).id,
    "epoch": _epoch,
}
"""How operators name a subject."""
