"""Certifying an instance that exists: from its folder, its source and the home that opens it."""

from __future__ import annotations

from pathlib import Path

from stip_keyservice.home import Home
from stip_keyservice.protect.configuration import require_same_meaning
from stip_keyservice.protect.equivalence.certificate import Certificate
from stip_keyservice.protect.equivalence.certification import LENGTH, Certification
from stip_keyservice.protect.equivalence.inputs import read_ids
from stip_keyservice.protect.equivalence.protected_model import InstanceFiles
from stip_keyservice.protect.plan import Plan, plan
from stip_keyservice.protect.progress import Progress, Stages, silent
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_keyservice.service.instances import inspect
from stip_protocol.errors import ConfigurationError, IntegrityError
from stip_protocol.manifest import Manifest
from stip_protocol.secrets_file import open_secrets


def verify(
    directory: Path,
    model: Path,
    home: Home,
    *,
    samples: int = 4,
    length: int | None = None,
    seed: int = 0,
    ids: Path | None = None,
    compute_dtype: str | None = None,
    progress: Progress = silent,
) -> tuple[Manifest, Certificate]:
    """(manifest, certificate) of the instance in `directory` against the checkpoint folder `model`.

    Its signature, digests and secrets are checked against `home` first. `samples` random sequences are drawn, and
    the ones in the file `ids` are run with them. Raises `ConfigurationError` for input that is refused,
    `IntegrityError` where the instance is not what was signed or `model` has not the form of its source; whether
    the certificate passed is the caller's to ask.
    """
    if not directory.is_dir():
        raise ConfigurationError.because("instance", "no such folder", "an instance that protect has written")
    if samples == 0 and ids is None:
        raise ConfigurationError.because("samples", 0, "1 to 64, or 0 with a file of ids")
    source = Checkpoint.open(model)
    inspected = inspect(directory, home.developer.public_key(), home.sealing)
    manifest, grant = inspected.manifest, inspected.grant
    root = open_secrets((directory / "secrets.sealed").read_bytes(), home.sealing).root
    planned = plan(
        source.config,
        source.headers,
        manifest.preset,
        root,
        accept_tied_head=True,  # as it was when the instance was made
        accept_token_cipher=True,
    )
    require_same_meaning(source.config, planned)
    _require_form(planned, manifest)
    if length is not None and length > manifest.max_positions:
        raise ConfigurationError.because("length", length, f"at most {manifest.max_positions}, the model's positions")
    given = read_ids(ids, vocabulary=manifest.vocabulary, max_positions=manifest.max_positions) if ids else ()
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
    certification = Certification(
        files,
        source,
        planned,
        samples=samples,
        length=length or LENGTH,
        seed=seed,
        given=given,
        compute_dtype=compute_dtype,
    )
    with Stages(progress).stage("certificate", certification.steps) as advance:
        return manifest, certification.run(advance)


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
