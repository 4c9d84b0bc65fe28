"""The decision about a release: pure functions of the request, the policy, the clock and what is registered.

Nothing here reads a file, a database or a clock; every rule of the release protocol (`stip_protocol.release`)
that the key service must hold is in this module, in the order it is tried:

1. `read_claims`: the claims parse.
2. the claims' nonce is a challenge of this service in its time (`nonces`).
3. `examine`: the claims are made out to this service; the evidence is accepted and binds the claims; the
   delegation is signed by the key it names, not expired, and names this enclave key, measurement and instance.
4. (the caller takes the nonce out for good, whatever was decided)
   `require_entitled`: that key is of a present user's device, who may use the instance, which serves this kind.
5. (the caller looks up whether any of `subjects` was revoked: `revocations.require_none`)
6. (the caller holds enclave, user and epoch against the policy, as at every renewal: `Policy.require_running`)
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import ClassVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from pydantic import Field

from stip_keyservice.service.instances import Epoch, Instance
from stip_keyservice.service.linkca import read_link_key
from stip_keyservice.service.policy import Policy
from stip_keyservice.service.users import Device, User
from stip_protocol.attestation import verifier
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.verifier import Verified
from stip_protocol.documents import Document, Signed
from stip_protocol.errors import (
    DelegationRefused,
    FrameInvalid,
    InstanceRefused,
    ReleaseError,
    RequestInvalid,
    SignatureInvalid,
    UserRefused,
)
from stip_protocol.lease import CLOCK_SKEW, Bytes32, Tokens
from stip_protocol.release import DER_LIMIT, Claims, Delegation, report_data

CLAIMS_LIMIT = 2 * DER_LIMIT
"""Bytes of the largest claims: a link key and a few hundred bytes more."""


@dataclass(frozen=True)
class Request:
    """A release request as it came."""

    claims: bytes = field(repr=False)
    quote: bytes = field(repr=False)
    collateral: bytes = field(repr=False)
    delegation: bytes = field(repr=False)


class EnclaveFacts(Document):
    """What accepted evidence established about an enclave: kept with its leases, and held against later policies."""

    context: ClassVar[str] = "stip/enclave-facts"

    measurement: Bytes32
    signer: Bytes32
    isv_prod_id: Tokens
    isv_svn: Tokens
    platforms: tuple[bytes, ...] = Field(strict=False, max_length=2)
    """Platform instance id, where it has one, and PPID."""
    tcb_status: str
    advisories: tuple[str, ...] = Field(strict=False)
    tcb_evaluation_number: Tokens
    simulated: bool


@dataclass(frozen=True)
class Applicant:
    """Who asks, once evidence and delegation hold."""

    claims: Claims
    claims_bytes: bytes = field(repr=False)
    delegation: Delegation
    delegation_digest: bytes
    enclave: EnclaveFacts


def read_claims(data: bytes) -> Claims:
    """The claims, not believed yet. Raises `FrameInvalid`, `VersionUnsupported`."""
    if len(data) > CLAIMS_LIMIT:
        raise FrameInvalid.because("claims", f"{len(data)} bytes", f"at most {CLAIMS_LIMIT}")
    return Claims.from_bytes(data)


def examine(
    request: Request, claims: Claims, policy: Policy, *, service: bytes, root_der: bytes | None, now: int
) -> Applicant:
    """Verify evidence and delegation. `service` is our own id.

    Raises `ReleaseError` (claims for another key service), the attestation errors of `verifier.verify`,
    `DelegationRefused`, `RequestInvalid` (a key in the claims that cannot be used).
    """
    if not hmac.compare_digest(claims.service, service):
        raise ReleaseError.because("claims service", claims.service.hex(), service.hex())
    verified = verifier.verify(
        Evidence(request.quote, request.collateral),
        policy.evidence,
        report_data=report_data(request.claims),
        now=now,
        root_der=root_der,
    )
    _require_usable_keys(claims)
    delegation = _open_delegation(request.delegation, claims, policy, now)
    for name, got, expected in (
        ("enclave key", delegation.enclave_key, claims.tls_key),
        ("measurement", delegation.measurement, verified.measurement),
        ("instance", bytes.fromhex(delegation.instance), bytes.fromhex(claims.instance)),
    ):
        if not hmac.compare_digest(got, expected):
            raise DelegationRefused.because(f"delegation {name}", got.hex(), expected.hex())
    return Applicant(
        claims=claims,
        claims_bytes=request.claims,
        delegation=delegation,
        delegation_digest=claims.delegation,
        enclave=_facts(verified),
    )


def require_entitled(
    claims: Claims, holder: tuple[User, Device] | None, instance: Instance | None, *, now: int
) -> tuple[tuple[User, Device], Instance, Epoch]:
    """Who asks for what, and the epoch they get, where they may have it. Raises `UserRefused`, `InstanceRefused`."""
    if holder is None:
        raise UserRefused.because("delegation user", "a key that is not registered", "a registered device's key")
    require_present(*holder)
    if instance is None or instance.removed:
        raise InstanceRefused.because("claims instance", "one that is not registered", "a registered instance")
    require_member(holder[0], instance)
    if claims.kind == "grant" and instance.kind != "shared":
        raise InstanceRefused.because("claims kind", "grant for a dedicated instance", "bundle, which carries it")
    epoch = instance.released(claims.epochs, now=now)
    if epoch is None:
        released = ", ".join(str(each.number) for each in instance.epochs if each.serves(now))
        held = ", ".join(map(str, claims.epochs)) or "any"
        raise InstanceRefused.because("claims epochs", held, f"one that is released: {released or 'none'}")
    return holder, instance, epoch


def subjects(applicant: Applicant, holder: tuple[User, Device], epoch: Epoch) -> list[tuple[str, str]]:
    """Everything in a release that can be revoked, as (kind, subject) of `revocations`."""
    user, device = holder
    instance = applicant.claims.instance
    return [
        ("user", user.id),
        ("device", device.id),
        ("enclave", applicant.claims.tls_key.hex()),
        ("measurement", applicant.enclave.measurement.hex()),
        ("instance", instance),
        ("epoch", f"{instance}/{epoch.number}"),
    ]


def require_present(user: User, device: Device) -> None:
    """Raises `UserRefused` where the user was removed or disabled, or the device removed."""
    if user.removed_at is not None:
        raise UserRefused.because("user", "one that was removed", "a registered user")
    if user.disabled_at is not None:
        raise UserRefused.because("user", "one that is disabled", "a user who is not")
    if device.removed_at is not None:
        raise UserRefused.because("device", "one that was removed", "a registered device")


def require_member(user: User, instance: Instance) -> None:
    """Raises `UserRefused` where the instance is not for this user."""
    if instance.id not in user.instances:
        raise UserRefused.because("user", "not a member of this instance", "the members of the instance")


def _facts(verified: Verified) -> EnclaveFacts:
    platform = verified.platform
    return EnclaveFacts(
        measurement=verified.measurement,
        signer=verified.signer,
        isv_prod_id=verified.isv_prod_id,
        isv_svn=verified.isv_svn,
        platforms=tuple(name for name in (platform.instance_id, platform.ppid) if name is not None),
        tcb_status=verified.tcb_status,
        advisories=verified.advisories,
        tcb_evaluation_number=verified.tcb_evaluation_number,
        simulated=verified.simulated,
    )


def _open_delegation(data: bytes, claims: Claims, policy: Policy, now: int) -> Delegation:
    if not 0 < len(data) <= DER_LIMIT:
        raise DelegationRefused.because("delegation", f"{len(data)} bytes", f"1 to {DER_LIMIT} bytes, signed")
    try:
        signed = Signed.from_bytes(data)
        named = Delegation.from_bytes(signed.payload).user
        delegation = signed.open(Delegation, Ed25519PublicKey.from_public_bytes(named))
    except (FrameInvalid, SignatureInvalid) as error:
        raise DelegationRefused(error.message, field="delegation") from None
    except ValueError:
        raise DelegationRefused.because("delegation user", "not an Ed25519 key", "a user's public key") from None
    if not hmac.compare_digest(signed.digest(), claims.delegation):
        raise DelegationRefused.because("delegation", "another one", "the delegation that the claims digest")
    latest = now + policy.release.delegation_seconds
    if not now < delegation.expires <= latest + CLOCK_SKEW:
        raise DelegationRefused.because("delegation expires", delegation.expires, f"after {now}, at most {latest}")
    return delegation


def _require_usable_keys(claims: Claims) -> None:
    read_link_key(claims.link_key)
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(claims.hpke_key))
    except ValueError:
        # RFC 7748 section 6.1: a point of small order would make the shared secret zero
        raise RequestInvalid.because("claims hpke_key", "a point of small order", "an X25519 public key") from None
