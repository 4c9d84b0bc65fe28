"""One simulated platform, shared by processes through its directory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.serialization import Encoding

from stip_protocol.attestation.evidence import REPORT_DATA
from stip_protocol.attestation.tdx import MEASUREMENT, RTMRS
from stip_protocol.errors import EvidenceMalformed
from stip_stack.tee import collateral as simulated_collateral
from stip_stack.tee import quoting
from stip_stack.tee.collateral import Faults, TeeName
from stip_stack.tee.pki import Pki

SIGNER = hashlib.sha256(b"stip simulated enclave signer").digest()
"""MRSIGNER of simulated enclaves, unless another is asked for."""


@dataclass(frozen=True)
class SimulatedProvider:
    """An `EvidenceProvider` whose evidence only development policies accept."""

    enclave: quoting.EnclaveIdentity
    faults: Faults
    _pki: Pki = field(repr=False)
    _clock: Callable[[], float] = field(repr=False)

    @property
    def simulated(self) -> bool:
        return True

    def quote(self, report_data: bytes) -> bytes:
        """A version 3 quote over exactly 64 bytes."""
        if len(report_data) != REPORT_DATA:
            raise EvidenceMalformed.because("report data", f"{len(report_data)} bytes", f"{REPORT_DATA} bytes")
        return quoting.quote(self._pki, self.enclave, report_data, self.faults)

    def collateral(self) -> bytes:
        """Collateral issued now."""
        return simulated_collateral.issue(self._pki, datetime.fromtimestamp(self._clock(), tz=UTC), self.faults)


@dataclass(frozen=True)
class SimulatedPlatform:
    """A simulated machine with its own root. `directory` holds its keys, mode 0600."""

    directory: Path
    _pki: Pki = field(repr=False)

    @classmethod
    def create(cls, directory: Path, *, now: int | None = None) -> Self:
        """A new platform in `directory`. Raises `ConfigurationError` where there is one already."""
        pki = Pki.create(datetime.fromtimestamp(time.time() if now is None else now, tz=UTC))
        pki.save(directory)
        return cls(directory, pki)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The platform in `directory`. Raises `ConfigurationError`."""
        return cls(directory, Pki.load(directory))

    @property
    def root_der(self) -> bytes:
        return self._pki.certificates["root"].public_bytes(Encoding.DER)

    @property
    def root_sha256(self) -> bytes:
        """What a development policy pins."""
        return hashlib.sha256(self.root_der).digest()

    def collateral(self, now: int, *, faults: Faults | None = None, tee: TeeName = "SGX") -> bytes:
        """`QuoteCollateralV3` JSON issued at `now` (Unix seconds)."""
        return simulated_collateral.issue(self._pki, datetime.fromtimestamp(now, tz=UTC), faults or Faults(), tee)

    def host_quote(
        self,
        mrtd: bytes,
        report_data: bytes,
        *,
        rtmrs: tuple[bytes, ...] = (bytes(48),) * 4,
        xfam: int = quoting.XFRM,
        faults: Faults | None = None,
    ) -> bytes:
        """A TDX quote (version 4) of a host that claims MRTD and RTMRs (48 bytes each)."""
        for name, value in (("MRTD", mrtd), *((f"RTMR{index}", one) for index, one in enumerate(rtmrs))):
            if len(value) != MEASUREMENT:
                raise EvidenceMalformed.because(name, f"{len(value)} bytes", f"{MEASUREMENT} bytes")
        if len(rtmrs) != RTMRS or len(report_data) != REPORT_DATA:
            raise EvidenceMalformed.because("RTMRs, report data", "another number", f"{RTMRS}, {REPORT_DATA} bytes")
        host = quoting.HostIdentity(mrtd, rtmrs, xfam=xfam)
        return quoting.td_quote(self._pki, host, report_data, faults or Faults())

    def provider(
        self,
        measurement: bytes,
        *,
        signer: bytes = SIGNER,
        isv_prod_id: int = 1,
        isv_svn: int = 1,
        faults: Faults | None = None,
        clock: Callable[[], float] = time.time,
    ) -> SimulatedProvider:
        """Evidence for an enclave that claims `measurement` (32 bytes)."""
        for name, value in (("measurement", measurement), ("signer", signer)):
            if len(value) != 32:
                raise EvidenceMalformed.because(name, f"{len(value)} bytes", "32 bytes")
        enclave = quoting.EnclaveIdentity(measurement, signer, isv_prod_id, isv_svn)
        return SimulatedProvider(enclave, faults or Faults(), self._pki, clock)


def load_provider(directory: Path, measurement: bytes) -> SimulatedProvider:
    """The provider of a process that knows the platform by its directory alone."""
    return SimulatedPlatform.load(directory).provider(measurement)
