"""The release of keys: who says what to whom, and what is hashed, signed and sealed.

1. The client attests the enclave and signs a `Delegation` with the user's key.
2. The enclave asks the key service for a nonce, writes `Claims`, and quotes
   `report_data = SHA-256(claims) ‖ 0³²`.
3. The key service verifies everything, debits the budget, seals a `Bundle` (or, for a shared instance, a
   `Grant`) to the claims' HPKE key (RFC 9180, base mode, `SUITE`) with `seal_info` as info, and signs.
4. The enclave verifies the signature against the key pinned in its measured files, and opens.
5. While the lease runs, the enclave sends a `Heartbeat` signed by its link key and gets a `Renewal` bound to
   the heartbeat's nonce: revocation needs nothing of the host's clock.

Pure functions and documents only; transport and storage live in the parts.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar, Literal

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import Field

from stip_protocol import canonical
from stip_protocol.attestation.evidence import bind
from stip_protocol.documents import Document
from stip_protocol.errors import SignatureInvalid
from stip_protocol.lease import Bytes16, Bytes32, Epoch, InstanceId, Seconds, Tokens

SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
"""DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM (RFC 9180 §7)."""
NONCE_BYTES = 32
DELEGATION_LIFE_LIMIT = 24 * 3600
"""Seconds of the longest delegation a key service accepts."""
DER_LIMIT = 4096
HEARTBEAT_LIMIT = 1024
"""Bytes of the largest heartbeat or watch: a few numbers and digests."""
SIGNATURE_LIMIT = 128
"""Bytes of a DER-encoded P-256 signature, with room."""
EPOCHS_LIMIT = 16
"""Epochs of one instance that an enclave may hold."""
CANARIES_LIMIT = 16
"""Canaries in one bundle."""
HANDLES_LIMIT = 256
"""Leases in one notice."""
report_data = bind
"""What the quote over `Claims` carries: as everywhere, SHA-256(claims) ‖ 0³²."""


class Delegation(Document):
    """A user's word that one enclave key may act for them on one instance until `expires`."""

    context: ClassVar[str] = "stip/delegation"

    user: Bytes32
    """The user's Ed25519 public key, raw."""
    enclave_key: Bytes32
    """SHA-256 of the SubjectPublicKeyInfo of the enclave's RA-TLS certificate."""
    measurement: Bytes32
    """MRENCLAVE the client verified."""
    instance: InstanceId
    nonce: Bytes32
    expires: Seconds


class Claims(Document):
    """What the enclave's quote vouches for when it asks for keys. Built by the enclave alone."""

    context: ClassVar[str] = "stip/release-claims"
    version: ClassVar[tuple[int, int]] = (1, 1)

    nonce: Bytes32
    hpke_key: Bytes32
    """X25519 public key, raw, fresh for this request."""
    tls_key: Bytes32
    """SHA-256 of the SubjectPublicKeyInfo of the RA-TLS certificate."""
    link_key: Annotated[bytes, Field(min_length=60, max_length=DER_LIMIT)]
    """SubjectPublicKeyInfo (DER) of the P-256 key the enclave will use towards the gateway."""
    service: Bytes32
    delegation: Bytes32
    """Digest of the signed delegation."""
    kind: Literal["bundle", "grant"]
    instance: InstanceId
    tokens: Tokens
    """Rows wanted at once; the policy decides."""
    epochs: Annotated[tuple[Epoch, ...], Field(strict=False, max_length=EPOCHS_LIMIT)] = ()
    """Epochs of the instance that the enclave holds parts of. The service releases its active one, or, where only
    others are held, the newest of those that still drain. Empty: the enclave does not say (before 1.1)."""


class Grant(Document):
    """What opens an instance for an attested enclave."""

    context: ClassVar[str] = "stip/grant"

    instance: InstanceId
    epoch: Epoch
    preset: str
    manifest_digest: Bytes32
    part_key: Bytes32 = Field(repr=False)
    vocabulary_seed: Bytes32 | None = Field(repr=False)
    """Expands to π_c by `stip_protocol.keys`, where the head is on the server."""


class Bundle(Document):
    """What the key service issues per user after attestation."""

    context: ClassVar[str] = "stip/bundle"
    version: ClassVar[tuple[int, int]] = (1, 1)

    delegation: Bytes32
    user_key: Bytes32 = Field(repr=False)
    """Fresh for this bundle; keys whatever an enclave must keep apart per user."""
    instance: InstanceId
    epoch: Epoch
    manifest_digest: Bytes32
    lease: bytes = Field(max_length=DER_LIMIT)
    """Signed `Lease`."""
    link_certificate: bytes = Field(max_length=DER_LIMIT)
    """DER, short-lived, random subject, over the claims' link key."""
    heartbeat_tokens: Tokens
    """Generated tokens after which the enclave must have renewed: the revocation bound."""
    cache_salt: Bytes32 = Field(repr=False)
    policy_digest: Bytes32
    audit_head: bytes = Field(max_length=DER_LIMIT)
    """Signed `AuditHead`."""
    grant: bytes | None = Field(repr=False)
    """`Grant` bytes, for a `dedicated` instance."""
    canaries: Annotated[tuple[bytes, ...], Field(strict=False, max_length=CANARIES_LIMIT)] = Field((), repr=False)
    """Sessions to try the server with, drawn for this bundle alone: no other ever gets them."""


class AuditHead(Document):
    """The head of the key service's hash-chained audit log at one moment."""

    context: ClassVar[str] = "stip/audit-head"

    sequence: Tokens
    hash: Bytes32
    at: Seconds


