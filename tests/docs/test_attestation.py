"""What docs/attestation.md shows is what the code takes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from stip_enclave.cli import main as enclave
from stip_keyservice.cli import COMMANDS
from stip_protocol.attestation import checks, hosts
from stip_protocol.attestation.collateral_source import CollateralSettings
from stip_protocol.attestation.hostpolicy import HostPolicy

TEXT = (Path(__file__).parents[2] / "docs/attestation.md").read_text()
BLOCKS = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)


def test_the_configuration_shown_loads(tmp_path: Path) -> None:
    policy, keyservice = BLOCKS
    filled = re.sub(r"<[^>]*96 hex digits>", "ab" * 48, policy)
    assert HostPolicy.from_mapping(tomllib.loads(filled)).rtmr2
    table = tomllib.loads(keyservice)["collateral"]
    assert len(CollateralSettings.model_validate(table).endpoints) == 2
    assert set(table) <= set(CollateralSettings.model_fields)


def test_every_condition_is_told_in_its_order() -> None:
    rows = re.findall(r"^\| (gate)? ?\| ([^|]+) \|", TEXT, re.MULTILINE)
    told = [(name, kind == "gate") for kind, name in rows]
    measurements = {"MRSEAM", "MRTD", "RTMR0", "RTMR1", "RTMR2", "RTMR3"}
    for table in (checks.CHECKS, hosts.CHECKS):
        names = [("measurement" if one.name in measurements else one.name, one.gate) for one in table]
        names = list(dict.fromkeys(names))
        assert [row for row in told if row in names] == names


def test_every_command_shown_exists() -> None:
    for line in re.findall(r"^(stip-\S+ .*)$", TEXT, re.MULTILINE):
        program, name, *rest = line.split("#")[0].split()
        command = COMMANDS[name].load() if program == "stip-keyservice" else enclave.commands[name]
        if hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, line
