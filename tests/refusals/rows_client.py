"""Enclaves that a client turns away from: certificates that do not bind their key, answers that are not fresh."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import cbor2
from asn1crypto import core
from asn1crypto import x509 as asn1
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

import stip
from stip_protocol import canonical
from stip_protocol.attestation import freshness, ratls
from stip_protocol.attestation.evidence import Evidence, bind
from stip_protocol.attestation.quote import Attributes
from stip_stack.tee import Faults, SimulatedPlatform
from tests.client.conftest import MEASUREMENT, SERVER_NAME, ScriptedEnclave
from tests.refusals.table import Act, Case, Section

MALFORMED, MISMATCH, REFUSED = "evidence_malformed", "report_data_mismatch", "evidence_refused"
DICE, OLDER = ratls.DICE_EXTENSION, ratls.GRAMINE_EXTENSION
BESIDE = x509.ObjectIdentifier("2.23.133.5.4.10")
"""An object identifier as long as DICE's, to be overwritten by it: no library writes an extension twice."""
HOUR = timedelta(hours=1)
Extension = tuple[x509.ObjectIdentifier, bytes]


@dataclass
class ClientScene:
    """A client with a profile, and somebody in the enclave's place."""

    platform: SimulatedPlatform
    now: int
    start: Callable[..., ScriptedEnclave]
    """Starts an enclave, with another identity or provider than its own."""
    profile: Callable[..., Path]
    """Writes the profile of a user for an enclave's port."""

    @property
    def provider(self) -> Any:
        return self.platform.provider(MEASUREMENT)

    def connecting(self, enclave: ScriptedEnclave, **changes: Any) -> Act:
        async def connected() -> Any:
            async with await stip.aconnect(self.profile(enclave.port, **changes)) as connection:
                return connection.verification

        return connected

    def presenting(self, identity: ratls.Identity) -> Act:
        """A client before an address that presents this certificate, and holds its key."""
        return self.connecting(self.start(identity=identity))

    def dice(self, claims: bytes, *, quoted: bytes | None = None, tag: int = ratls.DICE_TEE_QUOTE_TAG) -> bytes:
        """The DICE extension's value over claims, under a genuine quote of `quoted` or of these claims."""
        quote = self.provider.quote(bind(claims if quoted is None else quoted))
        return cbor2.dumps(cbor2.CBORTag(tag, [quote, claims]))


def claims_for(spki: bytes) -> bytes:
    return canonical.encode({ratls.PUBKEY_HASH: canonical.encode([ratls.SHA256_ID, spki])})


def certified(
    *extensions: Callable[[bytes], Extension],
    key: Any = None,
    signer: Any = None,
    dns: str = SERVER_NAME,
    opens: timedelta = -HOUR,
    closes: timedelta = HOUR,
) -> ratls.Identity:
    """A certificate with extensions made from its key's hash; all that TLS wants is in order."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    digest = hashlib.sha256(spki).digest()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an enclave")])
    now = datetime.now(tz=UTC)
    builder = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + opens)
        .not_valid_after(now + closes)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(x509.UnrecognizedExtension(*extension(digest)), critical=False)
    made = builder.sign(signer or key, hashes.SHA256())
    return ratls.Identity(
        certificate_pem=made.public_bytes(Encoding.PEM),
        private_key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        spki_sha256=digest,
    )


def twice(identity: ratls.Identity, key: ec.EllipticCurvePrivateKey) -> ratls.Identity:
    """The certificate with the extension `BESIDE` written as a second one of DICE, signed again."""
    der = x509.load_pem_x509_certificate(identity.certificate_pem).public_bytes(Encoding.DER)
    parsed = asn1.Certificate.load(der)
    body = parsed["tbs_certificate"].dump().replace(oid(BESIDE), oid(DICE))
    parsed["tbs_certificate"] = asn1.TbsCertificate.load(body)
    parsed["signature_value"] = key.sign(body, ec.ECDSA(hashes.SHA256()))
    pem = ssl.DER_cert_to_PEM_cert(parsed.dump()).encode()
    return ratls.Identity(pem, identity.private_key_pem, identity.spki_sha256)


def oid(of: x509.ObjectIdentifier) -> bytes:
    return bytes(core.ObjectIdentifier(of.dotted_string).dump())


def certificate(
    name: str,
    told: str,
    code: str,
    *extensions: Callable[[ClientScene, bytes], Extension],
    **options: Any,
) -> Case:
    """A certificate in the place of the enclave's."""

    async def arrange(scene: ClientScene) -> Act:
        made = certified(*(partial(make, scene) for make in extensions), **options)
        return scene.presenting(made)

    return Case(name, told, code, arrange, event=None)


