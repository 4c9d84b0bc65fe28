"""The simulated provisioning hierarchy: root, PCK CA, PCK certificate, TCB signer, all on P-256.

The same names and extensions as Intel's ("SGX PCK Certificate and CRL Specification" 1.5), because verifiers look
certificates up by common name; the organisation says SIMULATED, and so does the FMSPC.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from asn1crypto import core, parser
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from stip_protocol.attestation.certificates import PCK_NAME, SGX_EXTENSION, TCB_SIGNER_NAME
from stip_protocol.errors import ConfigurationError

ORGANISATION = "STIP SIMULATED TEE - PROTECTS NOTHING"
ROOT_NAME = "Intel SGX Root CA"
PCK_CA_NAME = "Intel SGX PCK Platform CA"
LIFETIME = timedelta(days=3650)
BACKDATED = timedelta(days=400)
"""Certificates start in the past, so that expired collateral can be issued under certificates that hold."""

FMSPC = b"STIPSM"
PCE_ID = bytes(2)
PCE_SVN = 13
CPU_SVN = (11, 11, 2, 2, 255, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)

_KEYS = ("root", "pck_ca", "pck", "tcb_signer", "attestation")
_CERTIFICATES = ("root", "pck_ca", "pck", "tcb_signer")


@dataclass(frozen=True)
class Pki:
    """Keys and certificates by role: `root`, `pck_ca`, `pck`, `tcb_signer`, and the quoting enclave's key."""

    keys: dict[str, ec.EllipticCurvePrivateKey] = field(repr=False)
    certificates: dict[str, x509.Certificate] = field(repr=False)

    @classmethod
    def create(cls, now: datetime) -> Self:
        """A new hierarchy for one new simulated platform."""
        keys = {role: ec.generate_private_key(ec.SECP256R1()) for role in _KEYS}
        root = _certificate(ROOT_NAME, keys["root"], None, keys["root"], now, path_length=1)
        authority = _certificate(PCK_CA_NAME, keys["pck_ca"], root, keys["root"], now, path_length=0)
        extension = sgx_extension(ppid=secrets.token_bytes(16), platform_instance_id=secrets.token_bytes(16))
        leaf = _certificate(PCK_NAME, keys["pck"], authority, keys["pck_ca"], now, sgx=extension)
        signer = _certificate(TCB_SIGNER_NAME, keys["tcb_signer"], root, keys["root"], now)
        return cls(keys, {"root": root, "pck_ca": authority, "pck": leaf, "tcb_signer": signer})

    def save(self, directory: Path) -> None:
        """Write every key (PKCS#8 PEM) and certificate, mode 0600. Raises `ConfigurationError` where one exists."""
        pems = {
            f"{role}.key.pem": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            for role, key in self.keys.items()
        }
        pems |= {f"{role}.pem": one.public_bytes(Encoding.PEM) for role, one in self.certificates.items()}
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, pem in pems.items():
                descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(pem)
        except OSError as error:
            raise ConfigurationError(f"simulated TEE directory {directory}: {error.strerror}") from error

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read what `save` wrote. Raises `ConfigurationError`."""
        try:
            keys = {role: _load_key(directory / f"{role}.key.pem") for role in _KEYS}
            certificates = {
                role: x509.load_pem_x509_certificate((directory / f"{role}.pem").read_bytes()) for role in _CERTIFICATES
            }
        except (OSError, ValueError) as error:
            reason = type(error).__name__
            raise ConfigurationError(f"simulated TEE directory {directory}: not usable ({reason})") from error
        return cls(keys, certificates)

    def chain(self, *roles: str) -> str:
        """PEM of the named certificates, leaf first."""
        return "".join(self.certificates[role].public_bytes(Encoding.PEM).decode() for role in roles)

    def renamed_signer(self, name: str, now: datetime) -> str:
        """PEM chain of a certificate over the TCB signer's key, issued by the root under another common name."""
        key = self.keys["tcb_signer"]
        other = _certificate(name, key, self.certificates["root"], self.keys["root"], now)
        return other.public_bytes(Encoding.PEM).decode() + self.chain("root")

    def sign(self, role: str, data: bytes) -> bytes:
        """ECDSA (P-256, SHA-256) as r‖s, the form that quotes and collateral use."""
        r, s = decode_dss_signature(self.keys[role].sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    def crl(self, role: str, revoked: Iterable[str], issued: datetime, expires: datetime) -> bytes:
        """DER of the revocation list by `role`, naming the certificates of the `revoked` roles."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificates[role].subject)
            .last_update(issued)
            .next_update(expires)
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.keys[role].public_key()), critical=False
            )
        )
        for one in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(self.certificates[one].serial_number)
                .revocation_date(issued)
                .build()
            )
        return builder.sign(self.keys[role], hashes.SHA256()).public_bytes(Encoding.DER)


def sgx_extension(*, ppid: bytes, platform_instance_id: bytes) -> bytes:
    """DER of the SGX extension 1.2.840.113741.1.13.1 of a PCK certificate on a multi-package platform."""
    components = {f"2.{index}": core.Integer(svn) for index, svn in enumerate(CPU_SVN, 1)}
    tcb = components | {"2.17": core.Integer(PCE_SVN), "2.18": core.OctetString(bytes(CPU_SVN))}
    configuration = {f"7.{index}": core.Boolean(value) for index, value in ((1, True), (2, False), (3, True))}
    return _sequence(
        [
            _entry("1", core.OctetString(ppid).dump()),
            _entry("2", _sequence(_entry(arc, value.dump()) for arc, value in tcb.items())),
            _entry("3", core.OctetString(PCE_ID).dump()),
            _entry("4", core.OctetString(FMSPC).dump()),
            _entry("5", parser.emit(0, 0, 10, b"\x01")),  # ENUMERATED scalable
            _entry("6", core.OctetString(platform_instance_id).dump()),
            _entry("7", _sequence(_entry(arc, value.dump()) for arc, value in configuration.items())),
        ]
    )


def _entry(arc: str, value: bytes) -> bytes:
    return _sequence([core.ObjectIdentifier(f"{SGX_EXTENSION.dotted_string}.{arc}").dump(), value])


def _sequence(parts: Iterable[bytes]) -> bytes:
    return bytes(parser.emit(0, 1, 16, b"".join(parts)))


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    *,
    path_length: int | None = None,
    sgx: bytes | None = None,
) -> x509.Certificate:
    """One certificate; a CA where `path_length` is given, self-signed without `issuer`."""
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANISATION),
        ]
    )
    authority = path_length is not None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - BACKDATED)
        .not_valid_after(now.astimezone(UTC) + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=path_length), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=authority,
                crl_sign=authority,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if sgx is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(SGX_EXTENSION, sgx), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path.name}: not an elliptic curve key")
    return key
