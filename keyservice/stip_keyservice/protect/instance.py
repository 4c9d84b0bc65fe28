"""Protecting a checkpoint: from a folder of plain safetensors to a signed instance directory.

Everything is written into `OUT.partial` (`workspace`) and renamed at the end, after the equivalence certificate has
passed: an instance that is there is whole. A run that was interrupted is gone on with by the same call (`resume`,
`journal`). See `stip_protocol.manifest` for what lies in an instance.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from stip_keyservice.protect.client_part import stop_ids_of, write_client_part
from stip_keyservice.protect.configuration import require_same_meaning
from stip_keyservice.protect.equivalence.certificate import Certificate
from stip_keyservice.protect.equivalence.certification import SAMPLES_LIMIT, Certification
from stip_keyservice.protect.equivalence.protected_model import InstanceFiles, require_loadable
from stip_keyservice.protect.parts import Digests, write_parts
from stip_keyservice.protect.plan import Plan, plan
from stip_keyservice.protect.presets import preset as preset_named
from stip_keyservice.protect.progress import Progress, Stages, StageTime, silent
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_keyservice.protect.storage.pipeline import WORKERS_LIMIT
from stip_keyservice.protect.storage.resume import Inputs, Record
from stip_keyservice.protect.storage.workspace import DOCUMENTS, SIGNATURE, Workspace, claimed
from stip_keyservice.protect.storage.writer import SHARD_BYTES, write_document
from stip_protocol.durable import write_atomically
from stip_protocol.errors import ConfigurationError, IntegrityError, ManifestMismatch, StipError
from stip_protocol.manifest import Manifest, Preset
from stip_protocol.secrets_file import InstanceSecrets, grant_of, seal_secrets

INSTANCE = re.compile(r"[0-9a-f]{32}")
"""How an instance is named."""


@dataclass(frozen=True)
class Protected:
    """A finished protection."""

    directory: Path
    manifest: Manifest
    manifest_digest: bytes
    certificate: Certificate
    stages: dict[str, StageTime]
    """What each stage took, in this run."""


def protect(
    model: Path,
    out: Path,
    *,
    preset: Preset,
    developer: Ed25519PrivateKey,
    seal_to: X25519PublicKey,
    restart_key: X25519PrivateKey | None = None,
    epoch: int = 0,
    instance: str | None = None,
    accept_tied_head: bool = False,
    accept_token_cipher: bool = False,
    samples: int = 4,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Protected:
    """Protect the checkpoint folder `model` under fresh keys into `out`, which is missing or empty.

    The manifest is signed by `developer`; the root secret leaves this process only sealed: to `seal_to`, and while
    the instance is unfinished to `restart_key`, the home's own (None: a key that nobody has, so that nobody can go
    on). With `instance` it is another epoch (1 or later) of one that exists, under keys as fresh as any. `workers`
    threads compute, by default one for each core, as far as the promised memory goes.

    Raises `ConfigurationError` (bad input, a disk that is full or fails) and `IntegrityError` where the protected
    instance does not compute what its source computes. A call that ends before any of its files is finished leaves
    nothing behind; one that ends later, and an interruption at any time, leaves `OUT.partial`. The same call goes on
    with that; one that asks for something else is refused.
    """
    if not 1 <= samples <= SAMPLES_LIMIT:
        raise ConfigurationError.because("samples", samples, f"1 to {SAMPLES_LIMIT}")
    if workers is not None and not 1 <= workers <= WORKERS_LIMIT:
        raise ConfigurationError.because("workers", workers, f"1 to {WORKERS_LIMIT}")
    _require_epoch_of(instance, epoch)
    preset_named(preset)
    source = Checkpoint.open(model)
    stages = Stages(progress)
    with claimed(out) as workspace, _kept(workspace, out):
        inputs = Inputs(
            model=source.fingerprint,
            out=str(out.absolute()),
            folder=workspace.number,
            preset=preset,
            epoch=epoch,
            instance=instance,
            seal_to=seal_to.public_bytes_raw().hex(),
            accept_tied_head=accept_tied_head,
            accept_token_cipher=accept_token_cipher,
            shard_bytes=shard_bytes,
        )
        identity = _identity(workspace, inputs, developer, restart_key or X25519PrivateKey.generate())
        if workspace.published:
            return _published(workspace, out, developer)
        planned = _planned(source, inputs, identity, stages)
        digests = write_parts(workspace, source, planned, identity, stages, workers=workers, shard_bytes=shard_bytes)
        result = _Documents(workspace, source, planned, identity, stages).write(
            digests, developer, seal_to, samples, out
        )
        workspace.publish()
    return result


def _require_epoch_of(instance: str | None, epoch: int) -> None:
    """The first epoch draws the instance's name, a later one may be told it. Raises `ConfigurationError`."""
    if instance is None:
        return
    if not INSTANCE.fullmatch(instance):
        allowed = "32 hex digits, as `instances list` shows them"
        raise ConfigurationError.because("instance", ascii(instance)[:80], allowed)
    if epoch < 1:
        raise ConfigurationError.because("epoch", epoch, "1 or more: the next epoch of an instance that exists")


