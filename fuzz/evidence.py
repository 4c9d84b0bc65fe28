"""Targets that read evidence: quotes, certificates, collateral, revocation lists, answers of a PCCS."""

from __future__ import annotations

import json
import ssl
from datetime import UTC, datetime, timedelta

import httpx2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from fuzz import material
from fuzz.target import Target
from stip_protocol.attestation import collateral_bundle, dcap, hosts, pccs, ratls, verifier
from stip_protocol.attestation.certificates import read_chain
from stip_protocol.attestation.collateral import Collateral
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.hostpolicy import HostPolicy
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.quote import SgxQuote, tee_type, without_padding
from stip_protocol.attestation.tdx import TdxQuote
from stip_protocol.errors import CollateralUnavailable, StipError

HEADER_BREAK = b"\n\n"
"""Between headers and body of an answer."""


def _rules(measurement: bytes) -> dict[str, object]:
    return {
        "mode": "development",
        "measurements": [measurement.hex()],
        "simulated_root_sha256": material.platform().root_sha256.hex(),
    }


def _sgx_quote(data: bytes) -> None:
    """Parsed, and appraised whole: what the verifier says of a quote that parses is a refusal or an acceptance."""
    tee_type(data)
    SgxQuote.parse(data)
    evidence, policy = Evidence(data, material.collateral()), EvidencePolicy.from_mapping(_rules(material.MEASUREMENT))
    verifier.examine(evidence, policy, report_data=material.REPORT_DATA, now=material.NOW)
    PlatformKind.of_quote(data, material.platform().root_der)


def _tdx_quote(data: bytes) -> None:
    tee_type(data)
    TdxQuote.parse(data)
    evidence, policy = Evidence(data, _tdx_collateral()), HostPolicy.from_mapping(_rules(material.MRTD))
    root = material.platform().root_der
    hosts.examine(evidence, policy, report_data=material.REPORT_DATA, now=material.NOW, root_der=root)
    PlatformKind.of_quote(data, root)


def _tdx_collateral() -> bytes:
    return material.platform().collateral(material.NOW, tee="TDX")


def _collateral(data: bytes) -> None:
    Collateral.parse(data).windows()
    evidence, policy = Evidence(material.sgx_quote(), data), EvidencePolicy.from_mapping(_rules(material.MEASUREMENT))
    root = material.platform().root_der
    verifier.verify(evidence, policy, report_data=material.REPORT_DATA, now=material.NOW, root_der=root)


def _with_lists(data: bytes) -> None:
    """A revocation list, in its place in collateral that is good otherwise: the first byte says which."""
    whole = json.loads(material.collateral())
    whole["root_ca_crl" if data[:1] < b"\x80" else "pck_crl"] = data[1:].hex()
    _collateral(json.dumps(whole).encode())


def _lists() -> list[bytes]:
    whole = json.loads(material.collateral())
    return [b"\x00" + bytes.fromhex(whole["root_ca_crl"]), b"\xff" + bytes.fromhex(whole["pck_crl"])]


def _chain(data: bytes) -> None:
    """A PCK chain as a quote carries it: PEM."""
    read_chain(data, what="PCK chain")
    dcap.fmspc_of(data)


def _der(data: bytes) -> None:
    """One certificate, of which the fuzzer sees the DER: PEM hides structure."""
    _chain(_pem(data))


def _pem(der: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(der).encode()


def _pck_chain() -> bytes:
    return SgxQuote.parse(material.sgx_quote()).certification_data.removesuffix(b"\x00")


def _pck_ders() -> list[bytes]:
    return [one.public_bytes(Encoding.DER) for one in x509.load_pem_x509_certificates(_pck_chain())]


def _ratls(data: bytes) -> None:
    ratls.read(data, now=material.NOW)


def _certificates() -> list[bytes]:
    pem = material.identity().certificate_pem
    return [pem, x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)]


def _dice(data: bytes) -> None:
    """The DICE extension, in a certificate whose signature is good: nothing else keeps an attacker from the parser."""
    key = load_pem_private_key(material.identity().private_key_pem, None)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fuzz")])
    now = datetime.fromtimestamp(material.NOW, UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())  # type: ignore[arg-type]
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.UnrecognizedExtension(ratls.DICE_EXTENSION, data), critical=False)
    )
    _ratls(built.sign(key, hashes.SHA256()).public_bytes(Encoding.DER))  # type: ignore[arg-type]


def _dice_extensions() -> list[bytes]:
    certificate = x509.load_pem_x509_certificate(material.identity().certificate_pem)
    extension = certificate.extensions.get_extension_for_oid(ratls.DICE_EXTENSION).value
    return [extension.value] if isinstance(extension, x509.UnrecognizedExtension) else []


def _pccs(data: bytes) -> None:
    """An answer: header lines, a blank line, the body. What the client calls permanent costs that source its turn."""
    head, _, body = data.partition(HEADER_BREAK)
    pairs = [tuple(line.partition(b": ")[::2]) for line in head.split(b"\n")]
    reply = pccs.Reply(body, httpx2.Headers([(name, value) for name, value in pairs if name]))
    refused: StipError | None = None
    for read in (
        lambda: reply.chain(pccs.TCB_CHAIN_HEADER),
        lambda: reply.signed("tcbInfo"),
        lambda: reply.signed("enclaveIdentity"),
        reply.crl,
    ):
        try:
            read()
        except pccs.Permanent as error:
            refused = CollateralUnavailable(str(error))
    if refused is not None:
        raise refused


def _answers() -> list[bytes]:
    whole = json.loads(material.collateral())
    signed = json.dumps({"signature": whole["tcb_info_signature"]})[1:]
    body = b'{"tcbInfo":' + whole["tcb_info"].encode() + b"," + signed.encode()
    chain = whole["tcb_info_issuer_chain"].replace("\n", "%0A").replace(" ", "%20").encode()
    return [
        pccs.TCB_CHAIN_HEADER.encode() + b": " + chain + HEADER_BREAK + body,
        HEADER_BREAK + whole["pck_crl"].encode(),
        HEADER_BREAK + bytes.fromhex(whole["root_ca_crl"]),
    ]


TARGETS = (
    Target("sgx-quote", _sgx_quote, lambda: [material.sgx_quote(), *material.vectors("sgx_quote")], 9000),
    Target(
        "tdx-quote",
        _tdx_quote,
        lambda: [material.tdx_quote(), *map(without_padding, material.vectors("tdx_quote"))],
        9000,
    ),
    Target("pck-chain", _chain, lambda: [_pck_chain()], 8192),
    Target("pck-certificate", _der, _pck_ders, 2048),
    Target("ra-tls-certificate", _ratls, _certificates, 12_000),
    Target("dice-extension", _dice, _dice_extensions, 9500),
    Target(
        "collateral",
        _collateral,
        lambda: [material.collateral(), _tdx_collateral(), *material.vectors("*_collateral.json")],
        32_768,
    ),
    Target("revocation-list", _with_lists, _lists, 4096),
    Target("pccs-answer", _pccs, _answers, 16_384),
    Target("collateral-bundle", collateral_bundle.decode, lambda: [material.collateral()], 32_768),
)
