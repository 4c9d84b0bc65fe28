"""The server part of an instance before an engine loads it: signature, digests, headers. The same for every engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors import SafetensorError, safe_open

from stip_protocol.errors import CheckpointInvalid, PresetRefused
from stip_protocol.manifest import Manifest, check_files
from stip_protocol.tensor import FRAME_LIMIT, SAFETENSORS_DTYPE, row_bytes
from stip_server.engine import Form


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files are those of a signed manifest, with tensors of its dtype."""

    folder: Path
    manifest: Manifest
    digest: bytes
    """SHA-256 of manifest.json."""

    @property
    def form(self) -> Form:
        """What sessions of this instance are answered with."""
        return Form(self.manifest.output)

    @classmethod
    def open(cls, instance: Path, developer: Ed25519PublicKey, forms: tuple[Form, ...]) -> Checkpoint:
        """Check the server part of an instance, for an engine that answers with `forms`.

        Raises `SignatureInvalid` and `ManifestMismatch` before a tensor is looked at, `CheckpointInvalid` where the
        files are not what the manifest says, `PresetRefused` where the engine does not serve its output.
        """
        manifest, digest = Manifest.load(instance / "manifest.json", developer)
        alone = Form(manifest.output) is Form.IDS
        if alone != (manifest.preset == "throughput"):
            raise PresetRefused.because("preset", manifest.preset, f"one whose output is {manifest.output}")
        if manifest.output not in forms:
            served = f"one whose output is {' or '.join(forms)}; another engine generates by itself"
            raise PresetRefused.because("preset", manifest.preset, served)
        folder = instance / "server"
        if not folder.is_dir():
            raise CheckpointInvalid.because("server", "no such folder", "the server part of the instance")
        check_files(folder, dict(manifest.server))
        _require_dtype(folder, manifest)
        checkpoint = cls(folder, manifest, digest)
        if checkpoint.form is Form.TOP and row_bytes(manifest.dtype, manifest.vocabulary) > FRAME_LIMIT:
            raise CheckpointInvalid.because("vocabulary", manifest.vocabulary, f"a logits row of {FRAME_LIMIT} bytes")
        return checkpoint

    def require_shape(self, width: int, logit_cap: float | None) -> None:
        """Hold the checkpoint's configuration to its manifest. Raises `CheckpointInvalid`."""
        if width != self.manifest.width:
            raise CheckpointInvalid.because("hidden_size", width, self.manifest.width)
        if logit_cap != self.manifest.logit_cap:
            raise CheckpointInvalid.because("final_logit_softcapping", logit_cap, self.manifest.logit_cap)


def _require_dtype(folder: Path, manifest: Manifest) -> None:
    """Every stored tensor has the manifest's dtype: loaders would convert others without a word."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    stored = file.get_slice(name).get_dtype()
                    if SAFETENSORS_DTYPE.get(stored) != manifest.dtype:
                        raise CheckpointInvalid.because(f"dtype of {name}", stored, manifest.dtype)
        except SafetensorError:
            raise CheckpointInvalid.because(path.name, "no whole safetensors file", "a safetensors file") from None
