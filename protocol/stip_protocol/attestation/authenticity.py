"""Whether collateral is the root's own, before it is kept: a broken source must not displace what is good.

Verification of evidence checks all of this again, together with the quote.
"""

from __future__ import annotations

import hmac

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from stip_protocol.attestation.certificates import CA_CHAIN, Certificate, require_crl_chain, require_tcb_signer
from stip_protocol.attestation.collateral import Collateral
from stip_protocol.attestation.gates import QE_IDENTITY_VERSION, TCB_INFO_VERSION, at
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.errors import CollateralExpired, EvidenceRefused

IDENTITIES = {"sgx": "QE", "tdx": "TD_QE"}
"""Id of the quoting enclave's identity by TEE."""


def require_authentic(collateral: Collateral, kind: PlatformKind, anchor: bytes) -> None:
    """Hold collateral to its root (DER) and to the platform it was asked for.

    Raises `EvidenceRefused`: another root, signer or platform, a signature that does not hold, a revoked key.
    """
    chains = (
        ("TCB info", collateral.tcb_chain),
        ("QE identity", collateral.qe_chain),
        (CA_CHAIN, collateral.crl_chain),
    )
    for name, chain in chains:
        if not chain or not hmac.compare_digest(chain[-1].der, anchor):
            raise EvidenceRefused.because(f"{name} root", "another one", "the trust anchor")
    require_tcb_signer(collateral.tcb_chain, "TCB info")
    require_tcb_signer(collateral.qe_chain, "QE identity")
    require_crl_chain(collateral.crl_chain)
    found = PlatformKind.of_collateral(collateral)
    if found != kind:
        raise EvidenceRefused.because("collateral platform", found, kind)
    labels = (collateral.tcb_info.version, collateral.qe_identity.id, collateral.qe_identity.version)
    wanted = (TCB_INFO_VERSION, IDENTITIES[kind.tee], QE_IDENTITY_VERSION)
    if labels != wanted:
        raise EvidenceRefused.because("TCB info version, QE identity id, version", labels, wanted)
    v3 = collateral.v3
    _require_signed(collateral.tcb_chain[0], v3.tcb_info.encode(), v3.tcb_info_signature, "TCB info")
    _require_signed(collateral.qe_chain[0], v3.qe_identity.encode(), v3.qe_identity_signature, "QE identity")
    authority, root = collateral.crl_chain
    for what, crl, issuer in (("root CRL", collateral.root_crl, root), ("PCK CRL", collateral.pck_crl, authority)):
        if crl.issuer != issuer.parsed.subject or not crl.is_signature_valid(_key(issuer, what)):
            raise EvidenceRefused.because(what, "not issued by its CA", f"issued by {issuer.name!a}")
    # What a revoked key signed could be numbered and dated so that nothing genuine ever took its place.
    for one in (collateral.tcb_chain[0], collateral.qe_chain[0], authority):
        if collateral.root_crl.get_revoked_certificate_by_serial_number(one.parsed.serial_number) is not None:
            raise EvidenceRefused.because(f"certificate {one.name!a}", "a revoked one", "one that is not revoked")


def require_current(collateral: Collateral, now: int) -> None:
    """Hold collateral to its dates at `now` (Unix seconds). Raises `CollateralExpired`."""
    moment = at(now)
    for window in collateral.windows():
        if not window.opens <= moment <= window.closes:
            allowed = f"{window.opens:%Y-%m-%dT%H:%M:%SZ} to {window.closes:%Y-%m-%dT%H:%M:%SZ}"
            raise CollateralExpired.because(window.what, f"{moment:%Y-%m-%dT%H:%M:%SZ}", allowed)


def _require_signed(signer: Certificate, data: bytes, signature: bytes, what: str) -> None:
    """ECDSA over P-256 with SHA-256, as r‖s."""
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        _key(signer, what).verify(encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise EvidenceRefused.because(f"{what} signature", "one that does not hold", "the TCB signer's") from None


def _key(certificate: Certificate, what: str) -> ec.EllipticCurvePublicKey:
    key = certificate.parsed.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise EvidenceRefused.because(f"{what} key", type(key).__name__, "an elliptic curve key")
    return key
