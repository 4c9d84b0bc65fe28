"""Intel's certificates in evidence: canonical chains, and the roles their members must have.

dcap-qvl verifies signatures, dates and revocation, but lets any certificate below the root sign collateral.
Here every chain is held to the hierarchy of Intel's "SGX PCK Certificate and CRL Specification", section 1.2:

    Intel SGX Root CA ─┬─ Intel SGX PCK {Platform,Processor} CA ── Intel SGX PCK Certificate
                       └─ Intel SGX TCB Signing
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, NameOID

from stip_protocol.errors import EvidenceMalformed, EvidenceRefused

KEPT = 256
"""Chains and signatures whose reading is remembered, by their bytes: a platform shows the same ones every time. What
is remembered follows from the bytes alone; dates and trust anchors are checked each time."""
CHAIN_LIMIT = 3
"""Certificates of the longest chain: leaf, intermediate, root."""
SGX_EXTENSION = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
PCK_NAME = "Intel SGX PCK Certificate"
PCK_CA_NAMES = ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA")
TCB_SIGNER_NAME = "Intel SGX TCB Signing"

MALFORMED = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises for bytes that are no certificate, at once or when a field is read."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What roles and dates need of one certificate, read once so that a malformed one fails at the edge."""

    der: bytes
    name: str
    """Subject common name."""
    authority: bool
    """Basic constraints: CA."""
    platform: bool
    """Carries the SGX extension, as PCK certificates do."""
    not_before: datetime
    not_after: datetime
    parsed: x509.Certificate

    @classmethod
    def read(cls, certificate: x509.Certificate) -> Self:
        """Raises one of `MALFORMED` where a field cannot be parsed."""
        require_whole_signature(certificate)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        present = {extension.oid: extension.value for extension in certificate.extensions}
        constraints = present.get(ExtensionOID.BASIC_CONSTRAINTS)
        return cls(
            der=certificate.public_bytes(Encoding.DER),
            name=str(names[0].value) if len(names) == 1 else "",
            authority=isinstance(constraints, x509.BasicConstraints) and constraints.ca,
            platform=SGX_EXTENSION in present,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            parsed=certificate,
        )

    def issued_by(self, issuer: Certificate) -> bool:
        """Names match and the signature is the issuer's own: no certificate stands between."""
        return _issued(self.parsed, issuer.parsed)


@lru_cache(maxsize=KEPT)
def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *MALFORMED):
        return False
    return True


def require_whole_signature(certificate: x509.Certificate) -> None:
    """Raises ValueError where the signature's BIT STRING declares unused bits.

    Parsers drop that count where the last bits are zero: it would be a byte that no signature covers.
    """
    if certificate.public_bytes(Encoding.DER)[-len(certificate.signature) - 1] != 0:
        raise ValueError("signature with unused bits")


@lru_cache(maxsize=KEPT)
def read_chain(pem: bytes, *, what: str) -> tuple[Certificate, ...]:
    """The certificates of a PEM chain, leaf first, without a closing NUL.

    Raises `EvidenceMalformed` where the text is not exactly what encoding its certificates gives: text between
    certificates, other line breaks or spare base64 bits would be bytes that no signature covers.
    """
    try:
        loaded = x509.load_pem_x509_certificates(pem)
        if len(loaded) > CHAIN_LIMIT:
            raise EvidenceMalformed.because(what, f"{len(loaded)} certificates", f"at most {CHAIN_LIMIT}")
        chain = tuple(Certificate.read(certificate) for certificate in loaded)
        canonical = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in loaded)
    except MALFORMED as error:
        raise EvidenceMalformed(f"{what}: not a PEM certificate chain ({type(error).__name__})", field=what) from None
    if canonical != pem and canonical.rstrip(b"\n") != pem:
        raise EvidenceMalformed(f"{what}: not in canonical PEM (RFC 7468 strict form)", field=what)
    return chain


def require_pck_chain(chain: tuple[Certificate, ...]) -> None:
    """Hold a quote's chain to leaf, PCK CA, root. Raises `EvidenceRefused`."""
    leaf, authority, root = _members(chain, "PCK chain", ("PCK certificate", "PCK CA", "root"))
    _require_name(leaf, "PCK certificate", (PCK_NAME,))
    _require_name(authority, "PCK CA", PCK_CA_NAMES)
    if leaf.authority or not leaf.platform:
        raise EvidenceRefused.because("PCK certificate", "a CA, or no SGX extension", "a leaf with the SGX extension")
    if not authority.authority:
        raise EvidenceRefused.because("PCK CA", "not a CA", "basic constraints CA")
    _require_issued(leaf, authority, "PCK certificate")
    _require_issued(authority, root, "PCK CA")


def require_tcb_signer(chain: tuple[Certificate, ...], what: str) -> None:
    """Hold the chain of a piece of collateral to TCB Signing directly below the root. Raises `EvidenceRefused`."""
    signer, root = _members(chain, f"{what} chain", ("TCB signing certificate", "root"))
    _require_name(signer, f"{what} signer", (TCB_SIGNER_NAME,))
    if signer.authority or signer.platform:
        raise EvidenceRefused.because(f"{what} signer", "a CA or a PCK certificate", "the TCB signing certificate")
    _require_issued(signer, root, f"{what} signer")


CA_CHAIN = "PCK CRL chain"


def require_crl_chain(chain: tuple[Certificate, ...]) -> None:
    """Hold the issuers of the revocation lists to PCK CA and root. Raises `EvidenceRefused`."""
    authority, root = _members(chain, CA_CHAIN, ("PCK CA", "root"))
    _require_name(authority, "PCK CA", PCK_CA_NAMES)
    if not authority.authority:
        raise EvidenceRefused.because("PCK CA", "not a CA", "basic constraints CA")
    _require_issued(authority, root, "PCK CA")


def _members(chain: tuple[Certificate, ...], what: str, roles: tuple[str, ...]) -> tuple[Certificate, ...]:
    if len(chain) != len(roles):
        raise EvidenceRefused.because(what, f"{len(chain)} certificates", ", ".join(roles))
    return chain


def _require_name(certificate: Certificate, what: str, allowed: tuple[str, ...]) -> None:
    if certificate.name not in allowed:
        raise EvidenceRefused.because(f"{what} common name", ascii(certificate.name[:64]), " or ".join(allowed))


def _require_issued(certificate: Certificate, issuer: Certificate, what: str) -> None:
    if not certificate.issued_by(issuer):
        raise EvidenceRefused.because(what, "not issued by the next certificate", f"issued by {issuer.name!a}")