def tagged(claims: Callable[[bytes], bytes], **options: Any) -> Callable[[ClientScene, bytes], Extension]:
    return lambda scene, spki: (DICE, scene.dice(claims(spki), **options))


def genuine(scene: ClientScene, spki: bytes) -> Extension:
    return DICE, scene.dice(claims_for(spki))


OTHER = bytes(32)


async def two_of_one(scene: ClientScene) -> Act:
    key = ec.generate_private_key(ec.SECP256R1())
    made = certified(
        lambda spki: (DICE, scene.dice(claims_for(spki))),
        lambda spki: (BESIDE, scene.dice(claims_for(OTHER))),
        key=key,
    )
    return scene.presenting(twice(made, key))


async def stolen(scene: ClientScene) -> Act:
    """A genuine enclave's certificate, presented by somebody who does not hold its key."""
    enclaves = ratls.issue(scene.provider, dns_name=SERVER_NAME, lifetime=3600, now=scene.now)
    theirs = x509.load_pem_x509_certificate(enclaves.certificate_pem)
    evidence = theirs.extensions.get_extension_for_oid(DICE).value
    assert isinstance(evidence, x509.UnrecognizedExtension)
    return scene.presenting(certified(lambda spki: (DICE, evidence.value)))


def answering(name: str, told: str, code: str, answer: Callable[[ClientScene, ScriptedEnclave], Any]) -> Case:
    """A genuine certificate, and another answer to the challenge."""

    async def arrange(scene: ClientScene) -> Act:
        enclave = scene.start()
        enclave.answer = answer(scene, enclave)
        return scene.connecting(enclave)

    return Case(name, told, code, arrange, event=None)


def to_another_nonce(scene: ClientScene, enclave: ScriptedEnclave) -> Any:
    captured = enclave.attested(bytes(32))
    return lambda nonce: captured


def of_another_channel(scene: ClientScene, enclave: ScriptedEnclave) -> Any:
    return lambda nonce: freshness.answer(scene.provider, nonce, b"k" * 32)


def over_other_claims(scene: ClientScene, enclave: ScriptedEnclave) -> Any:
    stale = enclave.attested(bytes(32))

    def answer(nonce: bytes) -> freshness.Answer:
        return freshness.Answer(freshness.claims(nonce, enclave.identity.spki_sha256), stale.evidence)

    return answer


def with_quote(alter: Callable[[bytes], bytes]) -> Any:
    def of(scene: ClientScene, enclave: ScriptedEnclave) -> Any:
        def answer(nonce: bytes) -> freshness.Answer:
            made = enclave.attested(nonce)
            return freshness.Answer(made.claims, Evidence(alter(made.evidence.quote), made.evidence.collateral))

        return answer

    return of


def by(name: str, told: str, code: str, *, measurement: bytes = MEASUREMENT, policy: Any = None, age: int = 0,
       **faults: Any) -> Case:  # fmt: skip
    """An enclave that is not the one that the policy means."""

    async def arrange(scene: ClientScene) -> Act:
        clock = (lambda: float(scene.now - age)) if age else (lambda: float(scene.now))
        provider = scene.platform.provider(measurement, faults=Faults(**faults), clock=clock)
        return scene.connecting(scene.start(provider=provider), policy=policy)

    return Case(name, told, code, arrange, event=None)


async def fresh_from_another(scene: ClientScene) -> Act:
    """The certificate of one enclave, the fresh quote of another, both on the list."""
    other = bytes(range(1, 33))
    enclave = scene.start(provider=scene.platform.provider(other), certificate_provider=scene.provider)
    return scene.connecting(enclave, policy={"measurements": [MEASUREMENT.hex(), other.hex()]})


