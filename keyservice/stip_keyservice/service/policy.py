"""The key service's policy: which enclaves get keys, and how much a lease allows.

    version = [1, 0]

    [evidence]                      # stip_protocol.attestation.EvidencePolicy
    mode = "production"
    audience = "keyservice"
    measurements = ["<MRENCLAVE, 64 hex digits>"]

    [lease]
    seconds = 900                   # life of one lease; renewed by heartbeat
    tokens = 1024                   # chunk debited at once
    heartbeat_tokens = 64           # revocation reaches an enclave within this many tokens
    audience = "gateway.stip"

    [release]
    nonce_seconds = 60
        delegation_seconds = 86400      # the longest delegation accepted

    [leakage]                       # see stip_keyservice.service.leakage
    required = true

There is no default for what evidence is accepted: a policy without `[evidence]` refuses to load, and so does
one with a rule it does not know.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from stip_keyservice.service.leakage import LeakagePolicy
from stip_protocol import canonical
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.documents import explain
from stip_protocol.errors import PolicyInvalid, VersionUnsupported
from stip_protocol.leakage import Leakage
from stip_protocol.release import DELEGATION_LIFE_LIMIT
from stip_protocol.runtime.config import Settings

POLICY_LIMIT = 256 * 1024
"""Bytes of the largest policy file."""
POLICY_MAJOR = 1


class LeasePolicy(Settings):
    """What one lease allows."""

    seconds: int = Field(default=900, ge=30, le=24 * 3600)
    tokens: int = Field(default=1024, ge=1, le=2**31 - 1)
    """Rows debited at once: a first lease admits at most this many, a renewal as many beyond what was fed."""
    heartbeat_tokens: int = Field(default=64, ge=1, le=2**20)
    audience: str = Field(default="gateway.stip", min_length=1, max_length=253)
    grace_seconds: int = Field(default=300, ge=0, le=24 * 3600)
    """How long after its end a lease can still be renewed."""


class ReleasePolicy(Settings):
    """Bounds of the release protocol."""

    nonce_seconds: int = Field(default=60, ge=1, le=600)
    delegation_seconds: int = Field(default=DELEGATION_LIFE_LIMIT, ge=60, le=DELEGATION_LIFE_LIMIT)


class Policy(Settings):
    """The whole policy, validated."""

    version: tuple[int, int] = (POLICY_MAJOR, 0)
    evidence: EvidencePolicy
    lease: LeasePolicy = LeasePolicy()
    release: ReleasePolicy = ReleasePolicy()
    leakage: LeakagePolicy | None = None
    """None: instances are served whatever leaks, audited or not."""

    @field_validator("evidence", mode="before")
    @classmethod
    def _evidence(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return EvidencePolicy.from_mapping({"audience": "keyservice", **value})
        return value

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.version[0] != POLICY_MAJOR:
            raise VersionUnsupported.because("policy version", list(self.version), f"major {POLICY_MAJOR}")
        if self.evidence.audience != "keyservice":
            raise ValueError(f"evidence.audience: got {self.evidence.audience}, allowed: keyservice")
        if self.lease.heartbeat_tokens > self.lease.tokens:
            raise ValueError(
                f"lease.heartbeat_tokens: got {self.lease.heartbeat_tokens}, allowed: at most {self.lease.tokens}"
            )
        return self

    @property
    def simulated(self) -> bool:
        """True where a simulated TEE is trusted: nothing is protected."""
        return self.evidence.simulated_root_sha256 is not None

    def require_measured(self, measured: Leakage | None, preset: str) -> None:
        """Hold what an audit measured (None: nothing) against the maxima. Raises `LeakageRefused`."""
        if self.leakage is not None:
            self.leakage.require(measured, preset)

    def digest(self) -> bytes:
        """SHA-256 of the policy's meaning: comments and order in the file do not count."""
        meaning = [
            "stip/keyservice-policy",
            list(self.version),
            self.evidence.to_bytes(),
            self.lease.model_dump(),
            self.release.model_dump(),
        ]
        if self.leakage is not None:
            meaning.append(self.leakage.model_dump())
        return canonical.digest(meaning)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a policy file. Raises `PolicyInvalid` naming file and rule, `VersionUnsupported`."""
        try:
            with path.open("rb") as file:
                data = file.read(POLICY_LIMIT + 1)
        except OSError as error:
            raise PolicyInvalid(f"policy {path}: {error.strerror}") from None
        if len(data) > POLICY_LIMIT:
            raise PolicyInvalid.because(f"policy {path}", "a larger file", f"at most {POLICY_LIMIT} bytes")
        try:
            return cls.model_validate(tomllib.loads(data.decode()))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PolicyInvalid(f"policy {path}: not TOML: {error}") from None
        except ValidationError as error:
            raise PolicyInvalid(f"policy {path}: {explain(error)}") from None
