"""What docs/rollout.md and the runbooks say is there: every command, option, file, unit, port and flow."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from stip.profile import Profile
from stip_enclave.config import EnclaveSettings
from stip_gateway.config import GatewaySettings
from stip_keyservice.service.config import KeyServiceSettings
from stip_keyservice.service.policy import Policy
from stip_keyservice.service.policy.document import LeasePolicy
from stip_protocol import telemetry
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.errors import BY_CODE
from stip_protocol.runtime.config import load
from stip_server.config import ServerSettings
from tests.rollout import page
from tests.rollout.commands import require_command

RUNBOOKS = page.ROOT / "docs" / "keyservice.md"
UNITS = page.ROOT / "manifests" / "systemd"
PLACEHOLDERS = {"<MRENCLAVE>": "ab" * 32, "<32 hex digits>": "cd" * 16, "<SHA-256 of manifest.json>": "12" * 32}
READERS: dict[str, Any] = {
    "keyservice.toml": lambda path: load(KeyServiceSettings, path),
    "policy.toml": Policy.load,
    "replica-1.toml": lambda path: load(ServerSettings, path),
    "replica-2.toml": lambda path: load(ServerSettings, path),
    "gateway.toml": lambda path: load(GatewaySettings, path),
    "enclave.toml": lambda path: load(EnclaveSettings, path),
    "profile.toml": Profile.load,
    "client-policy.toml": EvidencePolicy.load,
}
INCIDENTS = RUNBOOKS.read_text().partition("## Incident runbooks")[2]
COMMANDS = page.commands() + page.commands(INCIDENTS)


def test_the_page_shows_every_file_of_a_rollout() -> None:
    assert page.files().keys() == READERS.keys()


@pytest.mark.parametrize("name", READERS)
def test_a_shown_file_is_accepted_as_it_stands(name: str, tmp_path: Path) -> None:
    text = page.files()[name]
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    path = tmp_path / name
    path.write_text(text)
    READERS[name](path)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_shown_command_exists_with_its_options(words: list[str]) -> None:
    require_command(words)


def test_a_command_that_does_not_exist_would_be_found() -> None:
    for words in (["stip-gateway", "tls", "forge"], ["stip-gateway", "tls", "init", "--weak"], ["stip", "verify"]):
        with pytest.raises(AssertionError):
            require_command(words)


def test_every_part_listens_on_its_address_and_its_peers_call_it_there() -> None:
    listening = {}
    for name, text in page.files().items():
        serving = tomllib.loads(text).get("serving")
        if serving is not None:
            listening[name.removesuffix(".toml")] = serving["listen"]
            assert serving["metrics"].startswith("127.0.0.1:")
    addresses = page.addresses()
    assert {host: listen.partition(":")[0] for host, listen in listening.items()}.items() <= addresses.items()
    for flow in page.flows():
        called = page.files()["profile.toml" if flow.source == "client" else f"{flow.source}.toml"]
        assert f'"{listening[flow.target]}"' in called, flow
        assert listening[flow.target].endswith(f":{flow.port}")


def test_a_certificate_is_issued_for_every_address_that_the_operator_serves() -> None:
    issued = {words[3]: words for words in page.commands() if words[:3] == ["stip-gateway", "tls", "issue"]}
    for host in ("gateway", "replica-1", "replica-2"):
        assert page.addresses()[host] in issued[host]
        shown = page.files()[f"{host}.toml"]
        assert f'"tls/{host}.pem"' in shown
    assert "client" in issued["gateway-client"]


def test_credentials_lie_where_the_units_put_them() -> None:
    for unit, files in (
        ("stip-gateway.service", ["gateway.toml"]),
        ("stip-server@.service", ["replica-1.toml", "replica-2.toml"]),
    ):
        loaded = re.findall(r"^LoadCredential=([\w.-]+):", (UNITS / unit).read_text(), re.MULTILINE)
        for name in files:
            service = unit.replace("@.", f"@{name.removesuffix('.toml')}.")
            shown = set(re.findall(r'"/run/credentials/([^"]+)"', page.files()[name]))
            assert shown == {f"{service}/{credential}" for credential in loaded}


def test_every_unit_and_folder_that_the_page_names_is_there() -> None:
    for unit in set(re.findall(r"`(stip-[\w@]+\.(?:service|timer))`", page.TEXT)):
        assert (UNITS / unit).is_file(), unit
    for path in set(re.findall(r"`(manifests/[\w./-]+|tests/[\w./-]+)`", page.TEXT)) - {"manifests/compose/files/"}:
        assert (page.ROOT / path).exists(), path
    assert {unit.name for unit in UNITS.glob("*.service")} >= {"stip-keyservice.service", "stip-gateway.service"}


def test_every_link_leads_somewhere() -> None:
    for name, anchor in re.findall(r"\]\(([\w-]+\.md)(#[\w-]+)?\)", page.TEXT):
        target = page.ROOT / "docs" / name
        assert target.is_file(), name
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}, anchor


def test_every_refusal_and_setting_that_a_runbook_names_is_there() -> None:
    settings = {"link_ca", "service_key", *EvidencePolicy.model_fields, *LeasePolicy.model_fields}
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", INCIDENTS))
    metrics = {one.name for one in vars(telemetry).values() if isinstance(one, telemetry.Metric)}
    assert {name for name in named if not name.startswith("stip_")} <= settings | BY_CODE.keys()
    assert {name for name in named if name.startswith("stip_")} <= metrics


def test_every_incident_says_what_it_means_what_to_check_what_to_do_and_what_users_see() -> None:
    incidents = INCIDENTS.split("\n### ")[1:]
    assert len(incidents) == 10
    for incident in incidents:
        for heading in ("*Means.*", "*Check.*", "*Do.*", "*Users see.*"):
            assert incident.count(heading) == 1, incident[:40]
    anchors = {one.split("\n")[0].lower().replace(" ", "-") for one in incidents}
    assert set(re.findall(r"\]\(#([\w-]+)\)", INCIDENTS)) <= anchors
