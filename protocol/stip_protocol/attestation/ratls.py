"""RA-TLS: a TLS server certificate that carries the quote of the enclave that holds its key.

Format: TCG "DICE Attestation Architecture" 1.1, tagged evidence extension (2.23.133.5.4.9) holding CBOR tag 60000
`[quote, claims]`; the claims are a CBOR map with `pubkey-hash`, and the quote binds SHA-256(claims) ‖ 0³²
(CCC attestation SIG, "Interoperable RA-TLS"). Gramine's older extension, a bare quote over the key's hash, is read
too. Unlike Gramine's verifier this one refuses a certificate whose claims do not name its key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import cbor2
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stip_protocol import canonical
from stip_protocol.attestation.certificates import MALFORMED, require_whole_signature
from stip_protocol.attestation.evidence import EvidenceProvider, bind
from stip_protocol.attestation.gates import at
from stip_protocol.attestation.quote import QUOTE_LIMIT, SgxQuote
from stip_protocol.errors import ConfigurationError, EvidenceMalformed, FrameInvalid, ReportDataMismatch

CERTIFICATE_LIMIT = 24 * 1024
"""Bytes of the largest certificate read, PEM included: one with both extensions is about 13 KiB of PEM."""
CLAIMS_LIMIT = 1024
LIFETIME_LIMIT = 24 * 3600
"""Seconds of the longest certificate issued."""
BACKDATED = 300
"""Seconds before `now` at which a certificate starts, for clocks that are behind."""
DICE_EXTENSION = x509.ObjectIdentifier("2.23.133.5.4.9")
DICE_TEE_QUOTE_TAG = 60000
"""IANA CBOR tag: TEE quote."""
SHA256_ID = 1
"""IANA Named Information Hash Algorithm Registry."""
GRAMINE_EXTENSION = x509.ObjectIdentifier("0.6.9.42.840.113741.1337.6")
"""The older extension; its object identifier contains, by an old mistake, the tag and length of the intended one."""
PUBKEY_HASH = "pubkey-hash"
NONCE = "nonce"


@dataclass(frozen=True, slots=True)
class Identity:
    """An enclave's TLS identity, alive only in its memory."""

    certificate_pem: bytes
    private_key_pem: bytes = field(repr=False)
    spki_sha256: bytes
    """SHA-256 of the SubjectPublicKeyInfo: the name of this key in claims, delegations and leases."""


@dataclass(frozen=True, slots=True)
class RaTls:
    """What a certificate says of the enclave behind it; the quote still wants `verifier.verify`."""

    quote: bytes
    claims: bytes
    """Canonical CBOR; empty for the older extension."""
    spki_sha256: bytes
    report_data: bytes
    """The 64 bytes that the quote must carry."""


