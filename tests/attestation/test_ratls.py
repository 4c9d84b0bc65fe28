from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol import canonical
from stip_protocol.attestation import ratls
from stip_protocol.attestation.evidence import Evidence, bind
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.verifier import verify
from stip_protocol.errors import ConfigurationError, EvidenceMalformed, ReportDataMismatch, StipError
from stip_stack.tee import SimulatedPlatform, SimulatedProvider

HOUR = 3600
NAME = "enclave.test"


@pytest.fixture(scope="module")
def provider(platform: SimulatedPlatform, measurement: bytes, now: int) -> SimulatedProvider:
    return platform.provider(measurement, clock=lambda: now)


@pytest.fixture(scope="module")
def identity(provider: SimulatedProvider, now: int) -> ratls.Identity:
    return ratls.issue(provider, dns_name=NAME, lifetime=HOUR, now=now)


Forge = Callable[[Callable[[bytes], tuple[x509.ObjectIdentifier, bytes]]], bytes]


@pytest.fixture
def forge(now: int) -> Forge:
    """DER of a certificate whose one extension is made from its key's hash."""

    def build(extension: Callable[[bytes], tuple[x509.ObjectIdentifier, bytes]]) -> bytes:
        key = ec.generate_private_key(ec.SECP256R1())
        spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        oid, value = extension(hashlib.sha256(spki).digest())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forged")])
        at = datetime.fromtimestamp(now, tz=UTC)
        certificate = (
            x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
            .serial_number(1)
            .not_valid_before(at)
            .not_valid_after(at + timedelta(hours=1))
            .add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
            .sign(key, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.DER)

    return build


def tagged(quote: bytes, claims: bytes, tag: int = ratls.DICE_TEE_QUOTE_TAG) -> bytes:
    return cbor2.dumps(cbor2.CBORTag(tag, [quote, claims]))


def claims_for(spki: bytes) -> bytes:
    return canonical.encode({"pubkey-hash": canonical.encode([1, spki])})


def test_a_certificate_round_trips_and_its_quote_verifies(
    identity: ratls.Identity,
    provider: SimulatedProvider,
    policy: Callable[..., EvidencePolicy],
    measurement: bytes,
    now: int,
) -> None:
    for form in (identity.certificate_pem, ssl.PEM_cert_to_DER_cert(identity.certificate_pem.decode())):
        found = ratls.read(form, now=now)
        assert found.spki_sha256 == identity.spki_sha256
        assert cbor2.loads(found.claims) == {"pubkey-hash": cbor2.dumps([1, identity.spki_sha256])}
        assert found.report_data == hashlib.sha256(found.claims).digest() + bytes(32)
        evidence = Evidence(found.quote, provider.collateral())
        verified = verify(evidence, policy(), report_data=found.report_data, now=now)
        assert verified.measurement == measurement


def test_the_certificate_has_what_tls_needs_and_stays_small(identity: ratls.Identity) -> None:
    certificate = x509.load_pem_x509_certificate(identity.certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME]
    evidence = certificate.extensions.get_extension_for_oid(ratls.DICE_EXTENSION)
    assert not evidence.critical
    assert len(certificate.public_bytes(Encoding.DER)) < 8 * 1024
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == timedelta(seconds=HOUR + 300)


def test_two_certificates_share_neither_name_nor_key(provider: SimulatedProvider, now: int) -> None:
    two = [ratls.issue(provider, dns_name=NAME, lifetime=HOUR, now=now) for _ in range(2)]
    subjects = {x509.load_pem_x509_certificate(one.certificate_pem).subject.rfc4514_string() for one in two}
    assert len(subjects) == len({one.spki_sha256 for one in two}) == 2


def test_a_private_key_is_in_no_repr(identity: ratls.Identity) -> None:
    assert "PRIVATE" not in repr(identity)
    assert "private_key" not in repr(identity)


@pytest.mark.parametrize("lifetime", [0, -1, 24 * HOUR + 1])
def test_a_lifetime_other_than_hours_is_refused(provider: SimulatedProvider, now: int, lifetime: int) -> None:
    with pytest.raises(ConfigurationError):
        ratls.issue(provider, dns_name=NAME, lifetime=lifetime, now=now)


def test_an_expired_certificate_and_one_of_the_future_are_refused(identity: ratls.Identity, now: int) -> None:
    for moment in (now + HOUR + 1, now - 301):
        with pytest.raises(EvidenceMalformed, match="validity"):
            ratls.read(identity.certificate_pem, now=moment)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_every_flipped_byte_of_a_certificate_is_refused(provider: SimulatedProvider, now: int) -> None:
    # A signature that ends in a zero bit: there a declared unused bit would go unnoticed.
    der = b"\x01"
    while der[-1] & 1:
        identity = ratls.issue(provider, dns_name=NAME, lifetime=HOUR, now=now)
        der = ssl.PEM_cert_to_DER_cert(identity.certificate_pem.decode())
    for offset in range(len(der)):
        for bit in {0, offset % 8}:
            flipped = bytearray(der)
            flipped[offset] ^= 1 << bit
            with pytest.raises(StipError):
                ratls.read(bytes(flipped), now=now)


@given(st.binary(max_size=600))
def test_arbitrary_bytes_give_a_refusal_and_nothing_else(now: int, data: bytes) -> None:
    for form in (data, b"-----BEGIN CERTIFICATE-----\n" + data):
        with pytest.raises(EvidenceMalformed):
            ratls.read(form, now=now)


@given(st.binary(max_size=400))
def test_arbitrary_claims_give_a_refusal_and_nothing_else(data: bytes) -> None:
    with pytest.raises((EvidenceMalformed, ReportDataMismatch)):
        ratls._require_key(data, bytes(32))
    with pytest.raises(EvidenceMalformed):
        ratls._tagged_evidence(data)


def test_an_oversize_certificate_is_refused_before_it_is_parsed(now: int) -> None:
    with pytest.raises(EvidenceMalformed, match="at most"):
        ratls.read(bytes(ratls.CERTIFICATE_LIMIT + 1), now=now)


def test_the_older_extension_is_read_and_verifies(
    forge: Forge, provider: SimulatedProvider, policy: Callable[..., EvidencePolicy], now: int
) -> None:
    der = forge(lambda spki: (ratls.GRAMINE_EXTENSION, provider.quote(spki + bytes(32))))
    assert bytes.fromhex("060b06092a864886f84d8a3906") in der
    found = ratls.read(der, now=now)
    verify(Evidence(found.quote, provider.collateral()), policy(), report_data=found.report_data, now=now)


def refusals(provider: SimulatedProvider) -> dict[str, Callable[[bytes], tuple[x509.ObjectIdentifier, bytes]]]:
    def dice(
        claims: bytes, *, quoted: bytes | None = None, tag: int = ratls.DICE_TEE_QUOTE_TAG
    ) -> tuple[x509.ObjectIdentifier, bytes]:
        return ratls.DICE_EXTENSION, tagged(provider.quote(bind(claims if quoted is None else quoted)), claims, tag)

    other = bytes(32)
    return {
        "claims without pubkey-hash": lambda spki: dice(canonical.encode({"nonce": b"x"})),
        "no claims": lambda spki: dice(canonical.encode({})),
        "claims that are a list": lambda spki: dice(canonical.encode([1])),
        "claims with an unknown key": lambda spki: dice(
            canonical.encode({"pubkey-hash": canonical.encode([1, spki]), "debug": b"1"})
        ),
        "another hash algorithm": lambda spki: dice(
            canonical.encode({"pubkey-hash": canonical.encode([7, spki + bytes(16)])})
        ),
        "pubkey-hash that is not a byte string": lambda spki: dice(canonical.encode({"pubkey-hash": [1, spki]})),
        "claims not canonical": lambda spki: dice(b"\xbf" + claims_for(spki)[1:] + b"\xff"),
        "pubkey-hash of another key": lambda spki: dice(claims_for(other)),
        "a quote over other claims": lambda spki: dice(claims_for(spki), quoted=claims_for(other)),
        "another tag": lambda spki: dice(claims_for(spki), tag=60001),
        "no tag": lambda spki: (ratls.DICE_EXTENSION, cbor2.dumps([b"q", b"c"])),
        "a quote alone": lambda spki: (ratls.DICE_EXTENSION, provider.quote(spki + bytes(32))),
        "older quote over another key": lambda spki: (
            ratls.GRAMINE_EXTENSION,
            provider.quote(other + bytes(32)),
        ),
        "no evidence": lambda spki: (x509.ObjectIdentifier("1.2.3.4"), b"x"),
        "evidence too large": lambda spki: (ratls.DICE_EXTENSION, tagged(bytes(10_000), claims_for(spki))),
    }


@pytest.mark.parametrize("case", list(refusals(None)))  # type: ignore[arg-type]
def test_a_certificate_that_does_not_bind_its_key_is_refused(
    forge: Forge, provider: SimulatedProvider, now: int, case: str
) -> None:
    der = forge(refusals(provider)[case])
    with pytest.raises((EvidenceMalformed, ReportDataMismatch)):
        ratls.read(der, now=now)


def test_a_nonce_among_the_claims_is_accepted(forge: Forge, provider: SimulatedProvider, now: int) -> None:
    def extension(spki: bytes) -> tuple[x509.ObjectIdentifier, bytes]:
        claims = canonical.encode({"pubkey-hash": canonical.encode([1, spki]), "nonce": b"n" * 32})
        return ratls.DICE_EXTENSION, tagged(provider.quote(bind(claims)), claims)

    assert b"nonce" in ratls.read(forge(extension), now=now).claims


def test_a_certificate_signed_by_another_key_is_refused(
    identity: ratls.Identity, provider: SimulatedProvider, now: int
) -> None:
    mine = x509.load_pem_x509_certificate(identity.certificate_pem)
    at = datetime.fromtimestamp(now, tz=UTC)
    evidence = mine.extensions.get_extension_for_oid(ratls.DICE_EXTENSION).value
    stolen = (
        x509.CertificateBuilder(mine.subject, mine.subject, mine.public_key())
        .serial_number(1)
        .not_valid_before(at)
        .not_valid_after(at + timedelta(days=9))
        .add_extension(evidence, critical=False)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )
    with pytest.raises(EvidenceMalformed, match="self-signed"):
        ratls.read(stolen.public_bytes(Encoding.DER), now=now)


def test_the_certificate_serves_a_tls_socket_that_a_pinning_client_reaches(
    platform: SimulatedPlatform, measurement: bytes, tmp_path: Path
) -> None:
    now = int(datetime.now(tz=UTC).timestamp())
    identity = ratls.issue(platform.provider(measurement), dns_name=NAME, lifetime=HOUR, now=now)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = tmp_path / "server.pem"
    pem.write_bytes(identity.certificate_pem + identity.private_key_pem)
    server.load_cert_chain(pem)
    pem.unlink()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            for _ in range(2):
                raw, _ = listener.accept()
                with server.wrap_socket(raw, server_side=True) as channel:
                    channel.sendall(channel.recv(16))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        with (
            socket.create_connection(("127.0.0.1", port)) as raw,
            unverified.wrap_socket(raw, server_hostname=NAME) as channel,
        ):
            fetched = channel.getpeercert(binary_form=True)
            channel.sendall(b"fetch")
            channel.recv(16)
        assert fetched is not None
        assert ratls.read(fetched, now=now).spki_sha256 == identity.spki_sha256

        pinned = ssl.create_default_context(cadata=fetched)
        with (
            socket.create_connection(("127.0.0.1", port)) as raw,
            pinned.wrap_socket(raw, server_hostname=NAME) as channel,
        ):
            channel.sendall(b"ids")
            assert channel.recv(16) == b"ids"
        thread.join(timeout=10)
        assert not thread.is_alive()
