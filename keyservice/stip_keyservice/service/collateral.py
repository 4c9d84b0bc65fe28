"""The key service's own collateral: evidence is judged with it, and not with what the enclave's host sent along.

Why: docs/decisions. What is kept, when it is renewed and what is served: `stip_protocol.attestation.collateral_source`.
"""

from __future__ import annotations

import asyncio

import structlog

from stip_keyservice.service.config import ROOT_LIMIT, KeyServiceSettings
from stip_protocol.attestation.collateral_source import CollateralSettings, CollateralSource
from stip_protocol.attestation.roots import intel_sgx_root
from stip_protocol.errors import AttestationError, ConfigurationError, StipError
from stip_protocol.runtime.files import read_file

LOOK_SECONDS = 60.0
"""How often the service looks whether collateral is due."""


def anchor(settings: KeyServiceSettings) -> bytes:
    """DER of the root that collateral must chain to: Intel's, or the simulated one where that is configured.

    Raises `ConfigurationError`.
    """
    if settings.simulated != (settings.simulated_root is not None):
        raise ConfigurationError.because("simulated, simulated_root", "one without the other", "both or neither")
    if settings.simulated_root is None:
        return intel_sgx_root()
    return read_file(settings.simulated_root, field="simulated_root", limit=ROOT_LIMIT)


def open_source(settings: KeyServiceSettings) -> CollateralSource | None:
    """The source that `[collateral]` configures; None where it is not there.

    Raises `ConfigurationError`, also where the bundle is malformed or not signed under the anchor.
    """
    if settings.collateral is None:
        return None
    try:
        return CollateralSource(settings.collateral, anchor(settings))
    except AttestationError as error:
        raise ConfigurationError(f"collateral.bundle: {error.message}", field="collateral.bundle") from None


def require_source(settings: KeyServiceSettings) -> CollateralSource:
    """Raises also `ConfigurationError` where `[collateral]` is not there."""
    found = open_source(settings)
    if found is None:
        fields = ", ".join(CollateralSettings.model_fields)
        raise ConfigurationError(f"[collateral]: not in the configuration; it takes {fields}", field="collateral")
    return found


def dates(source: CollateralSource) -> list[tuple[int, int]]:
    """(issued, expires) of what is kept, in Unix seconds, for probes and metrics."""
    return [(shelf.kept.issued, shelf.kept.expires) for shelf in source.shelves()]


async def keep_fresh(source: CollateralSource) -> None:
    """Renew what is due, for ever. What fails is logged, and served for as long as it is valid."""
    log = structlog.get_logger()
    while True:
        try:
            renewed = await asyncio.to_thread(source.renew_due)
        except StipError as error:
            log.error("collateral is not looked after", code=error.code, reason=error.message)
            renewed = {}
        for kind, failure in renewed.items():
            if failure is None:
                log.info("collateral renewed", platform=str(kind))
            else:
                log.warning("collateral is not renewed", platform=str(kind), code=failure.code, reason=failure.message)
        await asyncio.sleep(LOOK_SECONDS)
