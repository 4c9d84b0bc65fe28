"""The Compose file is one, confines every container, and says what the parts' own configuration says.

No container runs here: there is no container engine in the tests. What can be checked without one is: the form against
a strict model of the part of the Compose Specification that the file uses, and every path, port, name and command in it
against the configuration files beside it and the programs.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import make_url

from stip_enclave.config import EnclaveSettings
from stip_gateway.config import GatewaySettings
from stip_keyservice.service.config import KeyServiceSettings
from stip_keyservice.service.policy import Policy
from stip_keyservice.service.state.postgres import require_sound
from stip_protocol.runtime.config import Serving, load
from stip_server.config import ServerSettings
from tests.rollout import page
from tests.rollout.commands import require_command

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "manifests" / "compose"
MODES = ("config", "config-insecure-simulation")
SIMULATED = "enclave-insecure-simulation"
PROFILE = "insecure-simulation-protects-nothing"
PLACEHOLDERS = {
    "<MRENCLAVE>": "ab" * 32,
    "<32 hex digits>": "cd" * 16,
    "<simulated root>": "ef" * 32,
    "<SHA-256 of manifest.json>": "12" * 32,
}
SETTINGS: dict[str, Any] = {
    "keyservice": KeyServiceSettings,
    "gateway": GatewaySettings,
    "replica-1": ServerSettings,
    "replica-2": ServerSettings,
    SIMULATED: EnclaveSettings,
}
CONFIGS = {SIMULATED: "enclave"}
DURATION = Annotated[str, Field(pattern=r"^\d+(ms|s|m|h)$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Health(Strict):
    test: list[str] = Field(min_length=2)
    interval: DURATION
    timeout: DURATION
    retries: int
    start_period: DURATION | None = None


class Build(Strict):
    context: str
    dockerfile: str
    target: str


class Mounted(Strict):
    source: str
    target: str


class Condition(Strict):
    condition: Literal["service_healthy"]


class Logging(Strict):
    driver: Literal["json-file"]
    options: dict[str, str]


class Service(Strict):
    """What every container of ours says; a field that is not here is one that nobody has judged."""

    image: Annotated[str, Field(pattern=r"^[a-z0-9./-]+:[0-9][A-Za-z0-9.-]+$")]
    build: Build | None = None
    profiles: list[str] = []
    command: list[str] = []
    restart: Literal["on-failure"]
    init: Literal[True]
    user: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")]
    read_only: Literal[True]
    cap_drop: list[Literal["ALL"]] = Field(min_length=1)
    security_opt: list[Literal["no-new-privileges:true"]] = Field(min_length=1)
    pids_limit: int
    ulimits: dict[Literal["core"], Literal[0]] = Field(min_length=1)
    stop_grace_period: DURATION
    tmpfs: list[str]
    logging: Logging
    environment: dict[str, str] = {}
    configs: list[Mounted] = []
    secrets: list[str] = []
    volumes: list[str] = []
    networks: list[str] = []
    network_mode: Literal["none"] | None = None
    ports: list[str] = []
    depends_on: dict[str, Condition] = {}
    healthcheck: Health


class File(Strict):
    file: str


class Network(Strict):
    internal: bool = False


class Compose(BaseModel):
    """The whole file; `x-` extensions are the file's own."""

    model_config = ConfigDict(extra="ignore", strict=True)
    name: str
    services: dict[str, Service]
    networks: dict[str, Network]
    volumes: dict[str, Strict]
    configs: dict[str, File]
    secrets: dict[str, File]


RAW = yaml.safe_load((FOLDER / "compose.yaml").read_text())
COMPOSE = Compose.model_validate(RAW)
OURS = sorted(SETTINGS)


def configured(mode: str, service: str, folder: Path) -> Any:
    """The settings of a service, read as it would read them."""
    source = FOLDER / mode / f"{CONFIGS.get(service, service)}.toml"
    for path in (FOLDER / mode).glob("*.toml"):
        text = path.read_text()
        for placeholder, value in PLACEHOLDERS.items():
            text = text.replace(placeholder, value)
        (folder / path.name).write_text(text)
    return load(SETTINGS[service], folder / source.name)


def port(address: str) -> str:
    return address.rpartition(":")[2]


def paths(value: Any) -> Iterator[str]:
    """Every path that settings name."""
    if isinstance(value, Path):
        yield str(value)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from paths(getattr(value, name))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from paths(each)


