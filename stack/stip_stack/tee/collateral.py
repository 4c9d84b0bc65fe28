"""Simulated collateral: TCB info version 3, QE identity version 2 and revocation lists, with every fault on demand.

Layout: Intel, "PCS for SGX and TDX, API version 4" (Get TCB Info, Get QE Identity, Get Revocation Lists).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from stip_protocol.attestation.quote import Attributes
from stip_protocol.attestation.tdx import TdAttributes
from stip_stack.tee.pki import CPU_SVN, FMSPC, PCE_ID, PCE_SVN, Pki

LIFETIME = timedelta(days=30)
EVALUATION_NUMBER = 17
QE_SIGNER = hashlib.sha256(b"stip simulated quoting enclave signer").digest()
QE_PROD_ID = 1
QE_SVN = 8
"""The quoting enclave's current security version; below it the QE is out of date."""
QE_ATTRIBUTES = Attributes.INIT | Attributes.MODE64 | Attributes.PROVISION_KEY
QE_ADVISORY = "INTEL-SA-00615"
OLD_ADVISORY = "INTEL-SA-00828"
TD_QE_SIGNER = hashlib.sha256(b"stip simulated TD quoting enclave signer").digest()
TD_QE_PROD_ID = 2
TDX_MODULE_SIGNER = bytes(48)
"""As Intel's: the hardware measures the signer of its own modules as zeros."""
TEE_TCB_SVN = bytes([5, 1, 2, *bytes(13)])
"""TDX module SVN 5 of major version 1, and the third component of the TDX TCB."""

