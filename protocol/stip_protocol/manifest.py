"""The two signed manifests of an instance.

`manifest.json` is public and travels to the operator: what the instance is and what its files hash to, and
nothing that names or digests the source model. `client/manifest.json` travels to users with the tokenizer.
Both are signed by the model developer (detached Ed25519 in `<name>.sig`). The digest of an instance is the
SHA-256 of the bytes of `manifest.json`.

    INSTANCE/
      manifest.json  manifest.json.sig
      server/        a Hugging Face checkpoint without tokenizer or names
      enclave/       *.sealed (stip_protocol.sealed)
      client/        manifest.json(.sig), tokenizer files
      secrets.sealed HPKE-sealed to the key service
      certificate.json
      leakage.json   where it was audited: the whole report, of which the manifest has the summary
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stip_protocol.documents import explain
from stip_protocol.durable import write_atomically
from stip_protocol.errors import ManifestMismatch, SignatureInvalid, VersionUnsupported
from stip_protocol.leakage import Leakage
from stip_protocol.lease import Epoch, InstanceId
from stip_protocol.versions import MANIFEST_VERSION

MANIFEST_LIMIT = 4 << 20
"""Bytes of the largest manifest read."""
SIGNING = "signing"
"""Folder in an instance in which new documents wait for their places: while it is there, the instance is between two
manifests."""

Preset = Literal["paper", "hardened", "throughput"]
Dtype = Literal["float64", "float32", "float16", "bfloat16"]
OutputForm = Literal["hidden", "top", "ids"]
"""What the server answers with: a hidden state, its largest permuted logits, permuted ids."""
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}$")]
"""A plain name inside its folder: no separator, no leading dot."""


class FileDigest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: Hex32
    size: Annotated[int, Field(ge=0)]

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Digest of what a file is written from."""
        return cls(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


class _SignedJson(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)
    version: tuple[int, int] = MANIFEST_VERSION

    def to_json(self) -> bytes:
        """The bytes that are written, hashed and signed."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    @classmethod
    def load(cls, path: Path, key: Ed25519PublicKey) -> tuple[Self, bytes]:
        """(manifest, SHA-256 of its bytes). Raises `SignatureInvalid`, `ManifestMismatch`, `VersionUnsupported`."""
        data, signature = _read(path), _read(path.with_name(path.name + ".sig"))
        return cls.parse(data, signature, key), hashlib.sha256(data).digest()

    @classmethod
    def parse(cls, data: bytes, signature: bytes, key: Ed25519PublicKey) -> Self:
        try:
            key.verify(signature, cls._context() + data)
        except InvalidSignature:
            raise SignatureInvalid(f"{cls.__name__}: not signed by the expected developer key") from None
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            raise ManifestMismatch(f"{cls.__name__}: {explain(error)}") from None
        if manifest.version[0] != MANIFEST_VERSION[0]:
            raise VersionUnsupported.because(
                f"{cls.__name__} version", manifest.version, f"major {MANIFEST_VERSION[0]}"
            )
        return manifest

    def write(self, path: Path, key: Ed25519PrivateKey) -> bytes:
        """Write manifest and signature, each whole or not at all; returns the SHA-256 of the manifest's bytes."""
        data = self.to_json()
        write_atomically(path, data)
        write_atomically(path.with_name(path.name + ".sig"), key.sign(self._context() + data))
        return hashlib.sha256(data).digest()

    @classmethod
    def _context(cls) -> bytes:
        return f"stip/{cls.__name__}\x00".encode()


class Manifest(_SignedJson):
    """Public: what an instance is. Held by the key service, the operator and the enclave."""

    instance: InstanceId
    epoch: Epoch
    preset: Preset
    dtype: Dtype
    width: Count
    """Residual width d."""
    vocabulary: Count
    max_positions: Count
    output: OutputForm
    logit_cap: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Final logits are cap·tanh(logits / cap), by whoever holds the head."""
    server: dict[FileName, FileDigest]
    enclave: dict[FileName, FileDigest]
    """Digests of the *ciphertext*."""
    certificate: dict[str, Any]
    """Summary of the equivalence certificate: top-1 agreement, differences, dtype, seeds."""
    leakage: Leakage | None = None
    """What an audit measured; None where there was none. `leakage.json` lies beside this manifest then."""


class ClientManifest(_SignedJson):
    """Travels with the tokenizer to users; never to the operator."""

    instance: InstanceId
    epoch: Epoch
    vocabulary: Count
    max_positions: Count
    stop_ids: tuple[int, ...]
    files: dict[FileName, FileDigest]
    """Tokenizer files beside this manifest."""


def file_digest(path: Path) -> FileDigest:
    """Digest of a file, streamed."""
    with path.open("rb") as file:
        return FileDigest(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def check_files(folder: Path, expected: dict[str, FileDigest]) -> None:
    """Raise `ManifestMismatch` where a listed file is missing, unreadable or differs, or an unlisted one is present."""
    try:
        present = {path.name for path in folder.iterdir()} - {"manifest.json", "manifest.json.sig"}
        if extra := sorted(present - expected.keys()):
            raise ManifestMismatch.because("files", f"unlisted {extra[0]}", "the files of the signed manifest")
        for name, digest in expected.items():
            _check_file(folder / name, digest)
    except OSError as error:
        what = Path(error.filename or folder).name
        raise ManifestMismatch(f"{what}: {error.strerror}", field=what) from None


def _check_file(path: Path, digest: FileDigest) -> None:
    if not path.is_file():
        raise ManifestMismatch.because(path.name, "no such file", f"{digest.size} bytes")
    if path.stat().st_size != digest.size:
        raise ManifestMismatch.because(f"{path.name} size", path.stat().st_size, digest.size)
    if not hmac.compare_digest(file_digest(path).sha256, digest.sha256):
        raise ManifestMismatch.because(f"{path.name} sha256", "another digest", digest.sha256)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST_LIMIT + 1)
    except OSError as error:
        raise ManifestMismatch(f"{path.name}: {error.strerror}", field=path.name) from None
    if len(data) > MANIFEST_LIMIT:
        raise ManifestMismatch.because(path.name, "a larger file", f"at most {MANIFEST_LIMIT} bytes")
    return data
