"""Protecting a checkpoint: from a folder of plain safetensors to a signed instance directory.

Everything is written into `OUT.partial` and renamed at the end, after the equivalence certificate has passed:
an instance that is there is whole. See `stip_protocol.manifest` for what lies in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from stip_keyservice.protect.certificate import SAMPLES_LIMIT, Certificate, certify, passes
from stip_keyservice.protect.checkpoint import CONFIG, GENERATION_CONFIG, Checkpoint
from stip_keyservice.protect.client_part import stop_ids_of, write_client_part
from stip_keyservice.protect.plan import Output, Plan, plan
from stip_keyservice.protect.protected_model import InstanceFiles
from stip_keyservice.protect.writer import SHARD_BYTES, output_bytes, write_atomically, write_checkpoint, write_tensors
from stip_protocol.errors import ConfigurationError, IntegrityError
from stip_protocol.manifest import FileDigest, Manifest, Preset, file_digest
from stip_protocol.sealed import SealedWriter
from stip_protocol.secrets_file import InstanceSecrets, grant_of, seal_secrets

SPACE_MARGIN = 64 << 20
"""Bytes of free disk beyond the tensors: headers, tokenizer, manifests."""

Progress = Callable[[str, int, int], None]
"""(stage, done, total): stages "server" and "enclave" count bytes, "certificate" counts sequences."""


@dataclass(frozen=True)
class Protected:
    """A finished protection."""

    directory: Path
    manifest: Manifest
    manifest_digest: bytes
    certificate: Certificate


def protect(
    model: Path,
    out: Path,
    *,
    preset: Preset,
    developer: Ed25519PrivateKey,
    seal_to: X25519PublicKey,
    epoch: int = 0,
    accept_tied_head: bool = False,
    samples: int = 4,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda stage, done, total: None,
) -> Protected:
    """Protect the checkpoint folder `model` under fresh keys into `out`, which is missing or empty.

    The manifest is signed by `developer`; the root secret leaves this process only sealed to `seal_to`. Raises
    `ConfigurationError` (bad input: nothing was written), `IntegrityError` where the protected instance does
    not compute what its source computes; then, as after any exception, nothing is left behind.
    """
    if not 1 <= samples <= SAMPLES_LIMIT:
        raise ConfigurationError.because("samples", samples, f"1 to {SAMPLES_LIMIT}")
    source = Checkpoint.open(model)
    root = secrets.token_bytes(32)
    planned = plan(source.config, source.headers, preset, root, accept_tied_head=accept_tied_head)
    stop_ids_of(source, planned.vocabulary)
    sealed_secrets = InstanceSecrets(
        instance=secrets.token_hex(16), epoch=epoch, preset=preset, manifest_digest=bytes(32), root=root
    )
    with _published(out, sum(map(output_bytes, (*planned.server, *planned.enclave)))) as folder:
        return _Protection(source, planned, sealed_secrets, folder, progress).run(
            developer, seal_to, samples, shard_bytes, out
        )


class _Protection:
    """One protection, into a folder of its own."""

    def __init__(
        self, source: Checkpoint, planned: Plan, root: InstanceSecrets, folder: Path, progress: Progress
    ) -> None:
        self._source = source
        self._plan = planned
        self._secrets = root  # bound to the manifest once there is one
        self._folder = folder
        self._progress = progress

    def run(
        self, developer: Ed25519PrivateKey, seal_to: X25519PublicKey, samples: int, shard_bytes: int, out: Path
    ) -> Protected:
        for part in ("server", "enclave", "client"):
            (self._folder / part).mkdir()
        self._write_server(shard_bytes)
        self._write_enclave()
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
            server=self._digests("server"),
            enclave=self._digests("enclave"),
            certificate=certificate.summary() | {"sha256": hashlib.sha256(stored).hexdigest()},
        )
        digest = manifest.write(self._folder / "manifest.json", developer)
        bound = identity.model_copy(update={"manifest_digest": digest})
        write_atomically(self._folder / "secrets.sealed", seal_secrets(bound, seal_to))
        return Protected(out, manifest, digest, certificate)

    def _write_server(self, shard_bytes: int) -> None:
        folder, planned = self._folder / "server", self._plan
        for name, content in ((CONFIG, planned.config), (GENERATION_CONFIG, planned.generation_config)):
            write_atomically(folder / name, (json.dumps(content, indent=2) + "\n").encode())
        advance = self._counter("server", sum(map(output_bytes, planned.server)))
        write_checkpoint(folder, planned.server, self._compute, advance, shard_bytes)

    def _write_enclave(self) -> None:
        advance = self._counter("enclave", sum(map(output_bytes, self._plan.enclave)))
        identity = self._secrets
        for output in self._plan.enclave:
            with SealedWriter(
                self._folder / "enclave" / f"{output.name}.sealed",
                key=grant_of(identity).part_key,
                instance=identity.instance,
                epoch=identity.epoch,
                preset=identity.preset,
            ) as sink:
                write_tensors(sink, [output], self._compute, advance)

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
        certificate = certify(
            files,
            self._source.directory,
            stored_dtype=planned.dtype,
            max_positions=planned.max_positions,
            samples=samples,
            advance=self._counter("certificate", samples * passes(planned.dtype, planned.preset)),
        )
        if not certificate.passed:
            raise IntegrityError(
                f"equivalence: got top-1 agreement {certificate.top1_with_ties:.4f} (ties counted) and a relative"
                f" difference of {certificate.relative_rms:.2e}, allowed: 1 and at most {certificate.bound:.0e}",
                field="equivalence",
            )
        return certificate

    def _compute(self, output: Output, rows: slice) -> torch.Tensor:
        return self._plan.compute(output, self._source, rows)

    def _digests(self, part: str) -> dict[str, FileDigest]:
        return {path.name: file_digest(path) for path in sorted((self._folder / part).iterdir())}

    def _counter(self, stage: str, total: int) -> Callable[[int], None]:
        done = 0
        self._progress(stage, done, total)

        def advance(step: int) -> None:
            nonlocal done
            done += step
            self._progress(stage, done, total)

        return advance


@contextmanager
def _published(out: Path, size: int) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and is removed otherwise."""
    out = out.absolute()
    partial = out.with_name(out.name + ".partial")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigurationError.because("out", f"{out}, which is not empty", "a missing or empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(out.parent).free) < size + SPACE_MARGIN:
            raise ConfigurationError.because("free disk space", f"{free} bytes", f"at least {size + SPACE_MARGIN}")
        partial.mkdir()
    except FileExistsError:
        allowed = "none: another protection runs, or one was killed and left it; then remove it"
        raise ConfigurationError.because("out", f"{partial} exists", allowed) from None
    except OSError as error:
        raise ConfigurationError(f"out {out}: {error.strerror}", field="out") from None
    try:
        yield partial
        partial.rename(out)
        _sync(out.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigurationError(f"out {out}: {error.strerror}", field="out") from error
        raise


def _sync(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
