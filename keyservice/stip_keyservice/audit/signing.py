"""Putting a report into an instance: `leakage.json` beside the manifest, whose summary the manifest then carries.

Four files change together: the report, the manifest, its signature, and the sealed secrets, which name the manifest's
digest. They are made in `signing.partial`, which is renamed to `signing` once they are on the disk, and then take their
places one by one. What ends in between leaves a folder `signing`: whoever inspects the instance then refuses it and
says why, and `finish` goes on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from stip_keyservice.audit.document import Report
from stip_keyservice.audit.recording import server_digest
from stip_keyservice.home import Home
from stip_protocol.documents import explain
from stip_protocol.durable import PARTIAL, sync_folder, write_atomically
from stip_protocol.errors import ConfigurationError, ManifestMismatch
from stip_protocol.leakage import REPORT_LIMIT, REPORT_NAME
from stip_protocol.manifest import MANIFEST_LIMIT, SIGNING, Manifest
from stip_protocol.secrets_file import open_secrets, seal_secrets

MANIFEST, SIGNATURE, SECRETS = "manifest.json", "manifest.json.sig", "secrets.sealed"
DOCUMENTS = (REPORT_NAME, SECRETS, SIGNATURE, MANIFEST)
"""What changes, in the order in which it takes its place."""


def sign(directory: Path, report: Report, home: Home) -> tuple[Manifest, bytes]:
    """Put `report` into the instance in `directory`; gives its new manifest and that manifest's digest.

    The instance was checked before. Raises `ConfigurationError` where the report is of another instance or too large,
    the folder cannot be written, or another process signs; what `open_secrets` and `Manifest.load` raise.
    """
    with _claimed(directory):
        manifest, _ = Manifest.load(directory / MANIFEST, home.developer.public_key())
        _require_subject(report, manifest)
        data = report.to_json()
        if len(data) > REPORT_LIMIT:
            raise ConfigurationError.because(REPORT_NAME, f"{len(data)} bytes", f"at most {REPORT_LIMIT}")
        signed = manifest.model_copy(update={"leakage": report.summary()})
        if (size := len(signed.to_json())) > MANIFEST_LIMIT:
            raise ConfigurationError.because(MANIFEST, f"{size} bytes with its summary", f"at most {MANIFEST_LIMIT}")
        secrets = open_secrets((directory / SECRETS).read_bytes(), home.sealing)
        made, ready = directory / f"{SIGNING}{PARTIAL}", directory / SIGNING
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(mode=0o700)
        write_atomically(made / REPORT_NAME, data)
        digest = signed.write(made / MANIFEST, home.developer)
        bound = secrets.model_copy(update={"manifest_digest": digest})
        write_atomically(made / SECRETS, seal_secrets(bound, home.sealing.public_key()))
        sync_folder(made)
        made.rename(ready)
        _place(directory)
        return signed, digest


def finish(directory: Path, home: Home) -> bool:
    """Go on with a signing that was interrupted; whether there was one.

    Raises `ManifestMismatch` where what waits there is not this instance's, `SignatureInvalid`, `SealedPartInvalid`.
    """
    if not (directory / SIGNING).exists():
        return False
    with _claimed(directory):
        _require_ours(directory, home)
        _place(directory)
    return True


def _place(directory: Path) -> None:
    """Give what waits its place. Every step can be done again."""
    waiting = directory / SIGNING
    sync_folder(directory)
    for name in DOCUMENTS:
        if (waiting / name).exists():
            (waiting / name).replace(directory / name)
    sync_folder(directory)
    waiting.rmdir()
    sync_folder(directory)


def _require_subject(report: Report, manifest: Manifest) -> None:
    subject = report.subject
    for what, got, expected in (
        ("instance", subject.instance, manifest.instance),
        ("epoch", subject.epoch, manifest.epoch),
        ("server part", subject.server_sha256, server_digest(manifest)),
    ):
        if got != expected:
            raise ConfigurationError.because(f"report, {what}", got, expected)


def _require_ours(directory: Path, home: Home) -> None:
    """What waits, together with what has its place already, must be one signed whole, of the server part that is here.

    The manifest that is here tells: it takes its new place last, so it is the old one, or the new one itself.
    """
    place = {name: directory / SIGNING / name for name in DOCUMENTS}
    data = {name: (path if path.exists() else directory / name).read_bytes() for name, path in place.items()}
    manifest = Manifest.parse(data[MANIFEST], data[SIGNATURE], home.developer.public_key())
    here = _here(directory / MANIFEST)
    secrets = open_secrets(data[SECRETS], home.sealing)
    summary = manifest.leakage
    for what, got, expected in (
        ("instance", manifest.instance, here.instance),
        ("epoch", manifest.epoch, here.epoch),
        ("server part", server_digest(manifest), server_digest(here)),
        ("secrets' instance", secrets.instance, manifest.instance),
        ("manifest digest", secrets.manifest_digest, hashlib.sha256(data[MANIFEST]).digest()),
        ("report", hashlib.sha256(data[REPORT_NAME]).hexdigest(), summary and summary.report_sha256),
    ):
        if got != expected:
            raise ManifestMismatch.because(f"{SIGNING}, {what}", "another", "the one of the signed manifest")


def _here(path: Path) -> Manifest:
    """A manifest without its signature, which may have been replaced already."""
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ManifestMismatch(f"{path.name}: {explain(error)}") from None


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """One process at a time; an error of the disk as one of ours."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(handle)
    except BlockingIOError:
        raise ConfigurationError.because("instance", "one that another audit signs", "one at a time") from None
    except OSError as error:
        raise ConfigurationError(f"instance {directory}: {error.strerror}", field="instance") from None
