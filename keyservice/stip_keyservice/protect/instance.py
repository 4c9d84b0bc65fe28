"""Protecting a checkpoint: from a folder of plain safetensors to a signed instance directory.

Everything is written into `OUT.partial` (`workspace`) and renamed at the end, after the equivalence certificate has
passed: an instance that is there is whole. A run that was interrupted is gone on with by the same call (`resume`,
`journal`). See `stip_protocol.manifest` for what lies in an instance.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from stip_keyservice.protect.client_part import stop_ids_of, write_client_part
from stip_keyservice.protect.equivalence.certificate import SAMPLES_LIMIT, Certificate, Certification
from stip_keyservice.protect.equivalence.protected_model import InstanceFiles
from stip_keyservice.protect.parts import write_parts
from stip_keyservice.protect.plan import Plan, plan
from stip_keyservice.protect.presets import preset as preset_named
from stip_keyservice.protect.progress import Progress, Stages, StageTime, silent
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_keyservice.protect.storage.journal import Journal
from stip_keyservice.protect.storage.pipeline import WORKERS_LIMIT
from stip_keyservice.protect.storage.resume import Inputs, Record
from stip_keyservice.protect.storage.workspace import Workspace, claimed
from stip_keyservice.protect.storage.writer import SHARD_BYTES, write_atomically
from stip_protocol.errors import ConfigurationError, IntegrityError, StipError
from stip_protocol.manifest import FileDigest, Manifest, Preset, file_digest
from stip_protocol.secrets_file import InstanceSecrets, grant_of, seal_secrets


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
    on). `workers` threads compute, by default one for each core, as far as the promised memory goes.

    Raises `ConfigurationError` (bad input) and `IntegrityError` where the protected instance does not compute what
    its source computes; then nothing is left behind. Whatever else ends the call, an interruption or a full disk,
    leaves `OUT.partial`, and the same call goes on with it; one that asks for something else is refused.
    """
    if not 1 <= samples <= SAMPLES_LIMIT:
        raise ConfigurationError.because("samples", samples, f"1 to {SAMPLES_LIMIT}")
    if workers is not None and not 1 <= workers <= WORKERS_LIMIT:
        raise ConfigurationError.because("workers", workers, f"1 to {WORKERS_LIMIT}")
    preset_named(preset)
    source = Checkpoint.open(model)
    inputs = Inputs(
        model=source.fingerprint,
        preset=preset,
        epoch=epoch,
        seal_to=seal_to.public_bytes_raw().hex(),
        accept_tied_head=accept_tied_head,
        accept_token_cipher=accept_token_cipher,
        shard_bytes=shard_bytes,
    )
    with claimed(out) as workspace:
        identity = _identity(workspace, inputs, developer, restart_key or X25519PrivateKey.generate())
        stages = Stages(progress)
        try:
            planned = _planned(source, inputs, identity, stages)
            journal = write_parts(
                workspace, source, planned, identity, stages, workers=workers, shard_bytes=shard_bytes
            )
            result = _Documents(workspace.folder, source, planned, identity, stages).write(
                journal, developer, seal_to, samples, out
            )
            workspace.publish()
        except StipError:
            workspace.remove()
            raise
        except OSError as error:
            kept = f"{workspace.folder} is kept: run the same command again to go on, or remove it"
            raise ConfigurationError(f"out {out}: {error.strerror}; {kept}", field="out") from error
    return result


def _identity(
    workspace: Workspace, inputs: Inputs, developer: Ed25519PrivateKey, restart_key: X25519PrivateKey
) -> InstanceSecrets:
    """Name and root secret: those of the interrupted run, or fresh ones, noted for the run after this."""
    if data := workspace.record:
        record = Record.open(data, developer, workspace.folder)
        record.require_same(inputs, workspace.folder)
        return record.secrets(restart_key, workspace.folder)
    drawn = InstanceSecrets(
        instance=secrets.token_hex(16),
        epoch=inputs.epoch,
        preset=inputs.preset,
        manifest_digest=bytes(32),  # there is no manifest yet
        root=secrets.token_bytes(32),
    )
    workspace.note(Record.of(inputs, drawn, restart_key).signed(developer))
    return drawn


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
        advance(1)
    stop_ids_of(source, planned.vocabulary)
    return planned


class _Documents:
    """What lies around the parts: client part, certificate, signed manifest, sealed secrets."""

    def __init__(
        self, folder: Path, source: Checkpoint, planned: Plan, identity: InstanceSecrets, stages: Stages
    ) -> None:
        self._folder = folder
        self._source = source
        self._plan = planned
        self._secrets = identity  # bound to the manifest once there is one
        self._stages = stages

    def write(
        self, journal: Journal, developer: Ed25519PrivateKey, seal_to: X25519PublicKey, samples: int, out: Path
    ) -> Protected:
        planned, identity = self._plan, self._secrets
        write_client_part(
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
        write_atomically(self._folder / "certificate.json", stored)
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
            server=self._digests("server", journal),
            enclave=self._digests("enclave", journal),
            certificate=certificate.summary() | {"sha256": hashlib.sha256(stored).hexdigest()},
        )
        digest = manifest.write(self._folder / "manifest.json", developer)
        bound = identity.model_copy(update={"manifest_digest": digest})
        write_atomically(self._folder / "secrets.sealed", seal_secrets(bound, seal_to))
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
            raise IntegrityError(
                f"equivalence: got top-1 agreement {certificate.top1_with_ties:.4f} (ties counted) and a relative"
                f" difference of {certificate.relative_rms:.2e}, allowed: 1 and at most {certificate.bound:.0e}",
                field="equivalence",
            )
        return certificate

    def _digests(self, part: str, journal: Journal) -> dict[str, FileDigest]:
        """Of all files of a part; those of tensors were hashed when they were written."""
        return {
            path.name: journal.listed.get(f"{part}/{path.name}") or file_digest(path)
            for path in sorted((self._folder / part).iterdir())
        }
