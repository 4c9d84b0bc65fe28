from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dcap_qvl
import pytest
from cryptography import x509

from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.verifier import verify
from stip_protocol.errors import ConfigurationError, EvidenceMalformed
from stip_stack.tee import SimulatedPlatform, load_provider


def test_another_process_quotes_for_the_platform_by_its_directory_alone(
    shared_directory: Path, measurement: bytes, report_data: bytes, now: int
) -> None:
    platform = SimulatedPlatform.create(shared_directory, now=now)
    program = (
        "import sys, pathlib; from stip_stack.tee import load_provider;"
        "provider = load_provider(pathlib.Path(sys.argv[1]), bytes.fromhex(sys.argv[2]));"
        "print(provider.simulated, provider.quote(bytes.fromhex(sys.argv[3])).hex())"
    )
    arguments = [sys.executable, "-c", program, str(shared_directory), measurement.hex(), report_data.hex()]
    simulated, quote = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()
    assert simulated == "True"
    policy = EvidencePolicy.from_mapping(
        {
            "mode": "development",
            "measurements": [measurement.hex()],
            "simulated_root_sha256": platform.root_sha256.hex(),
        }
    )
    evidence = Evidence(bytes.fromhex(quote), SimulatedPlatform.load(shared_directory).collateral(now))
    assert verify(evidence, policy, report_data=report_data, now=now).measurement == measurement


def test_keys_are_readable_by_their_owner_alone_and_in_no_repr(shared_directory: Path, measurement: bytes) -> None:
    platform = SimulatedPlatform.create(shared_directory)
    assert stat.S_IMODE(shared_directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in shared_directory.iterdir()} == {0o600}
    assert repr(platform) == f"SimulatedPlatform(directory={shared_directory!r})"
    assert "PrivateKey" not in repr(platform.provider(measurement))


def test_a_second_platform_in_the_same_directory_is_refused(shared_directory: Path) -> None:
    SimulatedPlatform.create(shared_directory)
    with pytest.raises(ConfigurationError):
        SimulatedPlatform.create(shared_directory)


def test_a_directory_without_a_platform_or_with_a_broken_one_is_refused(shared_directory: Path) -> None:
    with pytest.raises(ConfigurationError):
        load_provider(shared_directory, bytes(32))
    SimulatedPlatform.create(shared_directory)
    (shared_directory / "pck.key.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    with pytest.raises(ConfigurationError):
        SimulatedPlatform.load(shared_directory)


def test_two_platforms_have_two_roots_and_two_identities(tmp_path: Path) -> None:
    one, two = (SimulatedPlatform.create(tmp_path / name) for name in ("one", "two"))
    assert one.root_sha256 != two.root_sha256


def test_the_root_says_that_it_is_simulated(platform: SimulatedPlatform) -> None:
    assert "SIMULATED" in x509.load_der_x509_certificate(platform.root_der).subject.rfc4514_string()


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_measurement_or_report_data_of_another_length_is_refused(
    platform: SimulatedPlatform, measurement: bytes, length: int
) -> None:
    with pytest.raises(EvidenceMalformed):
        platform.provider(bytes(length))
    with pytest.raises(EvidenceMalformed):
        platform.provider(measurement).quote(bytes(length))


def test_the_verifier_library_with_its_own_root_refuses_what_is_simulated(
    evidence: Callable[..., Evidence], now: int
) -> None:
    genuine = evidence()
    collateral = dcap_qvl.QuoteCollateralV3.from_json(genuine.collateral.decode())
    with pytest.raises(ValueError, match="Verification failed"):
        dcap_qvl.verify(genuine.quote, collateral, now)


def test_the_pck_extension_reads_back(evidence: Callable[..., Evidence]) -> None:
    extension = dcap_qvl.Quote.parse(evidence().quote).pck_extension()
    assert extension is not None
    assert (extension.fmspc, extension.pce_id, extension.pce_svn) == (b"STIPSM", bytes(2), 13)
    assert len(extension.ppid) == 16
    assert extension.platform_instance_id is not None
    assert extension.sgx_type == 1
