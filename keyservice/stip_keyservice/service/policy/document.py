"""The policy file, TOML, version 1.1. Every table and rule: docs/policy.md.

    version = [1, 1]
    serial = 3                      # rises with each signed change

    [evidence]                      # stip_protocol.attestation.EvidencePolicy
    mode = "production"
    measurements = ["<MRENCLAVE, 64 hex digits>"]

    [lease]
    seconds = 900                   # life of one lease; renewed by heartbeat
    tokens = 1024                   # chunk debited at once
    heartbeat_tokens = 64           # revocation reaches an enclave within this many tokens
    audience = "gateway.stip"

    [release]
    nonce_seconds = 60
    delegation_seconds = 86400      # the longest delegation accepted

    [budgets]                       # stip_keyservice.service.policy.budgets
    tokens_per_day = 500_000

    [[instances]]                   # stip_keyservice.service.policy.access
    manifest = "<SHA-256 of manifest.json>"

    [leakage]                       # stip_keyservice.service.leakage
    required = true

    [canaries]
    per_bundle = 4

There is no default for what evidence is accepted: a policy without `[evidence]` refuses to load, and so does one with
a rule it does not know, one that names a rule twice, and one for production that does not say what it serves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from stip_keyservice.service.instances import Epoch, Instance
from stip_keyservice.service.leakage import LeakagePolicy
from stip_keyservice.service.policy.access import INSTANCES_LIMIT, InstanceRule, require_listed, require_served
from stip_keyservice.service.policy.budgets import Budgets
from stip_keyservice.service.policy.enclaves import require_enclave
from stip_keyservice.service.policy.meaning import Meaning, meaning
from stip_keyservice.service.policy.tables import Rules
from stip_keyservice.service.users import User
from stip_protocol import canonical, toml
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.documents import explain
from stip_protocol.errors import PolicyInvalid, VersionUnsupported
from stip_protocol.leakage import Leakage
from stip_protocol.release import CANARIES_LIMIT, DELEGATION_LIFE_LIMIT

if TYPE_CHECKING:
    from stip_keyservice.service.release import EnclaveFacts

POLICY_LIMIT = 256 * 1024
"""Bytes of the largest policy file."""
VERSION = (1, 1)
SERIAL_LIMIT = 2**31 - 1


class LeasePolicy(Rules):
    """What one lease allows."""

    seconds: int = Field(default=900, ge=30, le=24 * 3600)
    tokens: int = Field(default=1024, ge=1, le=2**31 - 1)
    """Rows debited at once: a first lease admits at most this many, a renewal as many beyond what was fed."""
    heartbeat_tokens: int = Field(default=64, ge=1, le=2**20)
    """The revocation bound: a running enclave renews, or stops, after so many generated tokens."""
    audience: str = Field(default="gateway.stip", min_length=1, max_length=253)
    grace_seconds: int = Field(default=300, ge=0, le=24 * 3600)
    """How long after its end a lease can still be renewed."""


class ReleasePolicy(Rules):
    """Bounds of the release protocol."""

    nonce_seconds: int = Field(default=60, ge=1, le=600)
    delegation_seconds: int = Field(default=DELEGATION_LIFE_LIMIT, ge=60, le=DELEGATION_LIFE_LIMIT)


class CanaryPolicy(Rules):
    """Sessions with known results that an enclave tries the server with."""

    per_bundle: int = Field(default=0, ge=0, le=CANARIES_LIMIT)
    """At most so many of an instance's canaries go with one bundle; 0: none."""


def _whole_numbers(value: object) -> object:
    """TOML has lists alone, and a tuple of strict numbers takes none."""
    return tuple(value) if isinstance(value, list) else value


