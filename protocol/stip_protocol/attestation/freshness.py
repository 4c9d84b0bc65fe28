"""Freshness: proof that the enclave at the other end of this channel is alive now.

The client draws a nonce and sends it over the TLS channel. The enclave writes the claims (that nonce and the
hash of its own TLS key), quotes SHA-256(claims) ‖ 0³², and answers. A quote from before the nonce, or one relayed
from an enclave with another TLS key, does not fit. The enclave never quotes bytes that a caller chose.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field, ValidationError

from stip_protocol.attestation.evidence import Evidence, EvidenceProvider, bind
from stip_protocol.documents import Document, explain
from stip_protocol.errors import EvidenceMalformed, FrameInvalid, ReportDataMismatch, VersionUnsupported

NONCE_BYTES = 32


class FreshnessClaims(Document):
    """What the quote of a freshness answer vouches for."""

    context: ClassVar[str] = "stip/freshness/1"

    nonce: Annotated[bytes, Field(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    tls_key: Annotated[bytes, Field(min_length=32, max_length=32)]
    """SHA-256 of the SubjectPublicKeyInfo of the enclave's certificate on this channel."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the enclave sends back."""

    claims: bytes
    evidence: Evidence


def new_nonce() -> bytes:
    """A client's challenge."""
    return secrets.token_bytes(NONCE_BYTES)


def claims(nonce: bytes, tls_key: bytes) -> bytes:
    """The canonical claims over a nonce and a TLS key hash. Raises `FrameInvalid` where either is not 32 bytes."""
    try:
        return FreshnessClaims(nonce=nonce, tls_key=tls_key).to_bytes()
    except ValidationError as error:
        raise FrameInvalid(f"{FreshnessClaims.context}: {explain(error)}", field="nonce") from None


def answer(provider: EvidenceProvider, nonce: bytes, tls_key: bytes) -> Answer:
    """The enclave's side. Raises `FrameInvalid` for a nonce that is not 32 bytes."""
    made = claims(nonce, tls_key)
    return Answer(claims=made, evidence=Evidence(provider.quote(bind(made)), provider.collateral()))


def check(data: bytes, *, nonce: bytes, tls_key: bytes) -> bytes:
    """The client's side: claims about this nonce and this channel's key give the report data to verify.

    Raises `EvidenceMalformed` (form) or `ReportDataMismatch` (another nonce or another key).
    """
    try:
        found = FreshnessClaims.from_bytes(data)
    except (FrameInvalid, VersionUnsupported) as error:
        raise EvidenceMalformed(f"freshness claims: {error.message}", field="claims") from None
    for field, got, wanted in (("nonce", found.nonce, nonce), ("TLS key", found.tls_key, tls_key)):
        if not hmac.compare_digest(got, wanted):
            raise ReportDataMismatch.because(f"freshness {field}", got.hex(), wanted.hex())
    return bind(data)
