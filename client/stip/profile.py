"""Profiles: which enclave a user talks to, and by what evidence they recognise it.

    enclave = "enclave.example:7443"
    server_name = "enclave.example"
    instance = "<32 hex digits>"
    tokenizer = "instance/client"
    developer_key = "developer.pub"
    user_key = "~/.stip/keys/default.pem"
    policy = "policy.toml"
    service_key = "service.pub"   # optional

Relative paths are relative to the profile. A simulated TEE needs `mode = "development"` *and* `simulated_root`
here, and a policy that pins that root: nothing in the environment can replace either.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, model_validator

from stip import heads
from stip.heads import HeadMemory
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.errors import ConfigurationError, PolicyInvalid
from stip_protocol.lease import InstanceId
from stip_protocol.release import DELEGATION_LIFE_LIMIT
from stip_protocol.runtime import config
from stip_protocol.runtime.config import Address, ConfigPath, Settings
from stip_protocol.runtime.files import read_ed25519, read_file

ROOT_LIMIT = 16 * 1024
"""Bytes of the largest root certificate read."""


@dataclass(frozen=True, slots=True)
class Trust:
    """What decides whether evidence is believed."""

    policy: EvidencePolicy
    simulated_root: bytes | None
    """DER; None where only Intel's root counts."""


class Profile(Settings):
    """One enclave, one instance, one user. Frozen; made from a file by `Profile.load`."""

    enclave: Address
    server_name: Annotated[str, Field(min_length=1, max_length=253)]
    """The DNS name in the enclave's certificate."""
    instance: InstanceId
    tokenizer: ConfigPath
    """The `client/` folder of the instance: signed manifest and tokenizer files."""
    developer_key: ConfigPath
    """Ed25519 public key (PEM) of the model developer, who signs manifests."""
    user_key: ConfigPath
    """Ed25519 private key (PEM, mode 0600), made by `stip keys create`."""
    policy: ConfigPath
    """TOML of a `stip_protocol.attestation.policy.EvidencePolicy` with audience "client"."""
    mode: Literal["production", "development"] = "production"
    simulated_root: ConfigPath | None = None
    """Root certificate (DER) of a simulated TEE; development only."""
    service_key: ConfigPath | None = None
    """Ed25519 public key (PEM) of the key service. With it, the heads of its audit log that come with sessions are held
    against each other (`stip.heads`); without it that check is skipped, and said to be."""
    audit_heads: ConfigPath | None = None
    """Folder where those heads are remembered; `heads` in STIP_HOME by default."""
    delegation_seconds: Annotated[int, Field(ge=60, le=DELEGATION_LIFE_LIMIT)] = 3600
    """Life of the delegations that this user signs for a verified enclave."""

    @model_validator(mode="after")
    def _production_is_real(self) -> Self:
        if self.mode == "production" and self.simulated_root is not None:
            raise ValueError('simulated_root: got one in production mode, allowed: mode = "development" only')
        return self

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a profile. Raises `ConfigurationError` naming the file and the field."""
        return config.load(cls, Path(path))

    def trust(self) -> Trust:
        """The policy and the trust anchor, held against each other.

        Raises `ConfigurationError`, `PolicyInvalid`, `VersionUnsupported`.
        """
        policy = EvidencePolicy.load(self.policy)
        for field, got, allowed in (("audience", policy.audience, "client"), ("mode", policy.mode, self.mode)):
            if got != allowed:
                raise PolicyInvalid.because(f"{self.policy.name}: {field}", got, f"{allowed}, as the profile says")
        root = None
        if self.simulated_root is not None:
            root = read_file(self.simulated_root, field="simulated_root", limit=ROOT_LIMIT)
        pinned = policy.simulated_root_sha256
        if (root is None) != (pinned is None):
            missing, present = ("the profile", "the policy") if root is None else ("the policy", "the profile")
            raise ConfigurationError(
                f"simulated_root: {present} names a simulated root and {missing} does not, allowed: both or neither",
                field="simulated_root",
            )
        if root is not None and pinned is not None and hashlib.sha256(root).digest() != pinned:
            raise ConfigurationError.because("simulated_root", "another certificate", f"SHA-256 {pinned.hex()}")
        return Trust(policy, root)

    def developer(self) -> Ed25519PublicKey:
        """The key that manifests must be signed with. Raises `ConfigurationError`."""
        return read_ed25519(self.developer_key, field="developer_key")

    def memory(self) -> HeadMemory | None:
        """The remembered heads of the key service; None without its key. Raises `ConfigurationError`."""
        if self.service_key is None:
            return None
        return HeadMemory(self.audit_heads or heads.folder(), read_ed25519(self.service_key, field="service_key"))
