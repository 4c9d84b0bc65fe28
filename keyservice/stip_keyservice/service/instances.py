"""Instances: what `protect` made, checked on the way in, with the grant that opens it stored encrypted.

Of the instance's secrets only the grant is kept; the root secret is opened, used once and dropped.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError
from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.dialects.sqlite import insert as insert_or

from stip_keyservice.service import vault
from stip_keyservice.service.store import instances, leakage_summaries, members
from stip_keyservice.service.users import User
from stip_protocol.errors import InstanceRefused, IntegrityError, ManifestMismatch
from stip_protocol.leakage import REPORT_LIMIT, REPORT_NAME, Leakage
from stip_protocol.manifest import SIGNING, ClientManifest, Manifest, check_files
from stip_protocol.release import Grant
from stip_protocol.secrets_file import SECRETS_LIMIT, grant_of, open_secrets

Kind = Literal["dedicated", "shared"]
CERTIFICATE_LIMIT = 4 << 20
"""Bytes of the largest equivalence certificate read."""


@dataclass(frozen=True)
class Instance:
    """One instance as registered."""

    id: str
    epoch: int
    preset: str
    kind: Kind
    manifest_digest: bytes
    sealed_grant: bytes | None = field(repr=False)
    """Encrypted under the storage key; None once the instance was removed."""
    added_at: int
    removed_at: int | None
    members: tuple[str, ...]
    """Ids of the users who may use it; of a dedicated one, its only user."""
    leakage: Leakage | None
    """What an audit measured, by the signed manifest; None where there was none."""


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


def add(db: Connection, inspected: Inspected, *, storage_key: bytes, owner: User | None, now: int) -> Instance:
    """Register an inspected instance: dedicated to `owner`, or shared where there is none.

    Raises `InstanceRefused` where the instance is registered already.
    """
    manifest = inspected.manifest
    known = db.execute(select(instances.c.removed_at).where(instances.c.id == manifest.instance)).first()
    if known is not None:
        state = "registered" if known.removed_at is None else "removed"
        raise InstanceRefused.because("instance", f"one that is {state} already", "an instance never added before")
    db.execute(
        insert(instances).values(
            id=manifest.instance,
            epoch=manifest.epoch,
            preset=manifest.preset,
            kind="shared" if owner is None else "dedicated",
            manifest_digest=inspected.grant.manifest_digest,
            sealed_grant=vault.lock(inspected.grant, storage_key),
            added_at=now,
        )
    )
    if manifest.leakage is not None:
        summary = manifest.leakage.model_dump_json().encode()
        db.execute(insert(leakage_summaries).values(instance=manifest.instance, summary=summary))
    if owner is not None:
        db.execute(insert(members).values(instance=manifest.instance, user=owner.id))
    return by_id(db, manifest.instance)


def allow(db: Connection, instance: str, user: User) -> None:
    """Make `user` a member of a shared instance. Raises `InstanceRefused`."""
    found = by_id(db, instance)
    if found.removed_at is not None:
        raise InstanceRefused.because("instance", "a removed one", "a registered instance")
    if found.kind != "shared":
        raise InstanceRefused.because("instance", "one dedicated to a single user", "a shared instance")
    db.execute(insert_or(members).values(instance=instance, user=user.id).on_conflict_do_nothing())


def remove(db: Connection, instance: str, *, now: int) -> Instance:
    """Refuse releases and renewals from now on, and destroy the stored grant. Raises `InstanceRefused`."""
    if by_id(db, instance).removed_at is not None:
        raise InstanceRefused.because("instance", "a removed one", "a registered instance")
    db.execute(update(instances).where(instances.c.id == instance).values(removed_at=now, sealed_grant=None))
    return by_id(db, instance)


def by_id(db: Connection, instance: str) -> Instance:
    """The instance of that id, removed or not. Raises `InstanceRefused`."""
    found = find(db, instance)
    if found is None:
        raise InstanceRefused("instance: no such instance; see `stip-keyservice instances list`", field="instance")
    return found


def find(db: Connection, instance: str) -> Instance | None:
    """The instance of that id, removed or not; None where it was never registered."""
    row = db.execute(select(instances).where(instances.c.id == instance)).first()
    return None if row is None else _instance(db, row)


def everything(db: Connection, *, removed: bool = False) -> Sequence[Instance]:
    """All present instances, oldest first; with `removed`, also those that were removed."""
    query = select(instances).order_by(instances.c.added_at, instances.c.id)
    rows = db.execute(query if removed else query.where(instances.c.removed_at.is_(None))).all()
    return [_instance(db, row) for row in rows]


def _instance(db: Connection, row: Row[tuple[object, ...]]) -> Instance:
    allowed = db.execute(select(members.c.user).where(members.c.instance == row.id).order_by(members.c.user))
    return Instance(**row._mapping, members=tuple(allowed.scalars()), leakage=_leakage(db, row.id))


def _leakage(db: Connection, instance: str) -> Leakage | None:
    summary = db.execute(
        select(leakage_summaries.c.summary).where(leakage_summaries.c.instance == instance)
    ).scalar_one_or_none()
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
