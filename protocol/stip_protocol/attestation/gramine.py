"""Evidence from Gramine's /dev/attestation (Gramine documentation, "Attestation and Secret Provisioning").

The device keeps one state for the whole process: what is written to `user_report_data` is what the next
read of `quote` vouches for. One lock per process therefore spans write and read, whoever holds the provider.
"""

from __future__ import annotations

import threading
from pathlib import Path

from stip_protocol.attestation.evidence import COLLATERAL_LIMIT, REPORT_DATA
from stip_protocol.attestation.quote import QUOTE_LIMIT
from stip_protocol.errors import ConfigurationError, EvidenceMalformed

_DEVICE_LOCK = threading.Lock()


class GramineProvider:
    """Quotes from the SGX hardware below Gramine; collateral from a file that the host keeps fresh.

    The collateral needs no protection on its way: it is signed by Intel and dated. `device` is a parameter so
    that a stand-in directory can be tried where there is no SGX. Raises `ConfigurationError` where the device or
    the file cannot be used.
    """

    simulated = False

    def __init__(self, collateral: Path, *, device: Path = Path("/dev/attestation")) -> None:
        self._collateral = collateral
        self._device = device

    def quote(self, report_data: bytes) -> bytes:
        """A quote over exactly 64 bytes."""
        if len(report_data) != REPORT_DATA:
            raise EvidenceMalformed.because("report data", f"{len(report_data)} bytes", f"{REPORT_DATA} bytes")
        try:
            with _DEVICE_LOCK:
                (self._device / "user_report_data").write_bytes(report_data)
                quote = _read(self._device / "quote", QUOTE_LIMIT)
        except OSError as error:
            raise ConfigurationError(f"attestation device {self._device}: {error.strerror}") from error
        return quote

    def collateral(self) -> bytes:
        """The collateral file as it is now."""
        try:
            return _read(self._collateral, COLLATERAL_LIMIT)
        except OSError as error:
            raise ConfigurationError(f"collateral file {self._collateral}: {error.strerror}") from error


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if not 0 < len(data) <= limit:
        raise EvidenceMalformed.because(path.name, f"{len(data)} bytes or more", f"1 to {limit} bytes")
    return data