PARTS = [(mode, service) for mode in MODES for service in OURS if (mode, service) != (MODES[0], SIMULATED)]
"""An enclave in production does not run in a container of this file."""


@pytest.fixture(params=PARTS, ids="/".join)
def part(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Service, Any]:
    mode, name = request.param
    return name, COMPOSE.services[name], configured(mode, name, tmp_path)


def test_only_extensions_and_known_tables_stand_at_the_top() -> None:
    assert {key for key in RAW if not key.startswith("x-")} == set(Compose.model_fields)


def test_an_unjudged_field_of_a_service_is_refused() -> None:
    service = {**RAW["services"]["gateway"], "network_mode": "host"}
    with pytest.raises(ValueError, match="network_mode"):
        Service.model_validate(service)
    with pytest.raises(ValueError, match="privileged"):
        Service.model_validate({**RAW["services"]["gateway"], "privileged": True})


def test_every_configuration_is_accepted_and_listens_where_the_container_says(
    part: tuple[str, Service, Any],
) -> None:
    name, service, settings = part
    for published in service.ports:
        assert port(published) == port(settings.serving.listen), name
    assert settings.serving.listen.startswith("0.0.0.0:")
    probe = re.search(r"http://127\.0\.0\.1:(\d+)/", service.healthcheck.test[-1])
    assert probe is not None
    assert probe.group(1) == port(settings.serving.metrics)
    assert port(settings.serving.metrics) not in {port(one) for one in service.ports}, "metrics are not for outside"


def test_every_path_of_a_configuration_is_mounted(part: tuple[str, Service, Any], tmp_path: Path) -> None:
    name, service, settings = part
    mounts = [volume.split(":")[-2 if volume.endswith(":ro") else -1] for volume in service.volumes]
    files = {mounted.target for mounted in service.configs} | {f"/run/secrets/{secret}" for secret in service.secrets}
    for path in paths(settings):
        inside = path.replace(str(tmp_path), "/etc/stip")
        assert inside in files or any(inside.startswith(mount) for mount in mounts), f"{name}: {inside}"


def test_every_peer_of_a_configuration_shares_a_network_and_listens_there(
    part: tuple[str, Service, Any], tmp_path: Path
) -> None:
    _, service, settings = part
    called = [getattr(settings, peer).address for peer in ("keyservice", "gateway") if hasattr(settings, peer)]
    called += [replica.address for replica in getattr(settings, "replicas", ())]
    for address in called:
        host = address.partition(":")[0]
        peer = COMPOSE.services[host]
        assert set(peer.networks) & set(service.networks), host
        other = tmp_path / host
        other.mkdir(exist_ok=True)
        assert port(configured(MODES[1], host, other).serving.listen) == port(address)


def test_the_drain_ends_before_the_container_is_killed(part: tuple[str, Service, Any]) -> None:
    _, service, settings = part
    assert int(service.stop_grace_period.removesuffix("s")) > settings.serving.drain_seconds == Serving().drain_seconds


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_is_accepted(mode: str, tmp_path: Path) -> None:
    configured(mode, "keyservice", tmp_path)
    policy = Policy.load(tmp_path / "policy.toml")
    assert policy.simulated == (mode != "config")


def test_what_is_simulated_says_so_and_nothing_else_differs() -> None:
    for path in sorted((FOLDER / "config").glob("*.toml")):
        plain = path.read_text().splitlines()
        loud = (FOLDER / MODES[1] / path.name).read_text().splitlines()
        added = [line for line in loud if line not in plain]
        assert any("PROTECTS NOTHING" in line for line in added), path.name
        if path.name != "policy.toml":
            assert all(line.startswith("simulated") for line in added), path.name
            assert [line for line in loud if line not in added] == plain
    simulated = [name for name, service in COMPOSE.services.items() if service.profiles]
    assert simulated == [SIMULATED]
    assert COMPOSE.services[SIMULATED].profiles == [PROFILE]


def test_the_simulated_enclave_claims_what_its_policy_accepts(tmp_path: Path) -> None:
    configured(MODES[1], "keyservice", tmp_path)
    claimed = re.search(r":-([0-9a-f]{64})}", COMPOSE.services[SIMULATED].command[-1])
    assert claimed is not None
    assert bytes.fromhex(claimed.group(1)) in Policy.load(tmp_path / "policy.toml").evidence.measurements


