"""One simulated platform for all attestation tests, at a fixed time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stip_protocol.attestation.evidence import Evidence, bind
from stip_protocol.attestation.policy import EvidencePolicy
from stip_stack.tee import Faults, SimulatedPlatform

NOW = 1_800_000_000
MEASUREMENT = bytes(range(32))
REPORT_DATA = bind(b"claims of a test")


@pytest.fixture(scope="session")
def now() -> int:
    return NOW


@pytest.fixture(scope="session")
def measurement() -> bytes:
    return MEASUREMENT


@pytest.fixture(scope="session")
def report_data() -> bytes:
    return REPORT_DATA


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("platform") / "tee", now=NOW)


@pytest.fixture(scope="session")
def policy(platform: SimulatedPlatform) -> Callable[..., EvidencePolicy]:
    """A development policy for the test measurement, with changes."""

    def build(**changes: Any) -> EvidencePolicy:
        mapping: dict[str, Any] = {
            "mode": "development",
            "measurements": [MEASUREMENT.hex()],
            "simulated_root_sha256": platform.root_sha256.hex(),
        }
        return EvidencePolicy.from_mapping({k: v for k, v in (mapping | changes).items() if v is not None})

    return build


@pytest.fixture(scope="session")
def evidence(platform: SimulatedPlatform) -> Callable[..., Evidence]:
    """Evidence from the test platform with faults, its collateral issued `age` seconds before now."""

    def build(*, age: int = 0, measurement: bytes = MEASUREMENT, **faults: Any) -> Evidence:
        wrong = Faults(**faults)
        provider = platform.provider(measurement, faults=wrong, clock=lambda: NOW - age)
        return Evidence(provider.quote(REPORT_DATA), provider.collateral())

    return build


@pytest.fixture
def shared_directory(tmp_path: Path) -> Path:
    return tmp_path / "tee"
