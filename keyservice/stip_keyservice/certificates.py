"""The key service's own server certificate: issued by its local authority, or taken from another one."""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric import ec

from stip_protocol.errors import ConfigurationError
from stip_protocol.runtime.authority import (
    RENEWAL_MARGIN,
    Authority,
    Use,
    general_name,
    issue_certificate,
    names_of,
)

LOOPBACKS = ("127.0.0.1", "::1")


def issue_server_certificate(authority: Authority, key: ec.EllipticCurvePrivateKey, dns_name: str) -> bytes:
    """A server certificate for `dns_name` over `key`, followed by the authority's, PEM."""
    names = [dns_name, *(LOOPBACKS if dns_name == "localhost" else ())]
    return issue_certificate(authority, key.public_key(), names=names, uses=[Use.SERVER])


def usable(chain: bytes, key: ec.EllipticCurvePrivateKey, authority: Authority, dns_name: str) -> bool:
    """Whether a stored chain can go on serving; False asks for a new one from our own authority.

    Raises `ConfigurationError` where it is no chain over `key`, or a configured one that does not cover
    `dns_name` or has run out: those are not ours to replace.
    """
    leaf = Authority.load(key, chain, "tls.pem").certificate
    now = datetime.now(UTC)
    covered = general_name(dns_name) in names_of(leaf)
    if leaf.issuer == authority.certificate.subject:
        return covered and now + RENEWAL_MARGIN < leaf.not_valid_after_utc
    if not covered:
        raise ConfigurationError.because("tls.pem", "a certificate for other names", dns_name)
    if now >= leaf.not_valid_after_utc:
        raise ConfigurationError.because("tls.pem", f"expired {leaf.not_valid_after_utc:%Y-%m-%d}", "a current one")
    return True
