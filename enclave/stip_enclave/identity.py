"""Who the enclave is: keys that exist in its memory alone, and the certificate that evidence stands behind."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from stip_protocol.attestation import ratls
from stip_protocol.attestation.evidence import EvidenceProvider
from stip_protocol.documents import Signed
from stip_protocol.errors import DelegationRefused, FrameInvalid, LeaseForeign, SignatureInvalid, VersionUnsupported
from stip_protocol.release import DER_LIMIT, Delegation


@dataclass(frozen=True, slots=True)
class EnclaveIdentity:
    """The RA-TLS identity towards clients, and the P-256 link key towards key service and gateway.

    The link key lives as long as the process: every lease and link certificate of every user is made out to it, so
    that one link carries the sessions of all.
    """

    tls: ratls.Identity
    link_key: ec.EllipticCurvePrivateKey = field(repr=False)
    link_spki: bytes
    """SubjectPublicKeyInfo of the link key, DER."""

    @classmethod
    def create(cls, provider: EvidenceProvider, *, dns_name: str, lifetime: int, now: int) -> EnclaveIdentity:
        """Fresh keys, and a certificate quoted by `provider` for `lifetime` seconds."""
        key = ec.generate_private_key(ec.SECP256R1())
        spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return cls(ratls.issue(provider, dns_name=dns_name, lifetime=lifetime, now=now), key, spki)

    @property
    def link_key_digest(self) -> bytes:
        """What leases name the link key by."""
        return hashlib.sha256(self.link_spki).digest()

    def link_credentials(self, certificate: bytes) -> tuple[bytes, bytes]:
        """(certificate, private key) in PEM for a link. Raises `LeaseForeign` where it is not over the link key."""
        try:
            parsed = x509.load_der_x509_certificate(certificate)
            spki = parsed.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        except ValueError as error:
            raise LeaseForeign(f"link certificate: not X.509 ({type(error).__name__})") from None
        if spki != self.link_spki:
            raise LeaseForeign("link certificate: made out to another key")
        private = self.link_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return parsed.public_bytes(Encoding.PEM), private

    def delegation(self, signed: bytes, instance: str) -> Delegation:
        """A client's delegation, checked as far as the enclave can: signed by the user it names, for this enclave's
        key and this instance. Whether that user is anybody is the key service's to say.

        Raises `DelegationRefused`.
        """
        if not 0 < len(signed) <= DER_LIMIT:
            raise DelegationRefused.because("delegation", f"{len(signed)} bytes", f"1 to {DER_LIMIT} bytes")
        try:
            envelope = Signed.from_bytes(signed)
            claimed = Delegation.from_bytes(envelope.payload)
            delegation = envelope.open(Delegation, Ed25519PublicKey.from_public_bytes(claimed.user))
        except (FrameInvalid, VersionUnsupported, SignatureInvalid, InvalidSignature, ValueError) as error:
            reason = error.message if isinstance(error, FrameInvalid | VersionUnsupported) else "not signed by its user"
            raise DelegationRefused(f"delegation: {reason}", field="delegation") from None
        if delegation.enclave_key != self.tls.spki_sha256:
            raise DelegationRefused("delegation enclave_key: names another enclave's key", field="enclave_key")
        if delegation.instance != instance:
            raise DelegationRefused.because("delegation instance", delegation.instance, instance)
        return delegation
