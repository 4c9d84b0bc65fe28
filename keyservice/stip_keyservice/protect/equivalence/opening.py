"""An instance that exists, opened with the home that made it and held against the folder of its source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stip_keyservice.home import Home
from stip_keyservice.protect.configuration import require_same_meaning
from stip_keyservice.protect.equivalence.protected_model import InstanceFiles
from stip_keyservice.protect.plan import Plan, plan
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_keyservice.service.instances import inspect
from stip_protocol.errors import ConfigurationError, IntegrityError
from stip_protocol.manifest import Manifest
from stip_protocol.secrets_file import InstanceSecrets, open_secrets


@dataclass(frozen=True)
class OpenedInstance:
    """Everything about one instance, keys included: never log, pickle or keep it longer than it is needed."""

    manifest: Manifest
    source: Checkpoint
    planned: Plan
    files: InstanceFiles
    secrets: InstanceSecrets


def open_instance(directory: Path, model: Path, home: Home) -> OpenedInstance:
    """The instance in `directory` with its keys, and the checkpoint folder `model` that it was made from.

    Its signature, digests and secrets are checked against `home` first. Raises `ConfigurationError` for input that is
    refused, `IntegrityError` where the instance is not what was signed or `model` has not the form of its source.
    """
    if not directory.is_dir():
        raise ConfigurationError.because("instance", "no such folder", "an instance that protect has written")
    source = Checkpoint.open(model)
    inspected = inspect(directory, home.developer.public_key(), home.sealing)
    manifest, grant = inspected.manifest, inspected.grant
    secrets = open_secrets((directory / "secrets.sealed").read_bytes(), home.sealing)
    planned = plan(
        source.config,
        source.headers,
        manifest.preset,
        secrets.root,
        accept_tied_head=True,  # as it was when the instance was made
        accept_token_cipher=True,
    )
    require_same_meaning(source.config, planned)
    _require_form(planned, manifest)
    files = InstanceFiles(
        directory=directory,
        instance=manifest.instance,
        epoch=manifest.epoch,
        preset=manifest.preset,
        output=manifest.output,
        vocabulary=manifest.vocabulary,
        part_key=grant.part_key,
        vocabulary_seed=grant.vocabulary_seed,
    )
    return OpenedInstance(manifest, source, planned, files, secrets)


def _require_form(planned: Plan, manifest: Manifest) -> None:
    """Raise `IntegrityError` where the plan of the model is not that of the instance."""
    for what, got, signed in (
        ("dtype", planned.dtype, manifest.dtype),
        ("width", planned.residual_width, manifest.width),
        ("vocabulary", planned.vocabulary, manifest.vocabulary),
        ("positions", planned.max_positions, manifest.max_positions),
        ("output", planned.output, manifest.output),
    ):
        if got != signed:
            raise IntegrityError.because(f"model {what}", got, f"{signed}: the model is not this instance's source")
