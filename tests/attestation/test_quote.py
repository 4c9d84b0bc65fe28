from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol.attestation.evidence import COLLATERAL_LIMIT, Evidence
from stip_protocol.attestation.quote import QUOTE_LIMIT, Attributes, SgxQuote
from stip_protocol.errors import EvidenceMalformed

HEADER_AND_BODY = 432


def patched(quote: bytes, offset: int, form: str, value: object) -> bytes:
    return quote[:offset] + struct.pack(form, value) + quote[offset + struct.calcsize(form) :]


@pytest.fixture(scope="module")
def quote(evidence: Callable[..., Evidence]) -> bytes:
    return evidence().quote


def test_every_field_lies_where_the_layout_says(quote: bytes, measurement: bytes, report_data: bytes) -> None:
    parsed = SgxQuote.parse(quote)
    assert parsed.mrenclave == quote[112:144] == measurement
    assert parsed.mrsigner == quote[176:208]
    assert parsed.report.cpusvn == quote[48:64]
    assert parsed.attributes == struct.unpack_from("<Q", quote, 96)[0] == Attributes.INIT | Attributes.MODE64
    assert parsed.report.xfrm == struct.unpack_from("<Q", quote, 104)[0]
    assert (parsed.isv_prod_id, parsed.isv_svn) == struct.unpack_from("<HH", quote, 304)
    assert parsed.report_data == quote[368:432] == report_data
    assert parsed.signature == quote[436:500]
    assert parsed.attestation_key == quote[500:564]
    assert parsed.qe_signature == quote[948:1012]
    assert parsed.qe_auth_data == quote[1014:1046]
    assert parsed.certification_data == quote[1052:]
    assert parsed.certification_data.startswith(b"-----BEGIN CERTIFICATE-----")


@pytest.mark.parametrize(
    ("offset", "form", "value", "field"),
    [
        (0, "<H", 2, "quote version"),
        (0, "<H", 4, "quote version"),
        (2, "<H", 3, "attestation key type"),
        (4, "<I", 0x81, "TEE type"),
        (12, "<B", 0, "QE vendor id"),
        (432, "<I", 0, "signature data length"),
        (432, "<I", 0xFFFFFFFF, "signature data length"),
        (1012, "<H", 31, "QE authentication data length"),
        (1012, "<H", 0xFFFF, "QE authentication data length"),
        (1046, "<H", 4, "certification data type"),
        (1048, "<I", 1, "certification data length"),
        (1048, "<I", 0xFFFFFFFF, "certification data length"),
    ],
)
def test_a_field_with_another_value_is_refused_by_name(
    quote: bytes, offset: int, form: str, value: int, field: str
) -> None:
    with pytest.raises(EvidenceMalformed) as refused:
        SgxQuote.parse(patched(quote, offset, form, value))
    assert refused.value.field == field
    assert "allowed" in refused.value.message


def test_a_tdx_quote_is_refused_as_of_another_tee(quote: bytes) -> None:
    with pytest.raises(EvidenceMalformed, match="a TDX quote"):
        SgxQuote.parse(patched(patched(quote, 0, "<H", 4), 4, "<I", 0x81))


def test_trailing_bytes_are_refused(quote: bytes) -> None:
    with pytest.raises(EvidenceMalformed):
        SgxQuote.parse(quote + b"\x00")


def test_every_truncation_is_refused(quote: bytes) -> None:
    for length in range(len(quote)):
        with pytest.raises(EvidenceMalformed):
            SgxQuote.parse(quote[:length])


def test_a_signature_length_that_fits_a_short_quote_is_refused(quote: bytes) -> None:
    with pytest.raises(EvidenceMalformed, match="signature data length"):
        SgxQuote.parse(quote[:HEADER_AND_BODY] + struct.pack("<I", 100) + bytes(100))


@given(st.binary(max_size=2048))
def test_arbitrary_bytes_give_a_refusal_and_nothing_else(data: bytes) -> None:
    with pytest.raises(EvidenceMalformed):
        SgxQuote.parse(data)


@pytest.mark.parametrize(
    ("quote_bytes", "collateral_bytes", "field"),
    [(0, 1, "quote"), (QUOTE_LIMIT + 1, 1, "quote"), (1, 0, "collateral"), (1, COLLATERAL_LIMIT + 1, "collateral")],
)
def test_evidence_is_bounded(quote_bytes: int, collateral_bytes: int, field: str) -> None:
    with pytest.raises(EvidenceMalformed) as refused:
        Evidence(bytes(quote_bytes), bytes(collateral_bytes))
    assert refused.value.field == field
