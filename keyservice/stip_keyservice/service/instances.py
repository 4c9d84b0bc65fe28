"""Instances: what `protect` made, checked on the way in, with the grant that opens it stored encrypted.

Of the instance's secrets only the grant is kept; the root secret is opened, used once and dropped.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError
from sqlalchemy import ColumnElement, Connection, Row, and_, bindparam, delete, func, insert, select, update

from stip_keyservice.service.state.schema import (
    canaries,
    epochs,
    grants,
    instances,
    leakage_summaries,
    leases,
    members,
    users,
)
from stip_keyservice.service.state.store import insert_into
from stip_keyservice.service.users import User
from stip_keyservice.service.vault import Vault
from stip_protocol.errors import InstanceRefused, IntegrityError, ManifestMismatch, UserRefused
from stip_protocol.leakage import REPORT_LIMIT, REPORT_NAME, Leakage
from stip_protocol.manifest import SIGNING, ClientManifest, Manifest, check_files
from stip_protocol.release import Grant
from stip_protocol.secrets_file import SECRETS_LIMIT, grant_of, open_secrets

Kind = Literal["dedicated", "shared"]
State = Literal["standby", "active", "draining", "removed"]
"""Of an epoch: not released yet; released; not released any more, its leases are renewed; gone."""
CERTIFICATE_LIMIT = 4 << 20
"""Bytes of the largest equivalence certificate read."""


@dataclass(frozen=True)
class Epoch:
    """One protected copy of an instance, under keys of its own."""

    number: int
    state: State
    preset: str
    manifest_digest: bytes
    added_at: int
    drain_until: int | None
    """Of one that drains: until when its leases are renewed; None while nobody has said."""
    removed_at: int | None
    leakage: Leakage | None
    """What an audit measured, by the signed manifest; None where there was none."""

    def serves(self, now: int) -> bool:
        """Whether sessions may run: it is released, or drains and has not drained yet."""
        drained = self.drain_until is not None and self.drain_until <= now
        return self.state == "active" or (self.state == "draining" and not drained)


@dataclass(frozen=True)
class Instance:
    """One trust domain's model and its epochs. Who may use it, `User.instances` says, and `users_of`."""

    id: str
    kind: Kind
    domain: str | None
    """Of a dedicated one, whose users may have it."""
    added_at: int
    epochs: tuple[Epoch, ...]
    """By number; removed ones are among them."""

    @property
    def removed(self) -> bool:
        """Whether every epoch is."""
        return all(epoch.state == "removed" for epoch in self.epochs)

    def epoch(self, number: int) -> Epoch | None:
        """The epoch of that number, removed or not."""
        return next((epoch for epoch in self.epochs if epoch.number == number), None)

    def released(self, held: Collection[int] = (), *, now: int) -> Epoch | None:
        """The epoch that a new session gets: the active one; where the enclave holds others only (`held`; empty: it
        did not say), the newest of those that still drain. None where there is none."""
        live = [epoch for epoch in self.epochs if epoch.serves(now)]
        fitting = [epoch for epoch in live if epoch.number in held] if held else live
        return max(fitting, key=lambda epoch: (epoch.state == "active", epoch.number), default=None)


@dataclass(frozen=True)
class Inspected:
    """An instance directory that passed every check."""

    manifest: Manifest
    grant: Grant


def inspect(directory: Path, developer: Ed25519PublicKey, sealing: X25519PrivateKey) -> Inspected:
    """Check an instance directory whole, and open its secrets.

    Raises `SignatureInvalid` (another developer), `ManifestMismatch` (files, certificate, leakage report, client
    part or secrets that differ from the signed manifest) or `SealedPartInvalid` (secrets for another key service).
    """
    if (directory / SIGNING).exists():
        again = "none: an audit was interrupted as it signed, run it again to go on"
        raise ManifestMismatch.because("instance", f"a folder {SIGNING}", again)
    manifest, digest = Manifest.load(directory / "manifest.json", developer)
    client, _ = ClientManifest.load(directory / "client" / "manifest.json", developer)
    for part, files in (("server", manifest.server), ("enclave", manifest.enclave), ("client", client.files)):
        if not (directory / part).is_dir():
            raise ManifestMismatch.because(part, "no such folder", f"{len(files)} files")
        check_files(directory / part, files)
    _check_certificate(directory / "certificate.json", manifest)
    _check_report(directory / REPORT_NAME, manifest)
    secrets = open_secrets(_read(directory / "secrets.sealed", SECRETS_LIMIT), sealing)
    for what, got, expected in (
        ("client instance", client.instance, manifest.instance),
        ("client epoch", client.epoch, manifest.epoch),
        ("client vocabulary", client.vocabulary, manifest.vocabulary),
        ("secrets instance", secrets.instance, manifest.instance),
        ("secrets epoch", secrets.epoch, manifest.epoch),
        ("secrets preset", secrets.preset, manifest.preset),
        ("secrets manifest digest", secrets.manifest_digest.hex(), digest.hex()),
    ):
        if got != expected:
            raise ManifestMismatch.because(what, got, expected)
    return Inspected(manifest, grant_of(secrets))


