"""The program around the service: settings, guards, and no way to simulated evidence."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stip_enclave import cli
from stip_enclave.config import EnclaveSettings
from stip_enclave.guards import Rate
from stip_enclave.main import run
from stip_protocol.errors import ConfigurationError, Overloaded
from stip_protocol.runtime.config import load

CONFIG = """
collateral = "collateral.json"
developer_key = "developer.pub"
[[instances]]
directory = "instance"
[keyservice]
address = "127.0.0.1:1"
ca = "ca.pem"
service_key = "service.pub"
[gateway]
address = "127.0.0.1:2"
ca = "ca.pem"
audience = "gateway.stip"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "enclave.toml"
    path.write_text(text)
    return path


def test_settings_resolve_paths_against_their_file(tmp_path: Path) -> None:
    settings = load(EnclaveSettings, written(tmp_path, CONFIG))
    assert settings.instances[0].directory == tmp_path / "instance"
    assert settings.keyservice.service_key == tmp_path / "service.pub"
    assert not settings.simulated


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ('dns_name = "no name"', "dns_name"),
        ("certificate_hours = 25", "certificate_hours"),
        ("colour = 1", "colour"),
        ("[limits]\nsessions = 0", "limits.sessions"),
        ("[limits]\nidle_seconds = -1.0", "limits.idle_seconds"),
        ('serving = {listen = "nowhere"}', "serving.listen"),
    ],
)
def test_a_bad_setting_exits_2_and_is_named(tmp_path: Path, change: str, field: str) -> None:
    tables = CONFIG + change if change.startswith("[") else change + "\n" + CONFIG
    tomllib.loads(tables)
    result = CliRunner().invoke(cli.main, ["serve", "--config", str(written(tmp_path, tables))])
    assert result.exit_code == 2
    assert field in result.output


def test_the_program_has_no_option_for_simulated_evidence() -> None:
    assert [option.name for option in cli.serve.params] == ["config"]


class Simulated:
    simulated = True

    def quote(self, report_data: bytes) -> bytes:
        raise AssertionError("nothing is quoted before the settings agree")

    collateral: Any = None


async def test_simulated_evidence_and_settings_must_agree(tmp_path: Path) -> None:
    settings = load(EnclaveSettings, written(tmp_path, CONFIG))
    with pytest.raises(ConfigurationError, match="simulated"):
        await run(settings, Simulated(), lambda: settings)


def test_without_sgx_the_program_says_so_and_exits_2(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "from stip_enclave.cli import main; main()", "serve", "--config"]
    done = subprocess.run(
        [*argv, str(written(tmp_path, CONFIG))], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 2
    assert "/dev/attestation" in done.stderr
    assert done.stdout == ""


def test_the_hardened_process_leaves_no_core_and_cannot_be_read() -> None:
    script = """
import ctypes, resource
from stip_enclave.guards import harden_process
harden_process()
print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "(0, 0) 0\n"


def test_a_rate_allows_a_burst_and_then_its_average() -> None:
    now = [0.0]
    rate = Rate("things", 2.0, clock=lambda: now[0])
    for _ in range(4):
        rate.take()
    with pytest.raises(Overloaded, match="things"):
        rate.take()
    now[0] += 0.5
    rate.take()
    with pytest.raises(Overloaded):
        rate.take()
