"""The simulated quoting enclave: version 3 quotes to the layout of `stip_protocol.attestation.quote`."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_protocol.attestation.quote import ECDSA_P256, INTEL_VENDOR_ID, PCK_CHAIN, TEE_SGX, Attributes
from stip_stack.tee.collateral import QE_ATTRIBUTES, QE_PROD_ID, QE_SIGNER, Faults
from stip_stack.tee.pki import CPU_SVN, PCE_SVN, Pki

QE_AUTH_DATA = hashlib.sha256(b"stip simulated quoting enclave").digest()
QE_MEASUREMENT = hashlib.sha256(b"stip simulated quoting enclave measurement").digest()
XFRM = 0xE7
"""x87, SSE, AVX, AVX-512: what server processors report."""


@dataclass(frozen=True, slots=True)
class EnclaveIdentity:
    """Who the simulated enclave says it is."""

    measurement: bytes
    signer: bytes
    isv_prod_id: int
    isv_svn: int


def quote(pki: Pki, enclave: EnclaveIdentity, report_data: bytes, faults: Faults) -> bytes:
    """A quote over 64 bytes of report data, signed by the platform's attestation and PCK keys."""
    header = struct.pack("<HHIHH16s20s", 3, ECDSA_P256, TEE_SGX, faults.qe_isv_svn, PCE_SVN, INTEL_VENDOR_ID, bytes(20))
    signed = header + _report(enclave, faults.attributes, report_data)
    point = pki.keys["attestation"].public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
    binding = hashlib.sha256(point + QE_AUTH_DATA).digest() + bytes(32)
    qe = EnclaveIdentity(QE_MEASUREMENT, QE_SIGNER, QE_PROD_ID, faults.qe_isv_svn)
    qe_report = _report(qe, QE_ATTRIBUTES, binding)
    chain = pki.chain("pck", "pck_ca", "root").encode() + b"\x00"
    signature_data = b"".join(
        (
            pki.sign("attestation", signed),
            point,
            qe_report,
            pki.sign("pck", qe_report),
            struct.pack("<H", len(QE_AUTH_DATA)),
            QE_AUTH_DATA,
            struct.pack("<HI", PCK_CHAIN, len(chain)),
            chain,
        )
    )
    return signed + struct.pack("<I", len(signature_data)) + signature_data


def _report(enclave: EnclaveIdentity, attributes: Attributes, report_data: bytes) -> bytes:
    return struct.pack(
        "<16sI28xQQ32s32x32s32x64xHHH42x16s64s",
        bytes(CPU_SVN),
        0,
        attributes,
        XFRM,
        enclave.measurement,
        enclave.signer,
        enclave.isv_prod_id,
        enclave.isv_svn,
        0,
        bytes(16),
        report_data,
    )
