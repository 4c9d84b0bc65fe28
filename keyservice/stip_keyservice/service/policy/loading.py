"""From a file to the policy in force: signature, consents, and no way back to an older one.

The state keeps the highest serial that was ever loaded, with its digest, and whether it was signed. Afterwards it
refuses a lower serial, the same serial with another digest, and a policy without serial or signature where the last one
had it: whoever can put an old file back, signed as it is, gains nothing. A state that is restored from an older backup
has forgotten what was loaded since (docs/policy.md).

Replicas share the state, so every decision asks, in its own transaction, whether the policy it is made by could still
be loaded: once one replica has loaded another, no decision of any replica is made by the one before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from sqlalchemy import Connection, select

from stip_keyservice.service.policy.document import Policy
from stip_keyservice.service.policy.signing import Sealed
from stip_keyservice.service.state.schema import meta
from stip_keyservice.service.state.store import insert_into
from stip_protocol.errors import IntegrityError, PolicyInvalid, PolicyOutdated

META_KEY = "policy"
_RECORDED = select(meta.c.value).where(meta.c.key == META_KEY)


@dataclass(frozen=True)
class Record:
    """The last policy that was loaded: the one with the highest serial."""

    serial: int | None
    digest: bytes
    signed: bool


@dataclass(frozen=True)
class InForce:
    """What decisions are made by. One decision is made by one of these."""

    policy: Policy
    digest: bytes
    root_der: bytes | None = None
    """The simulated root that a development policy pins; None in production."""
    signed: bool = False


def recorded(db: Connection) -> Record | None:
    """The last policy that was loaded; None while there was none. Raises `IntegrityError`."""
    stored = db.execute(_RECORDED).scalar()
    if stored is None:
        return None
    try:
        fields = json.loads(stored)
        return Record(fields["serial"], bytes.fromhex(fields["digest"]), fields["signed"])
    except (ValueError, TypeError, KeyError):
        raise IntegrityError("state: which policy was loaded last is not readable") from None


def record(db: Connection, loaded: Sealed) -> bool:
    """Hold a policy against the last one that was loaded, and keep it as that. False where it is the same one.

    Raises `PolicyInvalid` where it is a step back.
    """
    before = recorded(db)
    now = Record(loaded.policy.serial, loaded.digest, loaded.signature is not None)
    if before is not None:
        _require_no_step_back(before, now)
    if now == before:
        return False
    value = json.dumps({"serial": now.serial, "digest": now.digest.hex(), "signed": now.signed})
    stored = insert_into(db, meta).values(key=META_KEY, value=value)
    db.execute(stored.on_conflict_do_update(index_elements=["key"], set_={"value": stored.excluded.value}))
    return True


def require_current(db: Connection, in_force: InForce) -> None:
    """Raises `PolicyOutdated` where another replica has loaded a later policy than this one."""
    before = recorded(db)
    if before is None:
        return
    try:
        _require_no_step_back(before, Record(in_force.policy.serial, in_force.digest, in_force.signed))
    except PolicyInvalid:
        got, allowed = in_force.policy.serial or "none", f"{before.serial or 'the signed one'}, which was loaded since"
        raise PolicyOutdated.because("policy serial of this replica", got, allowed) from None


def _require_no_step_back(before: Record, now: Record) -> None:
    if before.signed and not now.signed:
        raise PolicyInvalid.because("policy", "an unsigned one", "a signed one: the last that was loaded was signed")
    if before.serial is None:
        return
    if now.serial is None or now.serial < before.serial:
        got = now.serial or "none"
        raise PolicyInvalid.because("policy serial", got, f"at least {before.serial}, which was loaded already")
    if now.serial == before.serial and now.digest != before.digest:
        allowed = f"at least {before.serial + 1}: another policy of serial {before.serial} was loaded already"
        raise PolicyInvalid.because("policy serial", now.serial, allowed)
