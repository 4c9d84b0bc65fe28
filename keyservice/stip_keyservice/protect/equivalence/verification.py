"""Certifying an instance that exists: from its folder, its source and the home that opens it."""

from __future__ import annotations

from pathlib import Path

from stip_keyservice.home import Home
from stip_keyservice.protect.equivalence.certificate import Certificate
from stip_keyservice.protect.equivalence.certification import LENGTH, Certification
from stip_keyservice.protect.equivalence.inputs import read_ids
from stip_keyservice.protect.equivalence.opening import open_instance
from stip_keyservice.protect.progress import Progress, Stages, silent
from stip_protocol.errors import ConfigurationError
from stip_protocol.manifest import Manifest


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
    if samples == 0 and ids is None:
        raise ConfigurationError.because("samples", 0, "1 to 64, or 0 with a file of ids")
    opened = open_instance(directory, model, home)
    manifest = opened.manifest
    if length is not None and length > manifest.max_positions:
        raise ConfigurationError.because("length", length, f"at most {manifest.max_positions}, the model's positions")
    given = read_ids(ids, vocabulary=manifest.vocabulary, max_positions=manifest.max_positions) if ids else ()
    certification = Certification(
        opened.files,
        opened.source,
        opened.planned,
        samples=samples,
        length=length or LENGTH,
        seed=seed,
        given=given,
        compute_dtype=compute_dtype,
    )
    with Stages(progress).stage("certificate", certification.steps) as advance:
        return manifest, certification.run(advance)