def add(db: Connection, inspected: Inspected, *, vault: Vault, domain: str | None, now: int) -> Instance:
    """Register an inspected instance, dedicated to a domain or shared where there is none; or another epoch of one.

    The first epoch is active at once, a later one stands by until `activate`. Raises `InstanceRefused` where the epoch
    was ever registered, is not newer than the others, or the instance is for others.
    """
    manifest = inspected.manifest
    known = find(db, manifest.instance)
    if known is None:
        kind = "shared" if domain is None else "dedicated"
        db.execute(insert(instances).values(id=manifest.instance, kind=kind, domain=domain, added_at=now))
    else:
        _require_next(known, manifest, domain)
    row = {"instance": manifest.instance, "number": manifest.epoch, "preset": manifest.preset, "added_at": now}
    state = "active" if known is None else "standby"
    db.execute(insert(epochs).values(**row, state=state, manifest_digest=inspected.grant.manifest_digest))
    where = {"instance": manifest.instance, "epoch": manifest.epoch}
    parent = None if domain is None else _domain_key(db, vault, domain, now)
    data_key = vault.make(db, f"epoch/{manifest.instance}/{manifest.epoch}", parent=parent, now=now)
    sealed = vault.seal(db, data_key, inspected.grant.to_bytes(), _grant_row(manifest.instance, manifest.epoch))
    db.execute(insert(grants).values(**where, data_key=data_key, sealed=sealed))
    if manifest.leakage is not None:
        summary = manifest.leakage.model_dump_json().encode()
        db.execute(insert(leakage_summaries).values(**where, summary=summary))
    return by_id(db, manifest.instance)


def grant(db: Connection, vault: Vault, instance: str, epoch: int) -> Grant:
    """What opens an epoch that was not removed. Raises `IntegrityError` where the row or a key is another one's."""
    row = db.execute(_GRANT, {"instance": instance, "epoch": epoch}).one_or_none()
    if row is None:
        raise IntegrityError(f"state: the grant of instance {instance}, epoch {epoch} is missing")
    return Grant.from_bytes(vault.open(db, row.data_key, row.sealed, _grant_row(instance, epoch)))


def allow(db: Connection, instance: str, user: User) -> None:
    """Make `user` a member of a shared instance. Raises `InstanceRefused`."""
    found = _present(db, instance)
    if found.kind != "shared":
        raise InstanceRefused.because("instance", "one dedicated to a domain", "a shared instance")
    db.execute(insert_into(db, members).values(instance=instance, user=user.id).on_conflict_do_nothing())


def disallow(db: Connection, instance: str, user: User) -> None:
    """End the membership of `user` in a shared instance. Raises `InstanceRefused`, `UserRefused`."""
    if _present(db, instance).kind != "shared":
        raise InstanceRefused.because("instance", "one dedicated to a domain", "a shared instance")
    member = members.c.instance == instance, members.c.user == user.id
    if db.execute(delete(members).where(*member)).rowcount == 0:
        raise UserRefused.because("user", "not a member of this instance", "a member; see `instances show`")


def activate(db: Connection, instance: str, epoch: int, *, drain_until: int | None) -> Instance:
    """Release `epoch` from now on; the one released so far drains, its leases are renewed until `drain_until`.

    One that drains can be released again: the way back. Raises `InstanceRefused` where it neither drains nor stands by.
    """
    _require_state(_present(db, instance), epoch, "standby", "draining")
    drained = {"state": "draining", "drain_until": drain_until}
    db.execute(update(epochs).where(epochs.c.instance == instance, epochs.c.state == "active").values(**drained))
    db.execute(update(epochs).where(*_at(instance, epoch)).values(state="active", drain_until=None))
    return by_id(db, instance)


