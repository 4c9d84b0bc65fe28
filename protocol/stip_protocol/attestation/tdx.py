"""TDX DCAP quotes, version 4: a strict parser of the byte layout.

Source: Intel, "Intel TDX DCAP Quoting Library API", Appendix A.3 (version 4 quote format: header, TD quote body for
TDX 1.0, signature data with QE report certification data), and Intel, "TDX Module ABI Specification",
ATTRIBUTES and XFAM. All integers are little-endian. As in `quote`, every byte belongs to exactly one field and
nothing here is verified: `stip_protocol.attestation.hosts` decides.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import Self

from stip_protocol.attestation.quote import (
    HEADER,
    PCK_CHAIN,
    QE_AUTH_BYTES,
    QE_REPORT_DATA,
    QUOTE_LIMIT,
    REPORT_BODY,
    TD_REPORT,
    TEE_TDX,
    Header,
    ReportBody,
    require,
)
from stip_protocol.errors import EvidenceMalformed

MEASUREMENT = 48
"""Bytes of a TDX measurement: SHA-384."""
RTMRS = 4
SIGNED = HEADER + TD_REPORT
"""Bytes that the attestation key signs."""
_SIGNATURE = SIGNED + 4
_OUTER = _SIGNATURE + 64 + 64
_QE_REPORT = _OUTER + 6
_QE_SIGNATURE = _QE_REPORT + REPORT_BODY
_QE_AUTH = _QE_SIGNATURE + 64
_NESTED = _QE_AUTH + 2 + QE_AUTH_BYTES
_CHAIN = _NESTED + 6
"""Offsets; they are fixed because QE authentication data has one length."""


class TdAttributes(IntFlag):
    """ATTRIBUTES of a trust domain. The lowest byte (TUD) marks a TD under debug or profiling: untrusted."""

    DEBUG = 1 << 0
    HGS_PLUS_PROF = 1 << 4
    PERF_PROF = 1 << 5
    PMT_PROF = 1 << 6
    LASS = 1 << 27
    SEPT_VE_DISABLE = 1 << 28
    MIGRATABLE = 1 << 29
    PKS = 1 << 30
    KL = 1 << 31
    TPA = 1 << 62
    PERFMON = 1 << 63


UNTRUSTED = 0xFF
"""The TUD bits of ATTRIBUTES."""


@dataclass(frozen=True, slots=True)
class TdReport:
    """The 584 bytes that the TDX module writes about one trust domain."""

    tee_tcb_svn: bytes
    """Byte 0: SVN of the TDX module, byte 1: its major version."""
    mrseam: bytes
    """Measurement of the TDX module."""
    mrsignerseam: bytes
    seam_attributes: bytes
    """8 bytes, as collateral writes them."""
    td_attributes: TdAttributes
    xfam: int
    mrtd: bytes
    """Measurement of what the TD started with: its virtual firmware."""
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    rtmrs: tuple[bytes, ...]
    """Run-time measurements 0 to 3: by convention configuration, boot loader and kernel, initrd and command line,
    and what user space extends."""
    report_data: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Parse exactly 584 bytes. Raises `EvidenceMalformed`."""
        if len(body) != TD_REPORT:
            raise EvidenceMalformed.because("TD report body", f"{len(body)} bytes", f"{TD_REPORT} bytes")
        tcb_svn, mrseam, mrsignerseam, seam_attributes, attributes, xfam, *rest = struct.unpack(
            "<16s48s48s8sQQ48s48s48s48s48s48s48s48s64s", body
        )
        mrtd, mrconfigid, mrowner, mrownerconfig, *rtmrs, report_data = rest
        return cls(
            tee_tcb_svn=tcb_svn,
            mrseam=mrseam,
            mrsignerseam=mrsignerseam,
            seam_attributes=seam_attributes,
            td_attributes=TdAttributes(attributes),
            xfam=xfam,
            mrtd=mrtd,
            mrconfigid=mrconfigid,
            mrowner=mrowner,
            mrownerconfig=mrownerconfig,
            rtmrs=tuple(rtmrs),
            report_data=report_data,
        )


@dataclass(frozen=True, slots=True)
class TdxQuote:
    """A version 4 quote, taken apart. Fields in the order of the bytes."""

    header: Header
    report: TdReport
    signature: bytes
    """ECDSA r‖s by the attestation key over the first 632 bytes."""
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
        header = Header.parse(data, version=4, tee_type=TEE_TDX)
        (signature_bytes,) = struct.unpack_from("<I", data, SIGNED)
        require("signature data length", signature_bytes, len(data) - _SIGNATURE)
        if len(data) < _CHAIN:
            raise EvidenceMalformed.because("signature data length", signature_bytes, f"at least {_CHAIN - _SIGNATURE}")
        outer_type, outer_bytes = struct.unpack_from("<HI", data, _OUTER)
        require("certification data type", outer_type, QE_REPORT_DATA)
        require("certification data length", outer_bytes, len(data) - _QE_REPORT)
        (auth_bytes,) = struct.unpack_from("<H", data, _QE_AUTH)
        require("QE authentication data length", auth_bytes, QE_AUTH_BYTES)
        nested_type, nested_bytes = struct.unpack_from("<HI", data, _NESTED)
        require("nested certification data type", nested_type, PCK_CHAIN)
        require("nested certification data length", nested_bytes, len(data) - _CHAIN)
        return cls(
            header=header,
            report=TdReport.parse(data[HEADER:SIGNED]),
            signature=data[_SIGNATURE : _SIGNATURE + 64],
            attestation_key=data[_SIGNATURE + 64 : _OUTER],
            qe_report=ReportBody.parse(data[_QE_REPORT:_QE_SIGNATURE]),
            qe_signature=data[_QE_SIGNATURE:_QE_AUTH],
            qe_auth_data=data[_QE_AUTH + 2 : _NESTED],
            certification_data=data[_CHAIN:],
        )

    @property
    def report_data(self) -> bytes:
        return self.report.report_data
