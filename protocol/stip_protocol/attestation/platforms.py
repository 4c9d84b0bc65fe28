"""Which platform collateral is about: the TEE, the FMSPC, and the CA that issued the PCK certificate.

These three are what Intel's provisioning service asks for ("PCS for SGX and TDX, API version 4").
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from typing import Literal, Self, cast

from stip_protocol.attestation import dcap
from stip_protocol.attestation.certificates import PCK_CA_NAMES, read_chain, require_pck_chain
from stip_protocol.attestation.collateral import Collateral
from stip_protocol.attestation.quote import TEE_SGX, SgxQuote, tee_type
from stip_protocol.attestation.roots import intel_sgx_root
from stip_protocol.attestation.tdx import TdxQuote
from stip_protocol.errors import EvidenceMalformed, EvidenceRefused, SimulatedEvidenceRefused

TeeName = Literal["sgx", "tdx"]
CaName = Literal["platform", "processor"]
CA_NAMES: dict[str, CaName] = dict(zip(PCK_CA_NAMES, ("platform", "processor"), strict=True))
FMSPC_BYTES = 6
_NAME = re.compile(r"(sgx|tdx)-([0-9a-f]{12})-(platform|processor)")


@dataclass(frozen=True, order=True, slots=True)
class PlatformKind:
    """All platforms that share one collateral."""

    tee: TeeName
    fmspc: bytes
    """Family, model, stepping, platform type and custom SKU of the processor: 6 bytes."""
    ca: CaName

    def __str__(self) -> str:
        return f"{self.tee}-{self.fmspc.hex()}-{self.ca}"

    @classmethod
    def from_name(cls, name: str) -> Self:
        """What `str` gave. Raises `EvidenceMalformed`."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise EvidenceMalformed.because(
                "platform", ascii(name[:64]), "TEE-FMSPC-CA, as in sgx-00a067110000-platform"
            )
        tee, fmspc, ca = found.groups()
        return cls(cast(TeeName, tee), bytes.fromhex(fmspc), cast(CaName, ca))

    @classmethod
    def of_quote(cls, quote: bytes, anchor: bytes) -> Self:
        """The platform that made a quote, where its PCK chain is issued by the root `anchor` (DER).

        The quote itself is not verified. The chain is, so that nobody can have collateral fetched for platforms that
        do not exist. Raises `EvidenceMalformed`, `EvidenceRefused`, `SimulatedEvidenceRefused`.
        """
        sgx = tee_type(quote) == TEE_SGX
        pem = (SgxQuote if sgx else TdxQuote).parse(quote).certification_data.removesuffix(b"\x00")
        chain = read_chain(pem, what="PCK chain")
        require_pck_chain(chain)
        root = chain[-1]
        if not hmac.compare_digest(root.der, anchor):
            whole = root.issued_by(root) and anchor == intel_sgx_root()  # as in `gates`: somebody's simulation
            refusal = SimulatedEvidenceRefused if whole else EvidenceRefused
            raise refusal.because("PCK chain", "another root", "the trust anchor")
        return cls("sgx" if sgx else "tdx", dcap.fmspc_of(pem), CA_NAMES[chain[1].name])

    @classmethod
    def of_collateral(cls, collateral: Collateral) -> Self:
        """What `collateral` is about. Raises `EvidenceRefused` where it does not say."""
        info = collateral.tcb_info
        ca = CA_NAMES.get(collateral.crl_chain[0].name) if collateral.crl_chain else None
        if info.id not in ("SGX", "TDX") or ca is None:
            raise EvidenceRefused.because("TCB info id, PCK CA", ascii(info.id[:16]), "SGX or TDX, and a PCK CA")
        return cls("sgx" if info.id == "SGX" else "tdx", info.fmspc, ca)
