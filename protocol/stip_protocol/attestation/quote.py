"""SGX DCAP quotes, version 3: a strict parser of the byte layout, and what TDX quotes (`tdx`) share with them.

Source: Intel, "Intel SGX ECDSA QuoteLibraryReference DCAP API", Appendix A (quote format), and the Intel SDM
volume 3D, table 37-21 (REPORT). All integers are little-endian. Every byte of a quote belongs to exactly one
field here: there is no slack in which two different byte strings could mean the same quote.

Nothing in this module is verified: it says what a quote claims. `stip_protocol.attestation.verifier` decides.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import Self

from stip_protocol.errors import EvidenceMalformed

QUOTE_LIMIT = 8192
"""Bytes of the largest quote: SGX_QUOTE_MAX_SIZE of Gramine, which reads them from /dev/attestation/quote."""
INTEL_VENDOR_ID = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
ECDSA_P256 = 2
"""Attestation key type."""
TEE_SGX = 0
TEE_TDX = 0x81
PCK_CHAIN = 5
"""Certification data type: the PCK certificate chain as PEM."""
QE_AUTH_BYTES = 32
QE_REPORT_DATA = 6
"""Certification data type: the QE report with its signature, and what certifies it nested inside (TDX)."""
HEADER = 48
REPORT_BODY = 384
TD_REPORT = 584
"""Bytes of a TDX report body (`tdx`)."""
SIGNED = HEADER + REPORT_BODY
"""Bytes that the attestation key signs."""
_FIXED = 64 + 64 + REPORT_BODY + 64 + 2 + QE_AUTH_BYTES + 6
"""Bytes of the signature data before the certification data."""


class Attributes(IntFlag):
    """ATTRIBUTES.FLAGS of an enclave (SDM volume 3D, table 37-3)."""

    INIT = 0x01
    DEBUG = 0x02
    MODE64 = 0x04
    PROVISION_KEY = 0x10
    EINITTOKEN_KEY = 0x20
    CET = 0x40
    KSS = 0x80
    AEX_NOTIFY = 0x400


@dataclass(frozen=True, slots=True)
class Header:
    """The first 48 bytes. The two SVNs are reserved in version 4, and signed like everything here."""

    qe_svn: int
    pce_svn: int
    user_data: bytes

    @classmethod
    def parse(cls, data: bytes, *, version: int, tee_type: int) -> Self:
        """Parse the header of one kind of quote. Raises `EvidenceMalformed` naming the field."""
        found, key_type, tee, qe_svn, pce_svn = struct.unpack_from("<HHIHH", data, 0)
        if found != version:
            kind = {TEE_SGX: "an SGX enclave", TEE_TDX: "a TDX host"}[tee_type]
            got = f"{found} (a TDX quote)" if tee == TEE_TDX else found
            raise EvidenceMalformed.because("quote version", got, f"{version}, of {kind}")
        require("attestation key type", key_type, ECDSA_P256)
        require("TEE type", tee, tee_type)
        require("QE vendor id", data[12:28].hex(), INTEL_VENDOR_ID.hex())
        return cls(qe_svn, pce_svn, data[28:HEADER])


@dataclass(frozen=True, slots=True)
class ReportBody:
    """The 384 bytes the processor writes about one enclave."""

    cpusvn: bytes
    miscselect: int
    attributes: Attributes
    xfrm: int
    mrenclave: bytes
    mrsigner: bytes
    config_id: bytes
    isv_prod_id: int
    isv_svn: int
    config_svn: int
    family_id: bytes
    report_data: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Parse exactly 384 bytes. Raises `EvidenceMalformed`."""
        if len(body) != REPORT_BODY:
            raise EvidenceMalformed.because("report body", f"{len(body)} bytes", f"{REPORT_BODY} bytes")
        miscselect, flags, xfrm = struct.unpack_from("<I28xQQ", body, 16)
        isv_prod_id, isv_svn, config_svn = struct.unpack_from("<HHH", body, 256)
        return cls(
            cpusvn=body[:16],
            miscselect=miscselect,
            attributes=Attributes(flags),
            xfrm=xfrm,
            mrenclave=body[64:96],
            mrsigner=body[128:160],
            config_id=body[192:256],
            isv_prod_id=isv_prod_id,
            isv_svn=isv_svn,
            config_svn=config_svn,
            family_id=body[304:320],
            report_data=body[320:384],
        )


