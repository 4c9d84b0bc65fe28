"""Evidence and who gives it: a quote with the collateral that lets others judge it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

from stip_protocol.attestation.quote import QUOTE_LIMIT
from stip_protocol.errors import EvidenceMalformed

COLLATERAL_LIMIT = 64 * 1024
"""Bytes of the largest collateral: Intel's is about 16 KiB."""
REPORT_DATA = 64
"""Bytes of a report's user data."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A DCAP quote and its `QuoteCollateralV3` JSON, bounded and not yet believed.

    Raises `EvidenceMalformed` where either is empty or too large.
    """

    quote: bytes
    collateral: bytes

    def __post_init__(self) -> None:
        for field, data, limit in (
            ("quote", self.quote, QUOTE_LIMIT),
            ("collateral", self.collateral, COLLATERAL_LIMIT),
        ):
            if not 0 < len(data) <= limit:
                raise EvidenceMalformed.because(field, f"{len(data)} bytes", f"1 to {limit} bytes")


class EvidenceProvider(Protocol):
    """Where an enclave gets its evidence. Lives inside the enclave; never offered over the network.

    Whoever can choose `report_data` can forge claims, so callers are the functions that write the claims
    themselves (`ratls.issue`, `freshness.answer`, the release of keys), and no RPC.
    """

    @property
    def simulated(self) -> bool:
        """True where the quotes chain to a local root. Shown in every log line, metric and answer."""

    def quote(self, report_data: bytes) -> bytes:
        """A quote over exactly 64 bytes of report data."""

    def collateral(self) -> bytes:
        """The current collateral, `QuoteCollateralV3` as JSON."""


def bind(claims: bytes) -> bytes:
    """The 64 bytes of report data that make a quote vouch for `claims`: SHA-256(claims) ‖ 0³²."""
    return hashlib.sha256(claims).digest() + bytes(32)