@pytest.mark.parametrize("name", [name for name in OURS if name != SIMULATED])
def test_a_container_starts_a_command_that_exists(name: str) -> None:
    command = COMPOSE.services[name].command
    require_command(command)
    assert command[-1] in {mounted.target for mounted in COMPOSE.services[name].configs}


def test_the_simulated_enclave_starts_a_module_that_takes_its_options() -> None:
    from stip_stack.enclave_main import main

    command = COMPOSE.services[SIMULATED].command
    assert command[1:3] == ["-m", "stip_stack.enclave_main"]
    options = {option for parameter in main.params for option in parameter.opts}
    assert {word for word in command[3:] if word.startswith("--")} == options - {"--help"}


def test_everything_that_is_mounted_is_declared_and_what_can_be_is_there() -> None:
    for service in COMPOSE.services.values():
        assert {one.source for one in service.configs} <= COMPOSE.configs.keys()
        assert set(service.secrets) <= COMPOSE.secrets.keys()
        assert set(service.networks) <= COMPOSE.networks.keys()
        assert service.depends_on.keys() <= COMPOSE.services.keys()
        named = {volume.split(":")[0] for volume in service.volumes if volume[0].isalpha()}
        assert named <= COMPOSE.volumes.keys()
        bound = [volume for volume in service.volumes if not volume[0].isalpha()]
        assert all(volume.endswith(":ro") for volume in bound), "what a container writes lies in named volumes"
    for mode in MODES:
        for config in COMPOSE.configs.values():
            path = FOLDER / config.file.replace("${STIP_CONFIG:-./config}", mode)
            assert path.is_file(), path


def test_the_database_and_the_model_servers_are_out_of_reach() -> None:
    for name, service in COMPOSE.services.items():
        assert bool(service.networks) != (service.network_mode == "none"), name
    assert COMPOSE.services["database"].network_mode == "none"
    assert COMPOSE.services["database"].ports == []
    for name in ("replica-1", "replica-2"):
        service = COMPOSE.services[name]
        assert service.ports == []
        assert all(COMPOSE.networks[network].internal for network in service.networks), name
    assert "steps" not in COMPOSE.services[SIMULATED].networks


def test_a_health_check_asks_what_the_parts_of_the_rollout_answer() -> None:
    for name in OURS:
        path = re.search(r"9464(/\w+)", COMPOSE.services[name].healthcheck.test[-1])
        assert path is not None
        assert path.group(1) == page.PROBE


def test_the_database_is_the_one_that_the_home_is_made_with() -> None:
    made = re.search(r"--database '(\S+)' --password-file (\S+)", (FOLDER / "compose.yaml").read_text())
    assert made is not None
    environment = COMPOSE.services["database"].environment
    url = make_url(made.group(1))
    require_sound(url)
    assert (url.username, url.database) == (environment["POSTGRES_USER"], environment["POSTGRES_DB"])
    for name in ("database", "keyservice"):
        assert f"database-socket:{url.query['host']}" in COMPOSE.services[name].volumes
    assert made.group(2) == environment["POSTGRES_PASSWORD_FILE"]
    assert {"database-password"} <= set(COMPOSE.services["keyservice"].secrets)


def test_images_are_built_from_stages_and_extras_that_exist() -> None:
    recipe = (FOLDER / "Containerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS ([\w-]+)$", recipe, re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    built = {service.image: service.build for service in COMPOSE.services.values() if service.build}
    for service in COMPOSE.services.values():
        assert service.image in built or service.image.startswith("docker.io/library/postgres:")
    for build in built.values():
        assert build is not None
        assert build.target in stages
        assert (FOLDER / build.context / build.dockerfile).resolve() == FOLDER / "Containerfile"
    assert set(re.findall(r"'\.\[([\w,]+)\]'", recipe)) <= extras.keys()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", recipe, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    for base in re.findall(r"^FROM (\S+/\S+) ", recipe, re.MULTILINE):
        assert re.search(r":\d+\.\d+\.\d+-", base), f"{base}: pin a version"
    for tail in re.findall(r"^FROM base AS [\w-]+\n(.*?)(?=^FROM|\Z)", recipe, re.MULTILINE | re.DOTALL):
        assert "USER 10001:10001" in tail or "/src" in tail