class Policy(Rules):
    """The whole policy, validated."""

    version: Annotated[tuple[int, int], BeforeValidator(_whole_numbers)] = VERSION
    serial: int | None = Field(default=None, ge=1, le=SERIAL_LIMIT)
    """Rises with each signed change. Only a policy for development may do without."""
    evidence: EvidencePolicy
    lease: LeasePolicy = LeasePolicy()
    release: ReleasePolicy = ReleasePolicy()
    budgets: Budgets = Budgets()
    instances: Annotated[tuple[InstanceRule, ...], Field(strict=False, max_length=INSTANCES_LIMIT)] = ()
    """Empty, in development alone: every registered instance is served."""
    leakage: LeakagePolicy | None = None
    """None: instances are served whatever leaks, audited or not."""
    canaries: CanaryPolicy = CanaryPolicy()

    @field_validator("evidence", mode="before")
    @classmethod
    def _evidence(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return EvidencePolicy.from_mapping({"audience": "keyservice", **value})
        return value

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.version[0] != VERSION[0] or self.version[1] > VERSION[1]:
            allowed = f"up to {list(VERSION)}"
            raise VersionUnsupported.because("policy version", list(self.version), allowed)
        if self.evidence.audience != "keyservice":
            raise ValueError(f"evidence.audience: got {self.evidence.audience}, allowed: keyservice")
        if self.lease.heartbeat_tokens > self.lease.tokens:
            raise ValueError(
                f"lease.heartbeat_tokens: got {self.lease.heartbeat_tokens}, allowed: at most {self.lease.tokens}"
            )
        if self.evidence.mode == "production":
            if self.serial is None:
                raise ValueError("serial: got none, allowed: 1 or more in production, higher with each signed change")
            if not self.instances:
                raise ValueError("instances: got none, allowed: at least one [[instances]] in production")
        self.meaning()
        return self

    @property
    def simulated(self) -> bool:
        """True where a simulated TEE is trusted: nothing is protected."""
        return self.evidence.simulated_root_sha256 is not None

    def require_measured(self, measured: Leakage | None, preset: str) -> None:
        """Hold what an audit measured (None: nothing) against the maxima. Raises `LeakageRefused`."""
        if self.leakage is not None:
            self.leakage.require(measured, preset)

    def require_listed(self, manifest: bytes, kind: str) -> None:
        """Raises `InstanceRefused` where instances of that signed manifest are not served."""
        require_listed(self.instances, manifest, kind)

    def require_running(self, user: User, instance: Instance, epoch: Epoch, enclave: EnclaveFacts) -> None:
        """Everything that must hold of a lease, when it is issued and at each renewal.

        Raises `SimulatedEvidenceRefused`, `MeasurementRefused` and `EvidenceRefused` (the enclave), `InstanceRefused`
        and `UserRefused` (`[[instances]]`), `LeakageRefused`.
        """
        require_enclave(self.evidence, enclave)
        require_served(self.instances, instance, epoch, user)
        self.require_measured(epoch.leakage, epoch.preset)

    def meaning(self) -> Meaning:
        """The policy as nested maps, in which every rule stands."""
        return meaning(self)

    def digest(self) -> bytes:
        """SHA-256 of the policy's meaning: comments and order in the file do not count."""
        return canonical.digest(["stip/keyservice-policy", self.meaning()])

    @classmethod
    def parse(cls, data: bytes, *, name: str) -> Self:
        """The policy in a file's bytes. Raises `PolicyInvalid` naming `name` and the rule, `VersionUnsupported`."""
        if len(data) > POLICY_LIMIT:
            raise PolicyInvalid.because(f"policy {name}", "a larger file", f"at most {POLICY_LIMIT} bytes")
        try:
            tables = toml.read(data)
        except ValueError as error:
            raise PolicyInvalid(f"policy {name}: {error}") from None
        try:
            return cls.model_validate(tables)
        except ValidationError as error:
            raise PolicyInvalid(f"policy {name}: {explain(error)}") from None
        except PolicyInvalid as error:
            raise PolicyInvalid(f"policy {name}: {error.message}", field=error.field) from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a policy file, signed or not. Raises as `parse` does."""
        return cls.parse(read_policy(path), name=str(path))


def read_policy(path: Path) -> bytes:
    """The bytes of a policy file, one more than allowed at most. Raises `PolicyInvalid`."""
    try:
        with path.open("rb") as file:
            return file.read(POLICY_LIMIT + 1)
    except OSError as error:
        raise PolicyInvalid(f"policy {path}: {error.strerror}") from None
