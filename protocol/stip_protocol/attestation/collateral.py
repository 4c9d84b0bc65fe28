"""Collateral: what Intel says today about platforms, quoting enclaves and revoked certificates.

`QuoteCollateralV3` as JSON (Intel, "SGX DCAP API", `sgx_ql_qve_collateral_t`; field names as Intel's PCS and
dcap-qvl write them), with TCB info version 3 and QE identity version 2 inside. Parsed strictly: an unknown key is
refused, because some of the optional ones would replace the certificate chain of the quote.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Annotated, Self, TypeVar

from cryptography import x509
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stip_protocol.attestation.certificates import MALFORMED, Certificate, read_chain
from stip_protocol.attestation.evidence import COLLATERAL_LIMIT
from stip_protocol.documents import explain
from stip_protocol.errors import EvidenceMalformed


def _from_hex(value: object) -> object:
    return bytes.fromhex(value) if isinstance(value, str) else value


KEPT = 64
"""Pieces of collateral whose reading is remembered."""
M = TypeVar("M", bound=BaseModel)
Hex = Annotated[bytes, BeforeValidator(_from_hex)]


class _CollateralV3(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    pck_crl_issuer_chain: str
    root_ca_crl: Hex
    pck_crl: Hex
    tcb_info_issuer_chain: str
    tcb_info: str
    tcb_info_signature: Annotated[Hex, Field(min_length=64, max_length=64)]
    qe_identity_issuer_chain: str
    qe_identity: str
    qe_identity_signature: Annotated[Hex, Field(min_length=64, max_length=64)]


class _Dated(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    id: str
    version: int
    issued: AwareDatetime = Field(alias="issueDate")
    expires: AwareDatetime = Field(alias="nextUpdate")
    evaluation_number: int = Field(alias="tcbEvaluationDataNumber", ge=0)


class TdxModule(BaseModel):
    """Who signed a TDX module, and its attributes under their mask. TDX 1.0 modules have no id."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    id: str = ""
    mrsigner: Annotated[Hex, Field(min_length=48, max_length=48)]
    attributes: Annotated[Hex, Field(min_length=8, max_length=8)]
    mask: Annotated[Hex, Field(min_length=8, max_length=8, alias="attributesMask")]


class TcbInfo(_Dated):
    """What the wrapper needs of a TCB info; levels are dcap-qvl's business."""

    fmspc: Annotated[Hex, Field(min_length=6, max_length=6)]
    pce_id: Annotated[Hex, Field(min_length=2, max_length=2, alias="pceId")]
    tdx_module: TdxModule | None = Field(default=None, alias="tdxModule")
    """Of TDX only: TDX modules of major version 0."""
    tdx_module_identities: tuple[TdxModule, ...] = Field(default=(), alias="tdxModuleIdentities", max_length=64)
    """Of TDX only: the others, as `TDX_01` and so on."""


class QeIdentity(_Dated):
    """What the wrapper needs of a QE identity."""


@dataclass(frozen=True, slots=True)
class Window:
    """The time in which one signed thing holds."""

    what: str
    opens: datetime
    closes: datetime


@dataclass(frozen=True, slots=True)
class Collateral:
    """Collateral taken apart; `v3` is exactly what is given to dcap-qvl."""

    v3: _CollateralV3
    tcb_info: TcbInfo
    qe_identity: QeIdentity
    root_crl: x509.CertificateRevocationList
    pck_crl: x509.CertificateRevocationList
    tcb_chain: tuple[Certificate, ...]
    qe_chain: tuple[Certificate, ...]
    crl_chain: tuple[Certificate, ...]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse `QuoteCollateralV3` JSON. Raises `EvidenceMalformed` naming the field."""
        if len(data) > COLLATERAL_LIMIT:
            raise EvidenceMalformed.because("collateral", f"{len(data)} bytes", f"at most {COLLATERAL_LIMIT} bytes")
        v3 = _validate(_CollateralV3, data, "collateral")
        return cls(
            v3=v3,
            tcb_info=_validate(TcbInfo, v3.tcb_info.encode(), "TCB info"),
            qe_identity=_validate(QeIdentity, v3.qe_identity.encode(), "QE identity"),
            root_crl=_crl(v3.root_ca_crl, "root CRL"),
            pck_crl=_crl(v3.pck_crl, "PCK CRL"),
            tcb_chain=read_chain(v3.tcb_info_issuer_chain.encode(), what="TCB info chain"),
            qe_chain=read_chain(v3.qe_identity_issuer_chain.encode(), what="QE identity chain"),
            crl_chain=read_chain(v3.pck_crl_issuer_chain.encode(), what="PCK CRL chain"),
        )

    def windows(self) -> tuple[Window, ...]:
        """The validity of everything in the collateral."""
        dated = (
            Window("TCB info", self.tcb_info.issued, self.tcb_info.expires),
            Window("QE identity", self.qe_identity.issued, self.qe_identity.expires),
            _crl_window("root CRL", self.root_crl),
            _crl_window("PCK CRL", self.pck_crl),
        )
        return dated + tuple(
            Window(f"certificate {one.name!a}", one.not_before, one.not_after)
            for chain in (self.tcb_chain, self.qe_chain, self.crl_chain)
            for one in chain
        )

    @property
    def expires(self) -> datetime:
        """When the first piece runs out: after that nothing verifies with it."""
        return min(window.closes for window in self.windows())

    @property
    def evaluation_number(self) -> int:
        """Intel's round of TCB recovery: of TCB info and QE identity, the lower."""
        return min(self.tcb_info.evaluation_number, self.qe_identity.evaluation_number)

    def age_seconds(self, now: int) -> int:
        """Seconds since the oldest monthly piece was issued, at `now` (Unix seconds)."""
        return now - int(self.issued.timestamp())

    @property
    def issued(self) -> datetime:
        """The oldest of the pieces that Intel renews monthly; the root CRL is yearly and does not count."""
        return min(self.tcb_info.issued, self.qe_identity.issued, self.pck_crl.last_update_utc)


def assemble(**fields: str) -> bytes:
    """`QuoteCollateralV3` JSON of its nine texts (byte strings in hexadecimal), in one form for the same content."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


@lru_cache(maxsize=KEPT)
def parsed(data: bytes) -> Collateral:
    """`Collateral.parse`, remembered by the bytes: every enclave of a platform shows the same. It follows from them
    alone; whether it is signed, in its time and under the right root is asked each time."""
    return Collateral.parse(data)


def _validate(model: type[M], data: bytes, what: str) -> M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise EvidenceMalformed(f"{what}: {explain(error)}", field=what) from None


def _crl(der: bytes, what: str) -> x509.CertificateRevocationList:
    try:
        crl = x509.load_der_x509_crl(der)
        _next_update(crl, what)
        crl.issuer, crl.last_update_utc  # noqa: B018  # parsed lazily: a malformed field fails here, at the edge
    except MALFORMED as error:
        raise EvidenceMalformed(f"{what}: not a DER CRL ({type(error).__name__})", field=what) from None
    return crl


def _crl_window(what: str, crl: x509.CertificateRevocationList) -> Window:
    """A revocation list holds until the second before its next update, as dcap-qvl reads it."""
    return Window(what, crl.last_update_utc, _next_update(crl, what) - timedelta(seconds=1))


def _next_update(crl: x509.CertificateRevocationList, what: str) -> datetime:
    update = crl.next_update_utc
    if update is None:
        raise EvidenceMalformed.because(f"{what} next update", "none", "a date")
    return update
