"""The systemd units are ones that systemd takes, that confine what they start, and that start what there is."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stip_protocol.runtime.config import Serving
from tests.rollout.commands import require_command

UNITS = Path(__file__).parents[2] / "manifests" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
EXPOSURE = 20
"""Highest exposure accepted, in tenths of `systemd-analyze security`'s ten: below 2 is what it calls OK."""
MODULES = {"stip-gateway": "stip_gateway.main", "stip-keyservice": "stip_keyservice.service.main"}
WITHOUT_WRITE_AND_EXECUTE = """
import ctypes, importlib, mmap, os, sys
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit(3)
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)
except OSError:
    print("refused")
importlib.import_module(sys.argv[1])
print("loaded")
"""
SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600}

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt-get install systemd"
)


def settings(unit: Path) -> dict[str, list[str]]:
    """Every assignment of a unit, in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def span(value: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([a-z]*)", value).groups()  # type: ignore[union-attr]
    return int(number) * SECONDS[unit]


@pytest.fixture
def installed(tmp_path: Path) -> list[Path]:
    """Copies whose programs exist: `systemd-analyze verify` looks for them."""
    copies = []
    for unit in sorted(UNITS.glob("*.service")) + sorted(UNITS.glob("*.timer")):
        text = re.sub(r"^(Exec\w+=)\S+", r"\1/bin/true", unit.read_text(), flags=re.MULTILINE)
        copy = tmp_path / unit.name
        copy.write_text(text)
        copies.append(copy)
    return copies


@needs_systemd
def test_systemd_takes_every_unit_without_a_word(installed: list[Path]) -> None:
    for unit in installed:
        path = str(unit).replace("@.", "@replica-1.")
        if path != str(unit):
            shutil.copy(unit, path)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        # Whatever it says of units of this machine is not about ours.
        complaints = [line for line in (done.stdout + done.stderr).splitlines() if "stip-" in line]
        assert (done.returncode, complaints) == (0, []), unit.name


@needs_systemd
@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_service_is_confined(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager", str(unit)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-300:]


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_service_starts_a_command_that_exists(unit: Path) -> None:
    words = shlex.split(settings(unit)["ExecStart"][0])
    if words[0] == "/usr/bin/gramine-sgx":
        assert words[1:] == ["stip-enclave"]
        return
    require_command(words)


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_service_leaves_no_core_and_has_its_own_user(unit: Path) -> None:
    found = settings(unit)
    assert found["LimitCORE"] == ["0"]
    assert found["User"] == found["Group"]
    assert f"u {found['User'][0]} " in (UNITS / "stip.sysusers").read_text()
    for name in ("NoNewPrivileges", "PrivateTmp", "ProtectHome"):
        assert found[name] == ["yes"], name
    assert found["ProtectSystem"] == ["strict"]


@pytest.mark.parametrize(
    "unit", [unit for unit in SERVICES if settings(unit).get("Type") != ["oneshot"]], ids=lambda unit: unit.name
)
def test_a_service_is_given_the_time_that_its_drain_takes(unit: Path) -> None:
    found = settings(unit)
    assert span(found["TimeoutStopSec"][0]) > Serving().drain_seconds
    assert found["RestartPreventExitStatus"] == ["2"]


def test_write_and_execute_are_kept_apart_but_where_torch_or_an_enclave_needs_both() -> None:
    together = {unit.name for unit in SERVICES if settings(unit).get("MemoryDenyWriteExecute") != ["yes"]}
    assert together == {"stip-server@.service", "stip-enclave.service"}


def test_private_keys_come_as_credentials_from_a_folder_that_only_root_reads() -> None:
    loaded = [value for unit in SERVICES for value in settings(unit).get("LoadCredential", [])]
    assert len(loaded) == 3
    assert all(value.partition(":")[2].startswith("/etc/stip/tls/") for value in loaded)
    assert "z /etc/stip/tls/*.key  0600 root" in (UNITS / "stip.tmpfiles").read_text()


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="systemd-tmpfiles is not installed")
def test_systemd_takes_the_users_and_folders(tmp_path: Path) -> None:
    for kind in ("sysusers", "tmpfiles"):
        target = tmp_path / ("etc" if kind == "sysusers" else ".")
        target.mkdir(exist_ok=True)
    (tmp_path / "etc").mkdir(exist_ok=True)
    for command in (
        ["systemd-sysusers", f"--root={tmp_path}", str(UNITS / "stip.sysusers")],
        ["systemd-tmpfiles", f"--root={tmp_path}", "--create", str(UNITS / "stip.tmpfiles")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    users = (tmp_path / "etc" / "passwd").read_text()
    assert {line.split(":")[0] for line in users.splitlines() if line.startswith("stip-")} == {
        "stip-keyservice", "stip-gateway", "stip-server", "stip-enclave", "stip-collateral",
    }  # fmt: skip
    assert (tmp_path / "var/lib/stip/keyservice").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("program", ["stip-gateway", "stip-keyservice"])
def test_what_may_not_map_pages_to_write_and_execute_starts_without(program: str) -> None:
    """`MemoryDenyWriteExecute=` by the kernel's own switch, PR_SET_MDWE (prctl(2), Linux 6.3): everything that `serve`
    loads is loaded under it."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_WRITE_AND_EXECUTE, MODULES[program]],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode == 3:
        pytest.skip("PR_SET_MDWE: this kernel is older than Linux 6.3")
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split() == ["refused", "loaded"]
