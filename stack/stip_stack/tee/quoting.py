"""The simulated quoting enclaves: quotes to the layouts of `stip_protocol.attestation.quote` (SGX) and `.tdx` (TDX)."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_protocol.attestation.quote import (
    ECDSA_P256,
    INTEL_VENDOR_ID,
    PCK_CHAIN,
    QE_REPORT_DATA,
    TEE_SGX,
    TEE_TDX,
    Attributes,
)
from stip_stack.tee.collateral import QE_ATTRIBUTES, QE_PROD_ID, QE_SIGNER, TD_QE_PROD_ID, TD_QE_SIGNER, Faults
from stip_stack.tee.pki import CPU_SVN, PCE_SVN, Pki

QE_AUTH_DATA = hashlib.sha256(b"stip simulated quoting enclave").digest()
QE_MEASUREMENT = hashlib.sha256(b"stip simulated quoting enclave measurement").digest()
MRSEAM = hashlib.sha384(b"stip simulated TDX module").digest()
XFRM = 0xE7
"""x87, SSE, AVX, AVX-512: what server processors report."""


@dataclass(frozen=True, slots=True)
class EnclaveIdentity:
    """Who the simulated enclave says it is."""

    measurement: bytes
    signer: bytes
    isv_prod_id: int
    isv_svn: int


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """Which trust domain the simulated host says it is. 48 bytes a measurement."""

    mrtd: bytes
    rtmrs: tuple[bytes, ...] = (bytes(48),) * 4
    mrseam: bytes = MRSEAM
    xfam: int = XFRM


def quote(pki: Pki, enclave: EnclaveIdentity, report_data: bytes, faults: Faults) -> bytes:
    """A quote over 64 bytes of report data, signed by the platform's attestation and PCK keys."""
    header = struct.pack("<HHIHH16s20s", 3, ECDSA_P256, TEE_SGX, faults.qe_isv_svn, PCE_SVN, INTEL_VENDOR_ID, bytes(20))
    signed = header + _report(enclave, faults.attributes, report_data)
    qe = EnclaveIdentity(QE_MEASUREMENT, QE_SIGNER, QE_PROD_ID, faults.qe_isv_svn)
    signature, point = _attested(pki, signed)
    return _sized(signed, signature + point + _certified(pki, qe, point))


def td_quote(pki: Pki, host: HostIdentity, report_data: bytes, faults: Faults) -> bytes:
    """A version 4 quote of a trust domain over 64 bytes of report data."""
    header = struct.pack("<HHIHH16s20s", 4, ECDSA_P256, TEE_TDX, 0, 0, INTEL_VENDOR_ID, bytes(20))
    body = struct.pack(
        "<16s48s48s8sQQ48s48s48s48s192s64s",
        faults.tee_tcb_svn,
        host.mrseam,
        faults.mrsignerseam,
        bytes(8),
        faults.td_attributes,
        host.xfam,
        host.mrtd,
        bytes(48),
        bytes(48),
        bytes(48),
        b"".join(host.rtmrs),
        report_data,
    )
    qe = EnclaveIdentity(QE_MEASUREMENT, TD_QE_SIGNER, TD_QE_PROD_ID, faults.qe_isv_svn)
    signature, point = _attested(pki, header + body)
    certified = _certified(pki, qe, point)
    outer = struct.pack("<HI", QE_REPORT_DATA, len(certified)) + certified
    return _sized(header + body, signature + point + outer)


def _attested(pki: Pki, signed: bytes) -> tuple[bytes, bytes]:
    """The attestation key's signature, and that key."""
    point = pki.keys["attestation"].public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
    return pki.sign("attestation", signed), point


def _certified(pki: Pki, qe: EnclaveIdentity, point: bytes) -> bytes:
    """The QE report that vouches for the attestation key, its signature, and the PCK chain."""
    qe_report = _report(qe, QE_ATTRIBUTES, hashlib.sha256(point + QE_AUTH_DATA).digest() + bytes(32))
    chain = pki.chain("pck", "pck_ca", "root").encode() + b"\x00"
    return b"".join(
        (
            qe_report,
            pki.sign("pck", qe_report),
            struct.pack("<H", len(QE_AUTH_DATA)),
            QE_AUTH_DATA,
            struct.pack("<HI", PCK_CHAIN, len(chain)),
            chain,
        )
    )


def _sized(signed: bytes, signature_data: bytes) -> bytes:
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