def require_idle(db: Connection, instance: str, epoch: int, *, now: int) -> None:
    """Raises `InstanceRefused` while sessions may run on an epoch, and there are leases of it."""
    found = by_id(db, instance).epoch(epoch)
    running = running_leases(db, instance, now=now).get(epoch, 0)
    if found is not None and found.serves(now) and running:
        allowed = "none: wait until it has drained, or end them with --now"
        raise InstanceRefused.because(f"epoch {epoch}", f"{running} running leases", allowed)


def retire(db: Connection, vault: Vault, instance: str, epoch: int, *, now: int) -> Instance:
    """Remove one epoch that drains or stands by: nothing is released or renewed, its grant and its key are destroyed.

    Raises `InstanceRefused`.
    """
    _require_state(_present(db, instance), epoch, "draining", "standby")
    _remove_epoch(db, vault, instance, epoch, now)
    return by_id(db, instance)


def remove(db: Connection, vault: Vault, instance: str, *, now: int) -> Instance:
    """Refuse releases and renewals from now on, and destroy every stored grant. Raises `InstanceRefused`."""
    for epoch in _present(db, instance).epochs:
        if epoch.state != "removed":
            _remove_epoch(db, vault, instance, epoch.number, now)
    return by_id(db, instance)


def users_of(db: Connection, instance: Instance) -> tuple[str, ...]:
    """Ids of all users who may use it. For people: there may be very many, and no decision needs more than one."""
    if instance.kind == "shared":
        allowed = select(members.c.user).where(members.c.instance == instance.id)
    else:
        allowed = select(users.c.id).where(users.c.domain == instance.domain, users.c.removed_at.is_(None))
    return tuple(sorted(db.execute(allowed).scalars()))


def by_id(db: Connection, instance: str) -> Instance:
    """The instance of that id, removed or not. Raises `InstanceRefused`."""
    found = find(db, instance)
    if found is None:
        raise InstanceRefused("instance: no such instance; see `stip-keyservice instances list`", field="instance")
    return found


def find(db: Connection, instance: str) -> Instance | None:
    """The instance of that id, removed or not; None where it was never registered."""
    row = db.execute(_BY_ID, {"id": instance}).first()
    return None if row is None else _instance(db, row)


def everything(db: Connection, *, removed: bool = False) -> Sequence[Instance]:
    """All present instances, oldest first; with `removed`, also those that were removed."""
    rows = db.execute(select(instances).order_by(instances.c.added_at, instances.c.id)).all()
    return [found for found in (_instance(db, row) for row in rows) if removed or not found.removed]


def running_leases(db: Connection, instance: str, *, now: int) -> dict[int, int]:
    """By epoch, how many leases of an instance are in their time and not revoked."""
    counted = select(leases.c.epoch, func.count().label("leases")).group_by(leases.c.epoch)
    running = leases.c.instance == instance, leases.c.expires > now, leases.c.revoked.is_(None)
    return {row.epoch: row.leases for row in db.execute(counted.where(*running))}


def of_domain(db: Connection, domain: str) -> Sequence[Instance]:
    """The present instances that are dedicated to a domain."""
    return [instance for instance in everything(db) if instance.domain == domain]


def domain_subject(domain: str) -> str:
    """What the data key of a trust domain is the key of."""
    return f"domain/{domain}"


def _present(db: Connection, instance: str) -> Instance:
    found = by_id(db, instance)
    if found.removed:
        raise InstanceRefused.because("instance", "a removed one", "a registered instance")
    return found


def _require_next(known: Instance, manifest: Manifest, domain: str | None) -> None:
    """Another epoch of the same instance, for the same users under the same preset, newer than all before.

    Shapes may differ: each epoch is whole, with a manifest of its own, and a client whose part has another vocabulary
    refuses the session. A preset is what users were promised of the server's view.
    """
    again = known.epoch(manifest.epoch)
    if again is not None:
        state = "removed" if again.state == "removed" else "registered"
        raise InstanceRefused.because("instance", f"one that is {state} already", "an epoch never added before")
    newest = max(epoch.number for epoch in known.epochs)
    if known.removed or manifest.epoch < newest:
        allowed = "none: the instance was removed" if known.removed else f"above {newest}"
        raise InstanceRefused.because("instance epoch", manifest.epoch, allowed)
    if known.domain != domain:
        raise InstanceRefused.because("instance", "an epoch for other users", f"as registered: {known.kind}")
    preset = known.epochs[-1].preset
    if manifest.preset != preset:
        raise InstanceRefused.because("epoch preset", manifest.preset, f"{preset}; another one is another instance's")