@contextmanager
def _kept(workspace: Workspace, out: Path) -> Iterator[None]:
    """Where a run ends early, keep what another one can go on with, and say so."""
    try:
        yield
    except (StipError, OSError) as error:
        kept = f"{workspace.folder} is kept: run the same command again to go on, or remove it"
        ended = f"out {out}: {error.strerror}" if isinstance(error, OSError) else error.message
        if not workspace.abandon() and str(workspace.folder) not in ended:
            ended = f"{ended}; {kept}"
        if isinstance(error, OSError):
            raise ConfigurationError(ended, field="out") from error
        raise type(error)(ended, field=error.field) from error


def _identity(
    workspace: Workspace, inputs: Inputs, developer: Ed25519PrivateKey, restart_key: X25519PrivateKey
) -> InstanceSecrets:
    """Name and root secret: those of the interrupted run, or fresh ones, noted for the run after this."""
    if data := workspace.record:
        record = Record.open(data, developer, workspace.folder)
        record.require_same(inputs, workspace.folder)
        return record.secrets(restart_key, workspace.folder)
    drawn = InstanceSecrets(
        instance=inputs.instance or secrets.token_hex(16),
        epoch=inputs.epoch,
        preset=inputs.preset,
        manifest_digest=bytes(32),  # there is no manifest yet
        root=secrets.token_bytes(32),
    )
    workspace.note(Record.of(inputs, drawn, restart_key).signed(developer))
    return drawn


def _published(workspace: Workspace, out: Path, developer: Ed25519PrivateKey) -> Protected:
    """What an earlier run published and then did not live to report. Raises `IntegrityError` where it was changed."""
    manifest, digest = Manifest.load(out / "manifest.json", developer.public_key())
    stored = (out / "certificate.json").read_bytes()
    if hashlib.sha256(stored).hexdigest() != manifest.certificate["sha256"]:
        raise ManifestMismatch.because("certificate.json sha256", "another digest", "the one of the signed manifest")
    workspace.tidy()
    return Protected(out, manifest, digest, Certificate.model_validate_json(stored), {})


def _planned(source: Checkpoint, inputs: Inputs, identity: InstanceSecrets, stages: Stages) -> Plan:
    """The plan under the identity's keys. Raises `ConfigurationError`."""
    with stages.stage("keys", 1) as advance:
        planned = plan(
            source.config,
            source.headers,
            inputs.preset,
            identity.root,
            accept_tied_head=inputs.accept_tied_head,
            accept_token_cipher=inputs.accept_token_cipher,
        )
        require_same_meaning(source.config, planned)
        require_loadable(source, planned)
        advance(1)
    stop_ids_of(source, planned.vocabulary)
    return planned


class _Documents:
    """What lies around the parts: client part, certificate, signed manifest, sealed secrets."""

    def __init__(
        self, workspace: Workspace, source: Checkpoint, planned: Plan, identity: InstanceSecrets, stages: Stages
    ) -> None:
        self._workspace = workspace
        self._folder = workspace.folder
        self._source = source
        self._plan = planned
        self._secrets = identity  # bound to the manifest once there is one
        self._stages = stages

    def write(
        self,
        digests: dict[str, Digests],
        developer: Ed25519PrivateKey,
        seal_to: X25519PublicKey,
        samples: int,
        out: Path,
    ) -> Protected:
        planned, identity = self._plan, self._secrets
        client = write_client_part(
            self._folder / "client",
            self._source,
            developer,
            instance=identity.instance,
            epoch=identity.epoch,
            vocabulary=planned.vocabulary,
            max_positions=planned.max_positions,
        )
        certificate = self._certify(samples)
        stored = (certificate.model_dump_json(indent=2) + "\n").encode()
        digest_of_certificate = write_document(self._folder / "certificate.json", stored)
        manifest = Manifest(
            instance=identity.instance,
            epoch=identity.epoch,
            preset=identity.preset,
            dtype=planned.dtype,
            width=planned.residual_width,
            vocabulary=planned.vocabulary,
            max_positions=planned.max_positions,
            output=planned.output,
            logit_cap=planned.logit_cap,
            server=dict(sorted(digests["server"].items())),
            enclave=dict(sorted(digests["enclave"].items())),
            certificate=certificate.summary() | {"sha256": digest_of_certificate.sha256},
        )
        digest = manifest.write(self._folder / "manifest.json", developer)
        bound = identity.model_copy(update={"manifest_digest": digest})
        write_atomically(self._folder / "secrets.sealed", seal_secrets(bound, seal_to))
        files = {
            *(f"{part}/{name}" for part, names in digests.items() for name in names),
            *(f"client/{name}" for name in (*client.files, "manifest.json", SIGNATURE)),
        }
        self._workspace.require_only({*files, *DOCUMENTS, SIGNATURE})
        return Protected(out, manifest, digest, certificate, self._stages.times)

    def _certify(self, samples: int) -> Certificate:
        planned, identity = self._plan, self._secrets
        grant = grant_of(identity)
        files = InstanceFiles(
            directory=self._folder,
            instance=identity.instance,
            epoch=identity.epoch,
            preset=identity.preset,
            output=planned.output,
            vocabulary=planned.vocabulary,
            part_key=grant.part_key,
            vocabulary_seed=grant.vocabulary_seed,
        )
        certification = Certification(files, self._source, planned, samples=samples)
        with self._stages.stage("certificate", certification.steps) as advance:
            certificate = certification.run(advance)
        if not certificate.passed:
            kept = f"{self._folder} is kept unpublished: remove it to start anew"
            raise IntegrityError(f"equivalence: {certificate.fault}; {kept}", field="equivalence")
        return certificate