CERTIFICATES = Section(
    "Certificates, at the client",
    "What an address presents before a client says anything: an RA-TLS certificate whose quote binds its key. Nothing "
    "of the user's, not even a delegation, reaches whoever presents another one.",
    "client",
    (
        certificate(
            "a DICE certificate without pubkey-hash", "the claims", MALFORMED,
            tagged(lambda spki: canonical.encode({ratls.NONCE: b"x" * 32})),
        ),
        certificate("a DICE certificate without claims", "the claims", MALFORMED,
                    tagged(lambda spki: canonical.encode({}))),
        certificate(
            "a DICE certificate whose pubkey-hash is of another key", "`pubkey-hash`", MISMATCH,
            tagged(lambda spki: claims_for(OTHER)),
        ),
        certificate(
            "a DICE certificate whose pubkey-hash is of another algorithm", "`pubkey-hash`", MALFORMED,
            tagged(lambda spki: canonical.encode({ratls.PUBKEY_HASH: canonical.encode([7, spki + bytes(16)])})),
        ),
        certificate(
            "a DICE certificate with a claim that nobody knows", "the claims", MALFORMED,
            tagged(lambda spki: canonical.encode(
                {ratls.PUBKEY_HASH: canonical.encode([ratls.SHA256_ID, spki]), "debug": b"1"}
            )),
        ),
        certificate("a DICE certificate under a quote of other claims", "the quote", MISMATCH,
                    tagged(claims_for, quoted=claims_for(OTHER))),
        certificate("a DICE certificate with another CBOR tag", "the tag", MALFORMED, tagged(claims_for, tag=60001)),
        Case("a certificate with two DICE extensions", "one more, over another key", MALFORMED, two_of_one, event=None),
        certificate(
            "a certificate whose DICE extension is another key's, beside an older one that is right", "`pubkey-hash`",
            MISMATCH, tagged(lambda spki: claims_for(OTHER)),
            lambda scene, spki: (OLDER, scene.provider.quote(spki + bytes(32))),
        ),
        certificate("a certificate of the older form over another key", "the quote's report data", MISMATCH,
                    lambda scene, spki: (OLDER, scene.provider.quote(OTHER + bytes(32)))),
        certificate("a certificate without evidence", "the extension", MALFORMED),
        certificate(
            "a certificate with a byte after its quote", "the quote", MALFORMED,
            lambda scene, spki: (DICE, cbor2.dumps(cbor2.CBORTag(
                ratls.DICE_TEE_QUOTE_TAG,
                [scene.provider.quote(bind(claims_for(spki))) + b"\x00", claims_for(spki)],
            ))),
        ),
        Case("the evidence of a genuine enclave in a certificate of somebody else's", "the key", MISMATCH, stolen,
             event=None),
        certificate("an expired certificate", "its validity", MALFORMED, genuine, opens=-2 * HOUR, closes=-HOUR),
        certificate("a certificate that is not valid yet", "its validity", MALFORMED, genuine,
                    opens=HOUR, closes=2 * HOUR),
        certificate("a certificate for another name", "the DNS name", REFUSED, genuine, dns="elsewhere.test"),
        certificate("a certificate that another key signed", "the signature", MALFORMED, genuine,
                    signer=ec.generate_private_key(ec.SECP256R1())),
        certificate("a certificate over an RSA key", "the key", MALFORMED, genuine,
                    key=rsa.generate_private_key(65537, 2048)),
    ),
)  # fmt: skip
ANSWERS = Section(
    "Answers and enclaves, at the client",
    "The holder of the certificate's key answers this client's nonce with a quote of its own, and both quotes are "
    "about an enclave that the user's policy means.",
    "client",
    (
        answering("a captured answer to another nonce", "the nonce", MISMATCH, to_another_nonce),
        answering("an answer relayed from another channel", "the TLS key", MISMATCH, of_another_channel),
        answering("fresh claims under a captured quote", "the quote", MISMATCH, over_other_claims),
        answering("an answer with a byte after its quote", "the quote", MALFORMED, with_quote(lambda q: q + b"\x00")),
        answering("an answer without a whole quote", "the quote", MALFORMED, with_quote(lambda q: q[:-1])),
        Case("a fresh quote of another enclave than the certificate's", "the measurement", "measurement_refused",
             fresh_from_another, event=None),
        by("an enclave that the user's policy does not name", "MRENCLAVE", "measurement_refused",
           measurement=bytes(32)),
        by("a debug enclave, before a user", "DEBUG", "debug_enclave_refused",
           attributes=Attributes.INIT | Attributes.MODE64 | Attributes.DEBUG),
        by("an enclave on a platform that is out of date, before a user", "`tcbStatus`", REFUSED,
           tcb_status="OutOfDate"),
        by("an enclave with expired collateral, before a user", "31 days", "collateral_expired", age=31 * 86400),
        by("an enclave with a revoked PCK certificate, before a user", "the PCK CRL", REFUSED, pck_revoked=True),
        by("an enclave with TCB info labelled version 2, before a user", "`version`", REFUSED, tcb_info_version=2),
    ),
)  # fmt: skip