def issue(provider: EvidenceProvider, *, dns_name: str, lifetime: int, now: int) -> Identity:
    """A fresh P-256 key with a self-signed certificate for `dns_name`, valid for `lifetime` seconds.

    Raises `ConfigurationError` where the lifetime is not positive or longer than a day.
    """
    if not 0 < lifetime <= LIFETIME_LIMIT:
        raise ConfigurationError.because("certificate lifetime", f"{lifetime} s", f"1 to {LIFETIME_LIMIT} s")
    key = ec.generate_private_key(ec.SECP256R1())
    spki = _spki_sha256(key.public_key())
    claims = canonical.encode({PUBKEY_HASH: canonical.encode([SHA256_ID, spki])})
    evidence = canonical.encode(cbor2.CBORTag(DICE_TEE_QUOTE_TAG, [provider.quote(bind(claims)), claims]))
    # TLS stacks tell certificates apart by subject: a name per certificate keeps two enclaves from colliding.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"stip-enclave-{secrets.token_hex(8)}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at(now) - timedelta(seconds=BACKDATED))
        .not_valid_after(at(now) + timedelta(seconds=lifetime))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(dns_name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.UnrecognizedExtension(DICE_EXTENSION, evidence), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Identity(
        certificate_pem=certificate.public_bytes(Encoding.PEM),
        private_key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        spki_sha256=spki,
    )


def read(certificate: bytes, *, now: int) -> RaTls:
    """Read an RA-TLS certificate (PEM or DER) at `now` (Unix seconds).

    Raises `EvidenceMalformed` (size, form, validity, signature, no evidence, claims that are not canonical or do
    not name a key) or `ReportDataMismatch` (the claims name another key, or the quote binds other claims).
    """
    if len(certificate) > CERTIFICATE_LIMIT:
        raise EvidenceMalformed.because("certificate", f"{len(certificate)} bytes", f"at most {CERTIFICATE_LIMIT}")
    parsed = _parse(certificate)
    extensions, spki = parsed.extensions, parsed.spki_sha256
    if not parsed.opens <= at(now) <= parsed.closes:
        allowed = f"{parsed.opens:%Y-%m-%dT%H:%M:%SZ} to {parsed.closes:%Y-%m-%dT%H:%M:%SZ}"
        raise EvidenceMalformed.because("certificate validity", f"{at(now):%Y-%m-%dT%H:%M:%SZ}", allowed)
    if DICE_EXTENSION in extensions:
        quote, claims = _tagged_evidence(extensions[DICE_EXTENSION])
        _require_key(claims, spki)
        report_data = bind(claims)
    elif GRAMINE_EXTENSION in extensions:
        quote, claims = extensions[GRAMINE_EXTENSION], b""
        report_data = spki + bytes(32)
    else:
        raise EvidenceMalformed.because("certificate", "no attestation extension", DICE_EXTENSION.dotted_string)
    if not hmac.compare_digest(SgxQuote.parse(quote).report_data, report_data):
        raise ReportDataMismatch("certificate: the quote does not bind the certificate's key", field="report data")
    return RaTls(quote=quote, claims=claims, spki_sha256=spki, report_data=report_data)


@dataclass(frozen=True, slots=True)
class _Parsed:
    spki_sha256: bytes
    opens: datetime
    closes: datetime
    extensions: dict[x509.ObjectIdentifier, bytes]


def _parse(certificate: bytes) -> _Parsed:
    """Everything that is read of the certificate, read at once; its signature is its own key's."""
    load = x509.load_pem_x509_certificate if certificate.startswith(b"-----") else x509.load_der_x509_certificate
    try:
        parsed = load(certificate)
        require_whole_signature(parsed)
        parsed.verify_directly_issued_by(parsed)
        return _Parsed(
            spki_sha256=_spki_sha256(parsed.public_key()),
            opens=parsed.not_valid_before_utc,
            closes=parsed.not_valid_after_utc,
            extensions={
                extension.oid: extension.value.value
                for extension in parsed.extensions
                if isinstance(extension.value, x509.UnrecognizedExtension)
            },
        )
    except (InvalidSignature, *MALFORMED) as error:
        reason = f"certificate: not a self-signed X.509 certificate ({type(error).__name__})"
        raise EvidenceMalformed(reason, field="certificate") from None


def _tagged_evidence(extension: bytes) -> tuple[bytes, bytes]:
    value = _canonical(extension, "tagged evidence", QUOTE_LIMIT + CLAIMS_LIMIT, tags=(DICE_TEE_QUOTE_TAG,))
    if not (isinstance(value, cbor2.CBORTag) and value.tag == DICE_TEE_QUOTE_TAG):
        raise EvidenceMalformed.because("tagged evidence", "another tag", f"CBOR tag {DICE_TEE_QUOTE_TAG}")
    pair = value.value
    if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, bytes) for part in pair)):
        raise EvidenceMalformed.because("tagged evidence", "another shape", "[quote, claims] as byte strings")
    return pair[0], pair[1]


def _require_key(claims: bytes, spki: bytes) -> None:
    """Hold the claims to their certificate's key."""
    found = _canonical(claims, "RA-TLS claims", CLAIMS_LIMIT)
    if not isinstance(found, dict) or PUBKEY_HASH not in found or not found.keys() <= {PUBKEY_HASH, NONCE}:
        raise EvidenceMalformed.because("RA-TLS claims", "other keys", f"{PUBKEY_HASH}, and {NONCE} where wanted")
    if not all(isinstance(value, bytes) for value in found.values()):
        raise EvidenceMalformed.because("RA-TLS claims", "other types", "byte strings")
    entry = _canonical(found[PUBKEY_HASH], PUBKEY_HASH, CLAIMS_LIMIT)
    if not (
        isinstance(entry, list)
        and len(entry) == 2
        and type(entry[0]) is int
        and entry[0] == SHA256_ID
        and isinstance(entry[1], bytes)
    ):
        raise EvidenceMalformed.because(PUBKEY_HASH, "another form", f"[{SHA256_ID}, SHA-256 of the key]")
    if not hmac.compare_digest(entry[1], spki):
        raise ReportDataMismatch(f"{PUBKEY_HASH}: names another key than the certificate's", field=PUBKEY_HASH)


def _canonical(data: bytes, what: str, limit: int, tags: tuple[int, ...] = ()) -> Any:
    try:
        return canonical.decode(data, what=what, limit=limit, tags=tags)
    except FrameInvalid as error:
        raise EvidenceMalformed(error.message, field=what) from None


def _spki_sha256(key: Any) -> bytes:
    """SHA-256 of the DER SubjectPublicKeyInfo of an elliptic curve key; TLS here knows no other."""
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise EvidenceMalformed.because("certificate key", type(key).__name__, "an elliptic curve key")
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