@dataclass(frozen=True, slots=True)
class SgxQuote:
    """A version 3 quote, taken apart. Fields in the order of the bytes."""

    header: Header
    report: ReportBody
    signature: bytes
    """ECDSA r‖s by the attestation key over the first 432 bytes."""
    attestation_key: bytes
    """P-256 x‖y."""
    qe_report: ReportBody
    qe_signature: bytes
    """ECDSA r‖s by the PCK key over the QE report."""
    qe_auth_data: bytes
    certification_data: bytes
    """The PCK chain as it lies in the quote: PEM leaf‖CA‖root, with or without a closing NUL."""

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse a whole quote; nothing may follow it. Raises `EvidenceMalformed` naming the field."""
        if not SIGNED + 4 <= len(data) <= QUOTE_LIMIT:
            raise EvidenceMalformed.because("quote", f"{len(data)} bytes", f"{SIGNED + 4} to {QUOTE_LIMIT} bytes")
        header = Header.parse(data, version=3, tee_type=TEE_SGX)
        (signature_bytes,) = struct.unpack_from("<I", data, SIGNED)
        require("signature data length", signature_bytes, len(data) - SIGNED - 4)
        if signature_bytes < _FIXED:
            raise EvidenceMalformed.because("signature data length", signature_bytes, f"at least {_FIXED}")
        (auth_bytes,) = struct.unpack_from("<H", data, 1012)
        require("QE authentication data length", auth_bytes, QE_AUTH_BYTES)
        certification_type, certification_bytes = struct.unpack_from("<HI", data, 1046)
        require("certification data type", certification_type, PCK_CHAIN)
        require("certification data length", certification_bytes, len(data) - 1052)
        return cls(
            header=header,
            report=ReportBody.parse(data[HEADER:SIGNED]),
            signature=data[436:500],
            attestation_key=data[500:564],
            qe_report=ReportBody.parse(data[564:948]),
            qe_signature=data[948:1012],
            qe_auth_data=data[1014:1046],
            certification_data=data[1052:],
        )

    @property
    def mrenclave(self) -> bytes:
        return self.report.mrenclave

    @property
    def mrsigner(self) -> bytes:
        return self.report.mrsigner

    @property
    def isv_prod_id(self) -> int:
        return self.report.isv_prod_id

    @property
    def isv_svn(self) -> int:
        return self.report.isv_svn

    @property
    def attributes(self) -> Attributes:
        return self.report.attributes

    @property
    def report_data(self) -> bytes:
        return self.report.report_data


def require(field: str, got: object, allowed: object) -> None:
    """Raises `EvidenceMalformed` where the two differ."""
    if got != allowed:
        raise EvidenceMalformed.because(field, got, allowed)


def tee_type(data: bytes) -> int:
    """Which TEE a quote says it is of: `TEE_SGX` or `TEE_TDX`. Raises `EvidenceMalformed`."""
    kinds = {(3, TEE_SGX): TEE_SGX, (4, TEE_TDX): TEE_TDX}
    if not HEADER <= len(data) <= QUOTE_LIMIT:
        raise EvidenceMalformed.because("quote", f"{len(data)} bytes", f"{HEADER} to {QUOTE_LIMIT} bytes")
    version, _, tee = struct.unpack_from("<HHI", data, 0)
    if (version, tee) not in kinds:
        raise EvidenceMalformed.because("quote version, TEE type", f"{version}, {tee:#x}", "3, 0x0 or 4, 0x81")
    return kinds[version, tee]


def without_padding(data: bytes) -> bytes:
    """A quote as a file or a device holds it, without the zeros that fill its buffer.

    For whoever collects quotes (Linux's TDX guest drivers hand out a buffer of fixed size). What arrives over a
    network must be exact. Raises `EvidenceMalformed` where something else than zeros follows the quote.
    """
    signed = SIGNED if tee_type(data) == TEE_SGX else HEADER + TD_REPORT
    if len(data) < signed + 4:
        raise EvidenceMalformed.because("quote", f"{len(data)} bytes", f"at least {signed + 4}")
    (signature_bytes,) = struct.unpack_from("<I", data, signed)
    end = signed + 4 + signature_bytes
    if any(data[end:]):
        raise EvidenceMalformed.because("bytes after the quote", f"{len(data) - end}", "none, or zeros")
    return data[:end]
