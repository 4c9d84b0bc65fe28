"""Leases: what admits an enclave's sessions at the gateway, under a random name.

A lease is bounded by time *and* by tokens (rows fed), because an enclave has no trusted clock, and bound to
the gateway's audience, one instance and epoch, and the certificate of the link. It names no user. The key
service signs it; a renewal has the same `handle`, a higher `serial` and a higher `tokens`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from annotated_types import Ge, Le, Len
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field

from stip_protocol.documents import Document, Signed
from stip_protocol.errors import FrameInvalid, LeaseExpired, LeaseForeign, LeaseMalformed, SignatureInvalid

Bytes32 = Annotated[bytes, Len(32, 32)]
Bytes16 = Annotated[bytes, Len(16, 16)]
InstanceId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""128 random bits as 32 lower-case hex digits."""
Epoch = Annotated[int, Ge(0), Le(2**31 - 1)]
Seconds = Annotated[int, Ge(0), Le(2**40)]
Tokens = Annotated[int, Ge(0), Le(2**40)]

CLOCK_SKEW = 30
"""Seconds by which two machines' clocks may differ before `not_before` refuses."""


class Lease(Document):
    """The right to run `tokens` rows of one instance over one link until `expires`."""

    context: ClassVar[str] = "stip/lease"

    handle: Bytes16
    serial: Tokens
    audience: Annotated[str, Field(min_length=1, max_length=253)]
    instance: InstanceId
    epoch: Epoch
    manifest_digest: Bytes32
    link_key: Bytes32
    """SHA-256 of the SubjectPublicKeyInfo of the link's client certificate."""
    not_before: Seconds
    expires: Seconds
    tokens: Tokens
    """Rows admitted under this handle since its first serial: a cumulative mark, not an increment."""
    audit_head: Bytes32


def admit(
    signed: bytes, *, key: Ed25519PublicKey, audience: str, instance: str, epoch: int, link_key: bytes, now: int
) -> Lease:
    """The lease in `signed`, where it is good here and now.

    Raises `LeaseMalformed`, `SignatureInvalid`, `LeaseForeign` (audience, instance, epoch, link key) or
    `LeaseExpired`. The tokens are the caller's to count.
    """
    try:
        lease = Signed.from_bytes(signed).open(Lease, key)
    except FrameInvalid as error:
        raise LeaseMalformed(error.message, field="lease") from None
    except SignatureInvalid:
        raise LeaseForeign("lease: not signed by this gateway's key service", field="lease") from None
    for field, got, allowed in (
        ("audience", lease.audience, audience),
        ("instance", lease.instance, instance),
        ("epoch", lease.epoch, epoch),
        ("link_key", lease.link_key.hex(), link_key.hex()),
    ):
        if got != allowed:
            raise LeaseForeign.because(f"lease {field}", got, allowed)
    if now + CLOCK_SKEW < lease.not_before:
        raise LeaseExpired.because("lease not_before", lease.not_before, f"at most {now + CLOCK_SKEW}")
    if now >= lease.expires:
        raise LeaseExpired.because("lease expires", lease.expires, f"later than {now}")
    return lease
