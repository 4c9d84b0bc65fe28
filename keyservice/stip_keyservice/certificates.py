"""The key service's X.509 authorities and its own server certificate (RFC 5280 profiles, P-256, SHA-256)."""

from __future__ import annotations

import contextlib
import ipaddress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stip_protocol.errors import ConfigurationError

AUTHORITY_LIFE = timedelta(days=3650)
SERVER_LIFE = timedelta(days=397)
"""Longest life that TLS clients commonly accept (CA/Browser Forum baseline requirements, §6.3.2)."""
RENEWAL_MARGIN = timedelta(days=30)
SKEW = timedelta(hours=1)
"""By how much a certificate's start lies in the past, for clocks that run late."""


@dataclass(frozen=True)
class Authority:
    """A certificate authority: what issues link certificates, and the server certificate of the key service."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate

    @classmethod
    def load(cls, key: ec.EllipticCurvePrivateKey, pem: bytes, what: str) -> Self:
        """Raises `ConfigurationError` where `pem` is no certificate or not over `key`."""
        try:
            certificate = x509.load_pem_x509_certificate(pem)
        except ValueError:
            raise ConfigurationError.because(what, "something else", "a PEM certificate") from None
        if certificate.public_key() != key.public_key():
            raise ConfigurationError.because(what, "a certificate over another key", "one over the key beside it")
        return cls(key, certificate)

    @property
    def pem(self) -> bytes:
        """The certificate, for those who trust it."""
        return self.certificate.public_bytes(Encoding.PEM)


@dataclass(frozen=True)
class TlsIdentity:
    """What a TLS server needs: its private key and its chain, leaf first, both PEM."""

    private_key: bytes = field(repr=False)
    chain: bytes


def make_authority(key: ec.EllipticCurvePrivateKey, subject: str) -> bytes:
    """A self-signed authority certificate over `key` that may issue leaves only, PEM."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    return (
        _builder(name, name, key.public_key(), AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(issues=True), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def issue_server_certificate(authority: Authority, key: ec.EllipticCurvePrivateKey, dns_name: str) -> bytes:
    """A server certificate for `dns_name` over `key`, followed by the authority's, PEM."""
    issuer = authority.certificate
    leaf = (
        _builder(x509.Name([]), issuer.subject, key.public_key(), SERVER_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(issues=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(dns_name)), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return leaf.public_bytes(Encoding.PEM) + authority.pem


def usable(chain: bytes, key: ec.EllipticCurvePrivateKey, authority: Authority, dns_name: str) -> bool:
    """Whether a stored chain can go on serving; False asks for a new one from our own authority.

    Raises `ConfigurationError` where it is no chain over `key`, or a configured one that does not cover
    `dns_name` or has run out: those are not ours to replace.
    """
    leaf = Authority.load(key, chain, "tls.pem").certificate
    now = datetime.now(UTC)
    try:
        names = set(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        names = set()
    covered = set(_names(dns_name)[:1]) <= names
    if leaf.issuer == authority.certificate.subject:
        return covered and now + RENEWAL_MARGIN < leaf.not_valid_after_utc
    if not covered:
        raise ConfigurationError.because("tls.pem", "a certificate for other names", dns_name)
    if now >= leaf.not_valid_after_utc:
        raise ConfigurationError.because("tls.pem", f"expired {leaf.not_valid_after_utc:%Y-%m-%d}", "a current one")
    return True


def _names(dns_name: str) -> list[x509.GeneralName]:
    with contextlib.suppress(ValueError):
        return [x509.IPAddress(ipaddress.ip_address(dns_name))]
    names: list[x509.GeneralName] = [x509.DNSName(dns_name)]
    if dns_name == "localhost":
        names += [x509.IPAddress(ipaddress.ip_address(loopback)) for loopback in ("127.0.0.1", "::1")]
    return names


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + life)
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
