"""Every refusal of the system, as one tree with stable codes.

    StipError
    ├── ConfigurationError            fix the configuration
    │   ├── ArchitectureUnsupported
    │   ├── CheckpointInvalid         a file, a tensor, a shape, a dtype
    │   ├── PresetRefused
    │   ├── Unrepresentable           no lossless form exists for this model
    │   ├── PolicyInvalid
    │   └── VersionUnsupported
    ├── IntegrityError                stop: something was tampered with
    │   ├── SignatureInvalid
    │   ├── AuditLogForked            a key service that shows different logs to different people
    │   ├── ManifestMismatch
    │   └── SealedPartInvalid
    ├── AttestationError              re-attest, or stop
    │   ├── EvidenceMalformed
    │   ├── EvidenceRefused           signatures, chains, TCB status
    │   ├── CollateralExpired
    │   ├── MeasurementRefused
    │   ├── DebugEnclaveRefused
    │   ├── ReportDataMismatch
    │   ├── SimulatedEvidenceRefused
    │   └── ChannelChanged            another certificate than the verified one
    ├── ReleaseError                  the key service says no
    │   ├── NonceRefused
    │   ├── DelegationRefused
    │   ├── UserRefused
    │   ├── EnclaveRevoked
    │   ├── InstanceRefused
    │   ├── LeakageRefused            audit the instance, or change the policy
    │   └── BudgetSpent
    ├── LeaseError                    the gateway says no
    │   ├── LeaseMalformed
    │   ├── LeaseExpired
    │   ├── LeaseForeign              audience, instance, epoch or certificate of another
    │   ├── LeaseSpent
    │   └── LeaseRevoked
    ├── RequestInvalid                the caller's message is wrong
    │   ├── FrameInvalid              envelope, size, counts
    │   ├── TensorInvalid             width, dtype, length, non-finite values
    │   ├── PositionRefused
    │   └── SessionUnknown
    └── Unavailable                   retry
        ├── Overloaded
        ├── Draining
        ├── ReplicaLost
        ├── DeadlineExceeded
        ├── CollateralUnavailable     no source of collateral answers, and none is kept
        ├── ClockRefused              a clock that runs behind what was decided already
        ├── PolicyOutdated            a replica of the key service that has not read the policy of today
        └── Cancelled

A code is stable across versions: programs match on `StipError.code`, people read the message and the
`action`. Messages name a field, what came and what is allowed; they never quote a prompt, an id, a key or
an embedding, because they cross trust boundaries and land in logs. They are one line of printable text, whoever
wrote them: a peer's message reaches the terminal of somebody who has not verified that peer yet.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Self

MESSAGE_LIMIT = 600
"""Characters of a message that may cross a network boundary: longer ones are cut."""
_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


class Action(StrEnum):
    """What the reader of an error should do next."""

    FIX_CONFIGURATION = "fix_configuration"
    FIX_REQUEST = "fix_request"
    RETRY = "retry"
    REATTEST = "reattest"
    STOP = "stop"


class StipError(Exception):
    """Root of the tree. `grpc_status` names the gRPC status code that carries it between processes."""

    code: ClassVar[str] = "internal"
    action: ClassVar[Action] = Action.STOP
    grpc_status: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, field: str | None = None, retry_after: float | None = None) -> None:
        """`retry_after`: seconds after which trying again may help, where whoever refuses can tell."""
        self.message = "".join(character if character.isprintable() else _UNPRINTABLE for character in message)
        super().__init__(self.message)
        self.field = field
        self.retry_after = retry_after

    @classmethod
    def because(cls, field: str, got: object, allowed: object) -> Self:
        """The usual sentence: `field`, what came and what is allowed. Not for secret values."""
        return cls(f"{field}: got {got!s}, allowed: {allowed!s}", field=field)

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class ConfigurationError(StipError):
    code = "configuration_invalid"
    action = Action.FIX_CONFIGURATION
    grpc_status = "FAILED_PRECONDITION"


class ArchitectureUnsupported(ConfigurationError):
    code = "architecture_unsupported"


class CheckpointInvalid(ConfigurationError):
    code = "checkpoint_invalid"


class PresetRefused(ConfigurationError):
    code = "preset_refused"


class Unrepresentable(ConfigurationError):
    code = "unrepresentable"


class PolicyInvalid(ConfigurationError):
    code = "policy_invalid"


class VersionUnsupported(ConfigurationError):
    code = "version_unsupported"


class IntegrityError(StipError):
    code = "integrity_violated"
    grpc_status = "DATA_LOSS"


class SignatureInvalid(IntegrityError):
    code = "signature_invalid"


class AuditLogForked(IntegrityError):
    code = "audit_log_forked"


class ManifestMismatch(IntegrityError):
    code = "manifest_mismatch"


class SealedPartInvalid(IntegrityError):
    code = "sealed_part_invalid"


class AttestationError(StipError):
    code = "attestation_refused"
    action = Action.REATTEST
    grpc_status = "UNAUTHENTICATED"


class EvidenceMalformed(AttestationError):
    code = "evidence_malformed"
    action = Action.STOP


class EvidenceRefused(AttestationError):
    code = "evidence_refused"
    action = Action.STOP


class CollateralExpired(AttestationError):
    code = "collateral_expired"


class MeasurementRefused(AttestationError):
    code = "measurement_refused"
    action = Action.STOP


class DebugEnclaveRefused(AttestationError):
    code = "debug_enclave_refused"
    action = Action.STOP


class ReportDataMismatch(AttestationError):
    code = "report_data_mismatch"


class SimulatedEvidenceRefused(AttestationError):
    code = "simulated_evidence_refused"
    action = Action.STOP


class ChannelChanged(AttestationError):
    code = "channel_changed"


class ReleaseError(StipError):
    code = "release_refused"
    grpc_status = "PERMISSION_DENIED"


class NonceRefused(ReleaseError):
    code = "nonce_refused"
    action = Action.RETRY


class DelegationRefused(ReleaseError):
    code = "delegation_refused"


class UserRefused(ReleaseError):
    code = "user_refused"


class EnclaveRevoked(ReleaseError):
    code = "enclave_revoked"


class InstanceRefused(ReleaseError):
    code = "instance_refused"


class LeakageRefused(ReleaseError):
    code = "leakage_refused"
    action = Action.FIX_CONFIGURATION


class BudgetSpent(ReleaseError):
    code = "budget_spent"
    grpc_status = "RESOURCE_EXHAUSTED"


class LeaseError(StipError):
    code = "lease_refused"
    action = Action.REATTEST
    grpc_status = "PERMISSION_DENIED"


class LeaseMalformed(LeaseError):
    code = "lease_malformed"
    action = Action.STOP


class LeaseExpired(LeaseError):
    code = "lease_expired"


class LeaseForeign(LeaseError):
    code = "lease_foreign"
    action = Action.STOP


class LeaseSpent(LeaseError):
    code = "lease_spent"
    grpc_status = "RESOURCE_EXHAUSTED"


class LeaseRevoked(LeaseError):
    code = "lease_revoked"
    action = Action.STOP


class RequestInvalid(StipError):
    code = "request_invalid"
    action = Action.FIX_REQUEST
    grpc_status = "INVALID_ARGUMENT"


class FrameInvalid(RequestInvalid):
    code = "frame_invalid"


class TensorInvalid(RequestInvalid):
    code = "tensor_invalid"


class PositionRefused(RequestInvalid):
    code = "position_refused"


class SessionUnknown(RequestInvalid):
    code = "session_unknown"
    grpc_status = "NOT_FOUND"


class Unavailable(StipError):
    code = "unavailable"
    action = Action.RETRY
    grpc_status = "UNAVAILABLE"


class Overloaded(Unavailable):
    code = "overloaded"
    grpc_status = "RESOURCE_EXHAUSTED"


class Draining(Unavailable):
    code = "draining"


class ReplicaLost(Unavailable):
    code = "replica_lost"


class DeadlineExceeded(Unavailable):
    code = "deadline_exceeded"
    grpc_status = "DEADLINE_EXCEEDED"


class CollateralUnavailable(Unavailable):
    code = "collateral_unavailable"


class ClockRefused(Unavailable):
    code = "clock_refused"
    action = Action.FIX_CONFIGURATION


class PolicyOutdated(Unavailable):
    code = "policy_outdated"


class Cancelled(Unavailable):
    code = "cancelled"
    grpc_status = "CANCELLED"


def _walk(cls: type[StipError]) -> list[type[StipError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _walk(child))]


BY_CODE: dict[str, type[StipError]] = {cls.code: cls for cls in _walk(StipError)}
"""The tree by stable code: how an error that crossed a process boundary becomes itself again."""


def from_code(code: str, message: str, retry_after: float | None = None) -> StipError:
    """The error a peer reported. An unknown code (a newer peer) becomes the root, with the code in the message."""
    known = BY_CODE.get(code)
    message = message[:MESSAGE_LIMIT]
    if known is None:
        return StipError(f"{message} (unknown code {code[:64]!r})", retry_after=retry_after)
    return known(message, retry_after=retry_after)
