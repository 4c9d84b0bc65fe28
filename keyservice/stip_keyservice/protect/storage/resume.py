"""The record that lets an interrupted protection go on: which one it was, and its root secret.

`OUT.partial/resume` is a document signed by the developer. The root lies in it HPKE-sealed to the key service home's
own sealing key, never plain: whoever has the disk but not the home learns nothing, and cannot put in a root of their
own choice. What must be the same for two runs to make one instance is `inputs`.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field

from stip_protocol.documents import Document, Signed
from stip_protocol.errors import ConfigurationError, StipError
from stip_protocol.lease import Epoch, InstanceId
from stip_protocol.manifest import Preset
from stip_protocol.secrets_file import InstanceSecrets, open_secrets, seal_secrets

PACKAGES = ("stip", "torch", "numpy")
"""What draws keys and computes products: another version may draw or round otherwise."""


def _versions() -> str:
    return ", ".join(f"{package} {version(package)}" for package in PACKAGES)


class Inputs(BaseModel):
    """What, beside the root, decides the bytes of an instance. A refusal names the fields as they are named here."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    model: str
    """The source's fingerprint."""
    out: str
    """Where the instance goes: an absolute path. With the folder's number, a copied record is of no use elsewhere."""
    folder: int
    """Inode of the folder in which the instance is made."""
    preset: Preset
    epoch: Epoch
    instance: InstanceId | None = None
    """The instance that this is another epoch of; None: a fresh one."""
    seal_to: str
    """The recipient's X25519 public key, in hexadecimal."""
    accept_tied_head: bool
    accept_token_cipher: bool
    shard_bytes: int
    versions: str = Field(default_factory=_versions)


class Record(Document):
    """An unfinished protection."""

    context: ClassVar[str] = "stip/protect-resume"

    inputs: Inputs
    sealed: bytes
    """`InstanceSecrets`, to the home's sealing key; their manifest digest is still zeros."""

    @classmethod
    def of(cls, inputs: Inputs, secrets: InstanceSecrets, restart_key: X25519PrivateKey) -> Self:
        """The record of a protection that begins."""
        return cls(inputs=inputs, sealed=seal_secrets(secrets, restart_key.public_key()))

    def signed(self, developer: Ed25519PrivateKey) -> bytes:
        """The bytes that are stored."""
        return Signed.sign(self, developer).to_bytes()

    @classmethod
    def open(cls, data: bytes, developer: Ed25519PrivateKey, folder: Path) -> Self:
        """Raises `ConfigurationError` where the record is not by this home, or damaged."""
        try:
            return Signed.from_bytes(data).open(cls, developer.public_key())
        except StipError as error:
            raise _foreign(folder) from error

    def secrets(self, restart_key: X25519PrivateKey, folder: Path) -> InstanceSecrets:
        """What the interrupted run drew. Raises `ConfigurationError` where the home's key does not open it."""
        try:
            return open_secrets(self.sealed, restart_key)
        except StipError as error:
            raise _foreign(folder) from error

    def require_same(self, inputs: Inputs, folder: Path) -> None:
        """Raise `ConfigurationError` naming the first input that differs from the interrupted run's."""
        for name in Inputs.model_fields:
            got, before = getattr(inputs, name), getattr(self.inputs, name)
            if got != before:
                if name in _OPAQUE:
                    got, before = "another", "the same"
                allowed = f"{before}, as in the run that was interrupted; or remove {folder} to start anew"
                raise ConfigurationError.because(name, got, allowed)


_OPAQUE = frozenset({"model", "seal_to", "folder"})
"""Digests, keys and inodes say nothing to people, and the source's digest is secret."""


def _foreign(folder: Path) -> ConfigurationError:
    got = f"{folder}, whose record this key service home cannot read"
    return ConfigurationError.because("out", got, "that of the home it was begun with; or remove that folder")
