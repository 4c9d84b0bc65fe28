"""X.509 authorities of one room, and the certificates they issue (RFC 5280 profiles, P-256, SHA-256).

The key service and the operator each have their own: no certificate of one is good for a connection of the other.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stip_protocol.errors import ConfigurationError

AUTHORITY_LIFE = timedelta(days=3650)
LEAF_LIFE = timedelta(days=397)
"""Longest life that TLS clients commonly accept (CA/Browser Forum baseline requirements, §6.3.2)."""
RENEWAL_MARGIN = timedelta(days=30)
SKEW = timedelta(hours=1)
"""By how much a certificate's start lies in the past, for clocks that run late."""
COMMON_NAME_LIMIT = 64
"""Characters of the longest common name (RFC 5280, appendix A.1: ub-common-name)."""


class Use(StrEnum):
    """What a certificate is good for (extended key usage, RFC 5280 §4.2.1.12)."""

    SERVER = "server"
    CLIENT = "client"


_EXTENDED = {Use.SERVER: ExtendedKeyUsageOID.SERVER_AUTH, Use.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH}


@dataclass(frozen=True)
class Authority:
    """A certificate authority: its certificate, and the key that issues under it."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate

    @classmethod
    def load(cls, key: ec.EllipticCurvePrivateKey, pem: bytes, what: str) -> Self:
        """Raises `ConfigurationError` where `pem` is no certificate or not over `key`."""
        certificate = read_certificate(pem, what)
        if certificate.public_key() != key.public_key():
            raise ConfigurationError.because(what, "a certificate over another key", "one over the key beside it")
        return cls(key, certificate)

    @property
    def pem(self) -> bytes:
        """The certificate, for those who trust it."""
        return self.certificate.public_bytes(Encoding.PEM)


@dataclass(frozen=True)
class TlsIdentity:
    """What a TLS endpoint needs: its private key and its chain, leaf first, both PEM."""

    private_key: bytes = field(repr=False)
    chain: bytes


def generate_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #8 PEM, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_private(pem: bytes, what: str) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in an unencrypted PEM. Raises `ConfigurationError`."""
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigurationError.because(what, "something else", "an unencrypted P-256 private key in PEM")
    return key


def read_certificate(pem: bytes, what: str) -> x509.Certificate:
    """The first certificate in a PEM. Raises `ConfigurationError`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConfigurationError.because(what, "something else", "a PEM certificate") from None


def make_authority(key: ec.EllipticCurvePrivateKey, subject: str, *, life: timedelta = AUTHORITY_LIFE) -> bytes:
    """A self-signed authority certificate over `key` that may issue leaves only, PEM."""
    name, now = _name(subject), datetime.now(UTC)
    return (
        _builder(name, name, key.public_key(), now, now + life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(issues=True), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def issue_certificate(
    authority: Authority,
    public: ec.EllipticCurvePublicKey,
    *,
    names: Sequence[str],
    uses: Collection[Use],
    common_name: str = "",
    life: timedelta = LEAF_LIFE,
) -> bytes:
    """A certificate over `public` for DNS names or IP addresses, followed by the authority's, PEM.

    It ends with the authority at the latest. Without `common_name` the subject is empty and the names are critical,
    as RFC 5280 §4.2.1.6 has it. Raises `ConfigurationError` where the authority has run out.
    """
    issuer, now = authority.certificate, datetime.now(UTC)
    if now >= issuer.not_valid_after_utc:
        ended = f"expired {issuer.not_valid_after_utc:%Y-%m-%d}"
        raise ConfigurationError.because("authority", ended, "one that is valid: make a new one")
    leaf = (
        _builder(_name(common_name), issuer.subject, public, now, min(now + life, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(issues=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_EXTENDED[use] for use in sorted(uses)]), critical=False)
        .add_extension(x509.SubjectAlternativeName([general_name(one) for one in names]), critical=not common_name)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return leaf.public_bytes(Encoding.PEM) + authority.pem


def names_of(certificate: x509.Certificate) -> set[x509.GeneralName]:
    """The subject's alternative names; empty where there are none."""
    try:
        return set(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return set()


def uses_of(certificate: x509.Certificate) -> set[Use]:
    """What the extended key usage allows of what is known here; empty where the extension is missing."""
    try:
        allowed = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return set()
    return {use for use, identifier in _EXTENDED.items() if identifier in allowed}


def general_name(name: str) -> x509.GeneralName:
    """An IP address where `name` is one, and a DNS name elsewhere. Raises `ConfigurationError`."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise ConfigurationError.because("certificate name", ascii(name)[:80], "a DNS name or an IP address") from None


def _name(common: str) -> x509.Name:
    if len(common) > COMMON_NAME_LIMIT:
        raise ConfigurationError.because("common name", f"{len(common)} characters", f"at most {COMMON_NAME_LIMIT}")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, issues: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not issues,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=issues,
        crl_sign=issues,
        encipher_only=False,
        decipher_only=False,
    )
