"""Policies: what evidence is accepted, written down, hashed and pinned.

A policy that names no measurement refuses to exist. Clients name MRENCLAVEs; only a key service may also accept a
signer (MRSIGNER with product and minimum SVN), because it, unlike a client, answers for what that signer releases.

    version = [1, 0]
    mode = "production"
    audience = "client"
    measurements = ["<64 hex digits>"]
    minimum_tcb_evaluation_number = 17

    [[accepted_statuses]]
    status = "UpToDate"

    [[accepted_statuses]]
    status = "SWHardeningNeeded"
    advisories = ["INTEL-SA-00615"]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from stip_protocol import toml
from stip_protocol.attestation.roots import INTEL_SGX_ROOT_SHA256
from stip_protocol.documents import Document, explain
from stip_protocol.errors import ConfigurationError, PolicyInvalid, VersionUnsupported

POLICY_LIMIT = 256 * 1024
"""Bytes of the largest policy file."""
DAY = 24 * 3600

TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
]
"""Intel's TCB statuses that a policy may accept. `Revoked` cannot be accepted."""


def _from_hex(value: object) -> object:
    return bytes.fromhex(value) if isinstance(value, str) else value


Bytes32 = Annotated[bytes, BeforeValidator(_from_hex), Field(min_length=32, max_length=32)]
Bytes16 = Annotated[bytes, BeforeValidator(_from_hex), Field(min_length=16, max_length=16)]
Svn = Annotated[int, Field(ge=0, le=0xFFFF)]
Advisory = Annotated[str, Field(pattern=r"^INTEL-(SA|DOC)-[0-9]{5}$")]


class _Rule(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)


class AcceptedStatus(_Rule):
    """A TCB status with the advisories that may come with it: any other advisory refuses."""

    status: TcbStatus
    advisories: Annotated[tuple[Advisory, ...], Field(strict=False)] = ()


class AcceptedSigner(_Rule):
    """A signer's product from some security version on. For key services only."""

    mrsigner: Bytes32
    isv_prod_id: Svn
    minimum_isv_svn: Svn


class EvidenceRules(Document):
    """What evidence of any TEE is held to. Every field is a condition; all must hold.

    `mode` decides the trust anchor and nothing else does: `production` is Intel's root; `development` is the
    simulated root with the SHA-256 `simulated_root_sha256`, or Intel's where none is named.
    """

    model_config = ConfigDict(extra="forbid")
    title: ClassVar[str]
    """What messages call such a policy."""

    mode: Literal["production", "development"]
    accepted_statuses: Annotated[tuple[AcceptedStatus, ...], Field(strict=False, min_length=1)] = (
        AcceptedStatus(status="UpToDate"),
    )
    minimum_tcb_evaluation_number: Annotated[int, Field(ge=0)] = 0
    """Refuses older rounds of Intel's TCB recovery than this one."""
    collateral_max_age_seconds: Annotated[int, Field(gt=0, le=400 * DAY)] = 30 * DAY
    platforms: Annotated[tuple[Bytes16, ...], Field(strict=False, min_length=1)] | None = None
    """Enrolled platforms by PPID or platform instance id; None accepts any genuine platform."""
    simulated_root_sha256: Bytes32 | None = None

    @model_validator(mode="after")
    def _shared_rules(self) -> Self:
        if self.mode == "production" and self.simulated_root_sha256 is not None:
            raise ValueError("simulated_root_sha256: got one in production mode, allowed: development mode only")
        if self.simulated_root_sha256 == INTEL_SGX_ROOT_SHA256:
            raise ValueError("simulated_root_sha256: got Intel's root, allowed: the hash of a simulated root")
        statuses = [accepted.status for accepted in self.accepted_statuses]
        if len(set(statuses)) != len(statuses):
            raise ValueError("accepted_statuses: a status is named twice")
        return self

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Validate a policy from configuration (byte strings as hex). Raises `PolicyInvalid`, `VersionUnsupported`."""
        fields = dict(mapping)
        version = fields.pop("version", list(cls.version))
        if not (isinstance(version, list | tuple) and len(version) == 2 and all(type(part) is int for part in version)):
            raise PolicyInvalid.because("version", ascii(version)[:64], "[major, minor]")
        if version[0] != cls.version[0]:
            raise VersionUnsupported.because(f"{cls.title} version", list(version), f"major {cls.version[0]}")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise PolicyInvalid(f"{cls.title}: {explain(error)}", field=_field(error)) from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a TOML policy. Raises `PolicyInvalid`, `VersionUnsupported`, `ConfigurationError` (no such file)."""
        try:
            with path.open("rb") as file:
                text = file.read(POLICY_LIMIT + 1)
        except OSError as error:
            raise ConfigurationError(f"{cls.title} {path}: {error.strerror}") from error
        if len(text) > POLICY_LIMIT:
            raise PolicyInvalid.because(cls.title, f"more than {POLICY_LIMIT} bytes", "a smaller file")
        try:
            tables = toml.read(text)
        except ValueError as error:
            raise PolicyInvalid(f"{cls.title} {path}: {error}") from None
        return cls.from_mapping(tables)


class EvidencePolicy(EvidenceRules):
    """What evidence of an SGX enclave is accepted."""

    context: ClassVar[str] = "stip/evidence-policy"
    title: ClassVar[str] = "evidence policy"

    audience: Literal["client", "keyservice"] = "client"
    measurements: Annotated[tuple[Bytes32, ...], Field(strict=False, max_length=256)] = ()
    """MRENCLAVEs."""
    signers: Annotated[tuple[AcceptedSigner, ...], Field(strict=False, max_length=64)] = ()

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.audience == "client" and self.signers:
            raise ValueError("signers: a client accepts measurements only, got signers")
        if not self.measurements and not self.signers:
            raise ValueError("measurements: got none, allowed: at least one (an empty policy accepts nobody)")
        return self


def _field(error: ValidationError) -> str | None:
    first = error.errors(include_input=False, include_url=False)[0]
    return str(first["loc"][0]) if first["loc"] else first["msg"].removeprefix("Value error, ").partition(":")[0]