TeeName = Literal["SGX", "TDX"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What is wrong with the simulated platform, its enclave or its collateral. The default is nothing."""

    attributes: Attributes = Attributes.INIT | Attributes.MODE64
    """Of the application enclave; add `Attributes.DEBUG` for a debug enclave."""
    tcb_status: str = "UpToDate"
    advisories: tuple[str, ...] = ()
    qe_isv_svn: int = QE_SVN
    required_pce_svn: int = PCE_SVN
    """Of the best TCB level: above `PCE_SVN` the platform falls to the level below, which is OutOfDate."""
    oldest_pce_svn: int = 5
    """Of the last TCB level: above `PCE_SVN` no level matches."""
    pck_revoked: bool = False
    intermediate_revoked: bool = False
    tcb_signer_revoked: bool = False
    tcb_info_version: int = 3
    tcb_info_id: str | None = None
    """By default the TEE's own."""
    qe_identity_id: str | None = None
    """By default the TEE's own."""
    fmspc: bytes = FMSPC
    pce_id: bytes = PCE_ID
    evaluation_number: int = EVALUATION_NUMBER
    signer: Literal["tcb_signer", "pck", "renamed"] = "tcb_signer"
    """Who signs TCB info and QE identity: the TCB signer, the PCK key, or the TCB signer's key under another name."""
    td_attributes: TdAttributes = TdAttributes.SEPT_VE_DISABLE
    """Of the trust domain; add `TdAttributes.DEBUG` for one under debug."""
    tee_tcb_svn: bytes = TEE_TCB_SVN
    mrsignerseam: bytes = TDX_MODULE_SIGNER
    tdx_module_status: str = "UpToDate"
    required_module_svn: int = TEE_TCB_SVN[0]
    """Of the best level of the TDX module: above the TEE's own the module falls to the level below, OutOfDate."""
    required_tdx_svn: int = TEE_TCB_SVN[2]
    """Of the third TDX component in the best TCB level."""


def issue(pki: Pki, now: datetime, faults: Faults, tee: TeeName = "SGX") -> bytes:
    """`QuoteCollateralV3` as JSON, issued at `now` for 30 days."""
    now = now.astimezone(UTC).replace(microsecond=0)
    expires = now + LIFETIME
    tcb_info = _json(_tcb_info(now, expires, faults, tee))
    qe_identity = _json(_qe_identity(now, expires, faults, tee))
    key, chain = {
        "tcb_signer": ("tcb_signer", pki.chain("tcb_signer", "root")),
        "pck": ("pck", pki.chain("pck", "pck_ca", "root")),
        "renamed": ("tcb_signer", pki.renamed_signer("Intel SGX Something Else", now)),
    }[faults.signer]
    revoked_by_root = [
        role
        for role, revoked in (("pck_ca", faults.intermediate_revoked), ("tcb_signer", faults.tcb_signer_revoked))
        if revoked
    ]
    return _json(
        {
            "pck_crl_issuer_chain": pki.chain("pck_ca", "root"),
            "root_ca_crl": pki.crl("root", revoked_by_root, now, expires).hex(),
            "pck_crl": pki.crl("pck_ca", ["pck"] if faults.pck_revoked else [], now, expires).hex(),
            "tcb_info_issuer_chain": chain,
            "tcb_info": tcb_info.decode(),
            "tcb_info_signature": pki.sign(key, tcb_info).hex(),
            "qe_identity_issuer_chain": chain,
            "qe_identity": qe_identity.decode(),
            "qe_identity_signature": pki.sign(key, qe_identity).hex(),
        }
    )


def _tcb_info(now: datetime, expires: datetime, faults: Faults, tee: TeeName) -> dict[str, Any]:
    best, oldest = _tcb(CPU_SVN, faults.required_pce_svn), _tcb([min(svn, 2) for svn in CPU_SVN], faults.oldest_pce_svn)
    if tee == "TDX":
        best["tdxtcbcomponents"] = _components([TEE_TCB_SVN[0], 0, faults.required_tdx_svn, *bytes(13)])
        oldest["tdxtcbcomponents"] = _components(bytes(16))
    return {
        "id": faults.tcb_info_id or tee,
        "version": faults.tcb_info_version,
        "issueDate": _date(now),
        "nextUpdate": _date(expires),
        "fmspc": faults.fmspc.hex().upper(),
        "pceId": faults.pce_id.hex().upper(),
        "tcbType": 0,
        "tcbEvaluationDataNumber": faults.evaluation_number,
        **(_tdx_modules(now, faults) if tee == "TDX" else {}),
        "tcbLevels": [
            {
                "tcb": best,
                "tcbDate": _date(now - timedelta(days=90)),
                "tcbStatus": faults.tcb_status,
                "advisoryIDs": list(faults.advisories),
            },
            {
                "tcb": oldest,
                "tcbDate": _date(now - timedelta(days=900)),
                "tcbStatus": "OutOfDate",
                "advisoryIDs": [OLD_ADVISORY],
            },
        ],
    }


def _tdx_modules(now: datetime, faults: Faults) -> dict[str, Any]:
    module = {"mrsigner": TDX_MODULE_SIGNER.hex().upper(), "attributes": "00" * 8, "attributesMask": "FF" * 8}
    levels = _svn_levels(now, ((faults.required_module_svn, faults.tdx_module_status, []), (2, "OutOfDate", [])))
    return {"tdxModule": module, "tdxModuleIdentities": [{"id": "TDX_01", **module, "tcbLevels": levels}]}


def _tcb(components: Iterable[int], pce_svn: int) -> dict[str, Any]:
    return {"sgxtcbcomponents": _components(components), "pcesvn": pce_svn}


def _components(svns: Iterable[int]) -> list[dict[str, int]]:
    return [{"svn": svn} for svn in svns]


def _qe_identity(now: datetime, expires: datetime, faults: Faults, tee: TeeName) -> dict[str, Any]:
    identity, signer, product = {"SGX": ("QE", QE_SIGNER, QE_PROD_ID), "TDX": ("TD_QE", TD_QE_SIGNER, TD_QE_PROD_ID)}[
        tee
    ]
    return {
        "id": faults.qe_identity_id or identity,
        "version": 2,
        "issueDate": _date(now),
        "nextUpdate": _date(expires),
        "tcbEvaluationDataNumber": faults.evaluation_number,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": (QE_ATTRIBUTES & ~Attributes.MODE64).to_bytes(8, "little").hex().upper() + "00" * 8,
        "attributesMask": "FBFFFFFFFFFFFFFF" + "00" * 8,
        "mrsigner": signer.hex().upper(),
        "isvprodid": product,
        "tcbLevels": _svn_levels(now, ((QE_SVN, "UpToDate", []), (1, "OutOfDate", [QE_ADVISORY]))),
    }


def _svn_levels(now: datetime, levels: tuple[tuple[int, str, list[str]], ...]) -> list[dict[str, Any]]:
    """Best first: the first one holds since 90 days, the others since 900."""
    return [
        {
            "tcb": {"isvsvn": svn},
            "tcbDate": _date(now - timedelta(days=900 if index else 90)),
            "tcbStatus": status,
            "advisoryIDs": advisories,
        }
        for index, (svn, status, advisories) in enumerate(levels)
    ]


def _date(value: datetime) -> str:
    return f"{value:%Y-%m-%dT%H:%M:%SZ}"


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
