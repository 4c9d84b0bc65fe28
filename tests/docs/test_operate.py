"""The configuration files that docs/operate.md shows are ones the parts accept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stip.profile import Profile
from stip_enclave.config import EnclaveSettings
from stip_gateway.config import GatewaySettings
from stip_keyservice.service.config import KeyServiceSettings
from stip_keyservice.service.policy import Policy
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.runtime.config import load
from stip_server.config import ServerSettings

PAGE = Path(__file__).parents[2] / "docs" / "operate.md"
PLACEHOLDERS = {"<MRENCLAVE>": "ab" * 32, "<SHA-256 of manifest.json>": "ef" * 32, "<32 hex digits>": "cd" * 16}
READERS: dict[str, Any] = {
    "keyservice.toml": lambda path: load(KeyServiceSettings, path),
    "policy.toml": Policy.load,
    "audited-policy.toml": Policy.load,
    "server.toml": lambda path: load(ServerSettings, path),
    "gateway.toml": lambda path: load(GatewaySettings, path),
    "enclave.toml": lambda path: load(EnclaveSettings, path),
    "profile.toml": Profile.load,
    "client-policy.toml": EvidencePolicy.load,
}


def shown() -> dict[str, str]:
    """The page's TOML blocks by the file name in their first line, placeholders filled in."""
    text = PAGE.read_text()
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    return {re.match(r"# ([\w-]+\.toml)", block).group(1): block for block in blocks}  # type: ignore[union-attr]


def test_the_page_shows_every_configuration_file() -> None:
    assert shown().keys() == READERS.keys()


@pytest.mark.parametrize("name", READERS)
def test_a_shown_configuration_file_is_accepted_as_it_stands(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(shown()[name])
    READERS[name](path)
