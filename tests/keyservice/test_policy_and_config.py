"""Policy and configuration: what is unknown, empty or contradictory refuses to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stip_keyservice.service.config import KeyServiceSettings, trust
from stip_keyservice.service.policy import Policy
from stip_protocol.errors import ConfigurationError, PolicyInvalid, StipError
from stip_protocol.runtime.config import load
from stip_stack.tee import SimulatedPlatform

from .conftest import MEASUREMENT

PRODUCTION = f"""
serial = 1
[[instances]]
manifest = "{"cd" * 32}"
[evidence]
mode = "production"
measurements = ["{MEASUREMENT.hex()}"]
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


def test_a_policy_that_names_evidence_has_defaults_for_the_rest(tmp_path: Path) -> None:
    policy = Policy.load(write(tmp_path, PRODUCTION))
    assert (policy.lease.seconds, policy.lease.tokens, policy.lease.heartbeat_tokens) == (900, 1024, 64)
    assert (policy.release.nonce_seconds, policy.release.delegation_seconds) == (60, 86400)
    assert policy.evidence.audience == "keyservice"
    assert not policy.simulated


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[lease]\nseconds = 900",
        '[evidence]\nmode = "production"',
        PRODUCTION + "unknown_rule = 1",
        PRODUCTION + 'audience = "client"',
        PRODUCTION + f'simulated_root_sha256 = "{"00" * 32}"',
        PRODUCTION + "[leese]\nseconds = 900",
        PRODUCTION + "[lease]\nsecond = 900",
        PRODUCTION + "[lease]\nseconds = 1",
        PRODUCTION + "[lease]\ntokens = 8\nheartbeat_tokens = 9",
        PRODUCTION + "[release]\nnonce_seconds = 0",
        PRODUCTION + "[release]\ndelegation_seconds = 90000",
        "version = [2, 0]" + PRODUCTION,
        "not toml",
        "\x00",
    ],
)
def test_refuses_to_load_policy(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Policy.load(write(tmp_path, text))
    assert caught.value.code in ("policy_invalid", "version_unsupported")


def test_a_missing_policy_and_one_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyInvalid):
        Policy.load(tmp_path / "none.toml")
    with pytest.raises(PolicyInvalid):
        Policy.load(write(tmp_path, PRODUCTION + "#" * 300_000))


def test_the_digest_follows_the_meaning_and_not_the_text(tmp_path: Path) -> None:
    digest = Policy.load(write(tmp_path, PRODUCTION)).digest()
    assert Policy.load(write(tmp_path, "# reviewed\n" + PRODUCTION)).digest() == digest
    assert Policy.load(write(tmp_path, PRODUCTION + "[lease]\nseconds = 901")).digest() != digest


@pytest.mark.parametrize("simulated", [True, False])
@pytest.mark.parametrize("root", ["right", "another", "missing", None])
@pytest.mark.parametrize("pinned", [True, False])
def test_simulation_takes_three_consents_that_agree(
    tmp_path: Path,
    platform: SimulatedPlatform,
    policy_tables: dict[str, Any],
    simulated: bool,
    root: str | None,
    pinned: bool,
) -> None:
    (tmp_path / "right").write_bytes(platform.root_der)
    (tmp_path / "another").write_bytes(platform.root_der + b"\0")
    settings = KeyServiceSettings(
        policy=tmp_path / "policy.toml",
        simulated=simulated,
        simulated_root=None if root is None else tmp_path / root,
    )
    if not pinned:
        policy_tables["evidence"].pop("simulated_root_sha256")
    policy = Policy.model_validate(policy_tables)
    if (simulated, root, pinned) == (True, "right", True):
        assert trust(settings, policy) == platform.root_der
    elif (simulated, root, pinned) == (False, None, False):
        assert trust(settings, policy) is None
    else:
        with pytest.raises(ConfigurationError):
            trust(settings, policy)


def test_paths_in_the_configuration_are_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "keyservice.toml").write_text('policy = "policy.toml"\nhome = "home"\n[serving]\nlisten = "[::1]:0"\n')
    settings = load(KeyServiceSettings, tmp_path / "keyservice.toml")
    assert (settings.policy, settings.home) == (tmp_path / "policy.toml", tmp_path / "home")


def test_an_unknown_key_in_the_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keyservice.toml").write_text('policy = "policy.toml"\nsimulate = true\n')
    with pytest.raises(StipError):
        load(KeyServiceSettings, tmp_path / "keyservice.toml")
