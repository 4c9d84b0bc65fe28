"""The one place that calls dcap-qvl, which has no type information of its own.

dcap-qvl verifies chains, revocation, dates, the signatures of TCB info, QE identity, QE report and report body,
the QE against its identity, and evaluates TCB levels (Intel, "SGX DCAP Quote Verification Library"). It always
refuses debug enclaves and `Revoked`. What it leaves open is in `stip_protocol.attestation.checks`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import dcap_qvl

from stip_protocol.attestation.collateral import Collateral
from stip_protocol.errors import EvidenceRefused


@dataclass(frozen=True, slots=True)
class Appraisal:
    """What verified evidence says about its platform."""

    status: str
    """Platform and QE status merged, in Intel's words: UpToDate, SWHardeningNeeded, ..."""
    advisories: tuple[str, ...]
    evaluation_number: int
    """Of TCB info and QE identity, the lower."""
    ppid: bytes
    platform_instance_id: bytes | None
    """Of multi-package platforms only."""
    pce_id: bytes
    fmspc: bytes


def appraise(quote: bytes, collateral: Collateral, root_der: bytes, now: int) -> Appraisal:
    """Verify a quote (SGX or TDX) against `root_der` at `now` (Unix seconds). Raises `EvidenceRefused`."""
    v3 = collateral.v3
    try:
        claims = dcap_qvl.QuoteVerifier(root_der).verify_with_policy(
            quote,
            dcap_qvl.QuoteCollateralV3(
                v3.pck_crl_issuer_chain,
                v3.root_ca_crl,
                v3.pck_crl,
                v3.tcb_info_issuer_chain,
                v3.tcb_info,
                v3.tcb_info_signature,
                v3.qe_identity_issuer_chain,
                v3.qe_identity,
                v3.qe_identity_signature,
            ),
            now,
            dcap_qvl.QuotePolicy.claims_only(now),
        )
        found = json.loads(claims.to_json())
    except ValueError as error:
        raise EvidenceRefused(f"quote verification: {str(error)[:300]}", field="quote verification") from None
    pck = found["platform"]["pck"]
    instance = pck["platform_instance_id"]
    return Appraisal(
        status=found["tcb"]["status"],
        advisories=tuple(sorted(found["tcb"]["advisory_ids"])),
        evaluation_number=min(found["tcb"]["eval_data_number"], found["qe"]["tcb_eval_data_number"]),
        ppid=bytes(pck["ppid"]),
        platform_instance_id=None if instance is None else bytes(instance),
        pce_id=bytes(pck["pce_id"]),
        fmspc=bytes(pck["fmspc"]),
    )


def fmspc_of(pck_chain: bytes) -> bytes:
    """The FMSPC (6 bytes) in a PCK chain's leaf, PEM. Raises `EvidenceRefused` where there is none."""
    try:
        return bytes(dcap_qvl.parse_pck_extension_from_pem(pck_chain).fmspc)
    except ValueError as error:
        raise EvidenceRefused(f"PCK certificate: {str(error)[:300]}", field="PCK certificate") from None
