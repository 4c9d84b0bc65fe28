"""`stip-enclave collateral`: the host's process that keeps the enclave's file fresh, as a process."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stip_enclave.cli import main
from stip_protocol.attestation.collateral_cache import Kept
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.attestation.verifier import verify
from stip_stack.pccs import Answer, StandIn, serve
from stip_stack.tee import SimulatedPlatform

SGX = PlatformKind("sgx", b"STIPSM", "platform")
CONFIG = """
simulated = true
collateral = "collateral.json"
developer_key = "developer.pub"
[[instances]]
directory = "instance"
[keyservice]
address = "127.0.0.1:1"
ca = "ca.pem"
service_key = "service.pub"
[gateway]
address = "127.0.0.1:1"
ca = "ca.pem"
audience = "gateway.test"
"""
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from stip_enclave.cli import main; main()"


@dataclass
class Host:
    folder: Path
    platform: SimulatedPlatform
    pccs: StandIn

    @property
    def file(self) -> Path:
        return self.folder / "collateral.json"

    def arguments(self, *more: str) -> list[str]:
        return ["collateral", "--config", str(self.folder / "enclave.toml"), "--endpoint", self.pccs.url,
                "--simulated-root", str(self.folder / "root.der"), *more]  # fmt: skip

    def call(self, *more: str) -> Result:
        return CliRunner().invoke(main, self.arguments(*more))

    def issue(self, age: int) -> None:
        """What the source serves from now on."""
        self.pccs.collateral = {SGX: self.platform.collateral(int(time.time()) - age)}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    platform = SimulatedPlatform.create(tmp_path / "tee")
    (tmp_path / "root.der").write_bytes(platform.root_der)
    (tmp_path / "enclave.toml").write_text(CONFIG)
    with serve(StandIn({SGX: platform.collateral(int(time.time()) - 60)})) as pccs:
        yield Host(tmp_path, platform, pccs)


def until(condition: object, deadline: float = 20) -> None:
    assert callable(condition)
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_file_is_made_without_torch_replaced_when_due_and_verifies(host: Host) -> None:
    argv = [sys.executable, "-c", WITHOUT_TORCH, *host.arguments("--platform", str(SGX), "--every-minutes", "0.01")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(host.file.exists)
        first = Kept.parse(host.file.read_bytes())
        assert stat.S_IMODE(host.file.stat().st_mode) == 0o644
        old = host.platform.collateral(int(time.time()) - 20 * 24 * 3600)
        host.file.write_bytes(old)  # a third of its life is left: due
        until(lambda: Kept.parse(host.file.read_bytes()).issued == first.issued)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["event"] for line in lines} == {"renewed"}
    assert {line["platform"] for line in lines} == {str(SGX)}

    provider = host.platform.provider(bytes(32))
    mapping = {
        "mode": "development",
        "measurements": [bytes(32).hex()],
        "simulated_root_sha256": host.platform.root_sha256.hex(),
    }
    evidence = Evidence(provider.quote(bytes(64)), host.file.read_bytes())
    assert verify(evidence, EvidencePolicy.from_mapping(mapping), report_data=bytes(64), now=int(time.time()))


def test_the_platform_is_told_by_a_quote_by_name_or_by_the_file_that_lies_there(host: Host) -> None:
    quote = host.folder / "quote"
    quote.write_bytes(host.platform.provider(bytes(32)).quote(bytes(64)) + bytes(100))
    assert host.call("--once").exit_code == 2
    assert host.call("--once", "--quote", str(quote)).exit_code == 0
    before = host.file.read_bytes()
    host.issue(age=30)
    told = json.loads(host.call("--once").stdout)
    assert told["platform"] == str(SGX)
    assert host.file.read_bytes() != before
    newer = host.file.read_bytes()
    host.issue(age=3600)  # a source that lags behind
    assert host.call("--once").exit_code == 0
    assert host.file.read_bytes() == newer
    forged = newer.replace(b'\\"tcbType\\":0', b'\\"tcbType\\":1')
    assert forged != newer
    host.file.write_bytes(forged)
    assert host.call("--once", "--platform", str(SGX)).exit_code == 0
    assert Kept.parse(host.file.read_bytes()).collateral.v3.tcb_info.count('"tcbType":0') == 1


def test_a_source_that_gives_nothing_leaves_the_file_as_it_is(host: Host) -> None:
    assert host.call("--once", "--platform", str(SGX)).exit_code == 0
    before = host.file.read_bytes()
    host.pccs.fault = lambda _, answer: Answer(status=404)
    refused = host.call("--once")
    assert (refused.exit_code, host.file.read_bytes()) == (1, before)
    assert "collateral_unavailable" in refused.stderr


@pytest.mark.parametrize(
    "wrong", [("--platform", "nonsense"), ("--endpoint", "http://elsewhere.example"), ("--ca", "/nowhere/ca.pem")]
)
def test_a_wrong_option_is_a_configuration_error(host: Host, wrong: tuple[str, str]) -> None:
    assert host.call("--once", "--platform", str(SGX), *wrong).exit_code == 2


def test_simulated_collateral_takes_consent_in_the_configuration(host: Host) -> None:
    config = host.folder / "enclave.toml"
    config.write_text(CONFIG.replace("simulated = true\n", ""))
    assert host.call("--once", "--platform", str(SGX)).exit_code == 2
    arguments = ["collateral", "--config", str(config), "--endpoint", host.pccs.url, "--once", "--platform", str(SGX)]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "trust anchor" in refused.stderr
    assert not host.file.exists()
