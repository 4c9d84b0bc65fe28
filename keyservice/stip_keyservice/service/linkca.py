"""Link certificates: who an enclave is towards the gateway, under a name that says nothing.

A short-lived X.509 client certificate (RFC 5280) over the link key of the claims, with a random subject. The
gateway trusts the CA for its mTLS; clients accept quotes only, never this CA.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stip_protocol.errors import ConfigurationError, RequestInvalid
from stip_protocol.lease import CLOCK_SKEW
from stip_protocol.runtime.authority import Authority

SUBJECT_BYTES = 16


def read_link_key(spki: bytes) -> ec.EllipticCurvePublicKey:
    """The P-256 key in a DER SubjectPublicKeyInfo. Raises `RequestInvalid`."""
    try:
        key = load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RequestInvalid.because("claims link_key", "another kind of key", "a P-256 SubjectPublicKeyInfo (DER)")
    return key


def issue_link_certificate(
    authority: Authority, link_key: ec.EllipticCurvePublicKey, *, now: int, expires: int
) -> bytes:
    """DER of a certificate good from `now` to `expires` (Unix seconds), with `CLOCK_SKEW` on both sides.

    Raises `ConfigurationError` where the authority itself has run out.
    """
    ends = authority.certificate.not_valid_after_utc
    opens = datetime.fromtimestamp(now - CLOCK_SKEW, UTC)
    closes = min(datetime.fromtimestamp(expires + CLOCK_SKEW, UTC), ends)
    if closes <= opens:
        raise ConfigurationError.because("link-ca.pem not_valid_after", f"{ends:%Y-%m-%d}", "a time to come")
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, secrets.token_hex(SUBJECT_BYTES))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject)
        .public_key(link_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(opens)
        .not_valid_after(closes)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.DER)