def _require_state(found: Instance, number: int, *allowed: State) -> None:
    epoch = found.epoch(number)
    if epoch is None or epoch.state not in allowed:
        state = "not registered" if epoch is None else epoch.state
        raise InstanceRefused.because(f"epoch {number}", state, " or ".join(allowed))


def _remove_epoch(db: Connection, vault: Vault, instance: str, number: int, now: int) -> None:
    stored = grants.c.instance == instance, grants.c.epoch == number
    data_key = db.execute(select(grants.c.data_key).where(*stored)).scalar()
    if data_key is not None:
        vault.destroy(db, data_key, now=now)
    db.execute(delete(grants).where(*stored))
    db.execute(delete(canaries).where(canaries.c.instance == instance, canaries.c.epoch == number))
    db.execute(update(epochs).where(*_at(instance, number)).values(state="removed", removed_at=now))


def _domain_key(db: Connection, vault: Vault, domain: str, now: int) -> bytes:
    subject = domain_subject(domain)
    return vault.find(db, subject) or vault.make(db, subject, parent=None, now=now)


def _grant_row(instance: str, epoch: int) -> list[object]:
    return ["grant", instance, epoch]


def _at(instance: str, epoch: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return epochs.c.instance == instance, epochs.c.number == epoch


def _instance(db: Connection, row: Row[tuple[object, ...]]) -> Instance:
    return Instance(**row._mapping, epochs=tuple(_epoch(each) for each in db.execute(_EPOCHS, {"id": row.id})))


# What every release and renewal asks, built once: building a statement costs more than running it.
_BY_ID = select(instances).where(instances.c.id == bindparam("id"))
_GRANT = select(grants).where(grants.c.instance == bindparam("instance"), grants.c.epoch == bindparam("epoch"))
_SUMMED = and_(leakage_summaries.c.instance == epochs.c.instance, leakage_summaries.c.epoch == epochs.c.number)
_EPOCHS = (
    select(epochs, leakage_summaries.c.summary)
    .select_from(epochs.outerjoin(leakage_summaries, _SUMMED))
    .where(epochs.c.instance == bindparam("id"))
    .order_by(epochs.c.number)
)


def _epoch(row: Row[tuple[object, ...]]) -> Epoch:
    fields = dict(row._mapping)
    leakage = _leakage(fields.pop("instance"), fields.pop("summary"))
    return Epoch(**fields, leakage=leakage)


def _leakage(instance: str, summary: bytes | None) -> Leakage | None:
    try:
        return None if summary is None else Leakage.model_validate_json(summary)
    except ValidationError:
        raise IntegrityError(f"state: what was measured of instance {instance} is not readable") from None


def _check_certificate(path: Path, manifest: Manifest) -> None:
    """The equivalence certificate must be the one whose digest the developer signed."""
    signed = str(manifest.certificate.get("sha256", ""))
    found = hashlib.sha256(_read(path, CERTIFICATE_LIMIT)).hexdigest()
    if not hmac.compare_digest(found.encode(), signed.encode()):
        raise ManifestMismatch.because(f"{path.name} sha256", found, signed or "a digest in the signed manifest")


def _check_report(path: Path, manifest: Manifest) -> None:
    """The leakage report is there exactly where the manifest has its summary, and is the one that was summed up."""
    if manifest.leakage is None:
        if os.path.lexists(path):
            raise ManifestMismatch.because(path.name, "a report", "none: the signed manifest says of no audit")
        return
    found = hashlib.sha256(_read(path, REPORT_LIMIT)).hexdigest()
    if not hmac.compare_digest(found, manifest.leakage.report_sha256):
        raise ManifestMismatch.because(f"{path.name} sha256", found, manifest.leakage.report_sha256)


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ManifestMismatch(f"{path.name}: {error.strerror}", field=path.name) from None
    if len(data) > limit:
        raise ManifestMismatch.because(path.name, "a larger file", f"at most {limit} bytes")
    return data