class Heartbeat(Document):
    """An enclave's request to go on: how many rows it has fed, and how many more it wants."""

    context: ClassVar[str] = "stip/heartbeat"

    handle: Bytes16
    serial: Tokens
    """Of the lease being renewed."""
    nonce: Bytes32
    fed: Tokens
    wanted: Tokens


class Renewal(Document):
    """The answer to one heartbeat, signed like everything the key service says."""

    context: ClassVar[str] = "stip/renewal"
    version: ClassVar[tuple[int, int]] = (1, 1)

    nonce: Bytes32
    lease: bytes = Field(max_length=DER_LIMIT)
    """Signed `Lease`."""
    link_certificate: bytes = Field(max_length=DER_LIMIT)
    audit_head: bytes = Field(default=b"", max_length=DER_LIMIT)
    """Signed `AuditHead` after this renewal; empty from a service before 1.1."""
    superseded: bool = False
    """Whether the lease's epoch drains: its sessions go on, a new session asks for a new lease."""


class Watch(Document):
    """An enclave's request to hear of what ends its leases. Signed by its link key, like a heartbeat."""

    context: ClassVar[str] = "stip/watch"

    nonce: Bytes32
    """A challenge of the service, not used before."""
    link_key: Bytes32
    """SHA-256 of the SubjectPublicKeyInfo of the link key that its leases name."""


class Notice(Document):
    """What the key service tells a watching enclave, signed: something of its leases has changed.

    A stream begins with one of kind `watching`. Whoever cuts the stream delays what it says to the next heartbeat, and
    no longer.
    """

    context: ClassVar[str] = "stip/notice"

    kind: Literal["watching", "revoked", "superseded"]
    nonce: Bytes32
    """Of the watch."""
    sequence: Tokens
    """0, 1, 2, … on one stream: none is missing."""
    handles: Annotated[tuple[Bytes16, ...], Field(strict=False, max_length=HANDLES_LIMIT)] = ()
    """`revoked`: leases that ended. `superseded`: leases of an epoch that drains: new sessions ask for a new lease."""
    instance: InstanceId | None = None
    """`revoked`: the whole instance, or one epoch of it, is closed, and its grant must go."""
    epoch: Epoch | None = None


def service_id(key: Ed25519PublicKey) -> bytes:
    """SHA-256 of the raw public key: how a key service is named in claims."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).digest()


def seal_info(claims: bytes, service: bytes) -> bytes:
    """HPKE info: the transcript. What was sealed for one request opens under no other."""
    return canonical.encode(["stip/release-info", hashlib.sha256(claims).digest(), service])


def seal(document: Bundle | Grant, claims: bytes, signing: Ed25519PrivateKey) -> tuple[bytes, bytes]:
    """(encapsulation ‖ ciphertext, signature) for the enclave that made `claims`."""
    wanted = Claims.from_bytes(claims)
    info = seal_info(claims, service_id(signing.public_key()))
    sealed = SUITE.encrypt(document.to_bytes(), X25519PublicKey.from_public_bytes(wanted.hpke_key), info)
    return sealed, signing.sign(_release_bytes(claims, sealed))


def unseal(
    sealed: bytes, signature: bytes, claims: bytes, private: X25519PrivateKey, service: Ed25519PublicKey
) -> Bundle | Grant:
    """Verify, then open. Raises `SignatureInvalid`; which document comes back is what the claims asked for."""
    try:
        service.verify(signature, _release_bytes(claims, sealed))
        plain = SUITE.decrypt(sealed, private, seal_info(claims, service_id(service)))
    except (InvalidSignature, InvalidTag):
        raise SignatureInvalid("release: not sealed by the pinned key service for these claims") from None
    kind: type[Bundle] | type[Grant] = Bundle if Claims.from_bytes(claims).kind == "bundle" else Grant
    return kind.from_bytes(plain)


def sign_heartbeat(heartbeat: Heartbeat, link: ec.EllipticCurvePrivateKey) -> bytes:
    """ECDSA (P-256, SHA-256) by the link key."""
    return link.sign(_heartbeat_bytes(heartbeat.to_bytes()), ec.ECDSA(hashes.SHA256()))


def open_heartbeat(heartbeat: bytes, signature: bytes, link: ec.EllipticCurvePublicKey) -> Heartbeat:
    """Verify and parse. Raises `SignatureInvalid`, `FrameInvalid`."""
    try:
        link.verify(signature, _heartbeat_bytes(heartbeat), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise SignatureInvalid("heartbeat: not signed by the lease's link key") from None
    return Heartbeat.from_bytes(heartbeat)


def sign_watch(watch: Watch, link: ec.EllipticCurvePrivateKey) -> bytes:
    """ECDSA (P-256, SHA-256) by the link key."""
    return link.sign(_watch_bytes(watch.to_bytes()), ec.ECDSA(hashes.SHA256()))


def open_watch(watch: bytes, signature: bytes, link: ec.EllipticCurvePublicKey) -> Watch:
    """Verify and parse. Raises `SignatureInvalid`, `FrameInvalid`."""
    try:
        link.verify(signature, _watch_bytes(watch), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise SignatureInvalid("watch: not signed by the link key that it names") from None
    return Watch.from_bytes(watch)


def _watch_bytes(watch: bytes) -> bytes:
    return b"stip/watch\x00" + watch


def _release_bytes(claims: bytes, sealed: bytes) -> bytes:
    return b"stip/release\x00" + hashlib.sha256(claims).digest() + sealed


def _heartbeat_bytes(heartbeat: bytes) -> bytes:
    return b"stip/heartbeat\x00" + heartbeat
