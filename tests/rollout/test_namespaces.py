"""The rollout of docs/rollout.md on seven hosts: namespaces with the page's addresses, files, commands and flows.

What differs from the page: evidence is simulated (and every file says so), paths lie below a folder for each host, and
the model is the bundled one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from stip import keys
from stip_keyservice.home import Home
from stip_stack.namespaces import Network, missing
from stip_stack.processes import Process, run
from stip_stack.tee import SimulatedPlatform
from stip_stack.workspace import MEASUREMENT
from tests.rollout import page

MODEL = page.ROOT / "stack" / "demo_model"
BIN = Path(sys.executable).parent
REPLICAS = ("replica-1", "replica-2")
SERVING = ("keyservice", *REPLICAS, "gateway", "enclave")
PORTS = {"keyservice": 7441, "gateway": 7443, "replica-1": 7442, "replica-2": 7442, "enclave": 7443}
READY_SECONDS = 30.0
SPEAKER = Path(__file__).with_name("speaker.py")
KNOCK = """
import json, socket, sys
def knock(address, port):
    try:
        socket.create_connection((address, port), 5).close()
        return "open"
    except OSError as error:
        return type(error).__name__
print(json.dumps({host: knock(address, port) for host, (address, port) in json.loads(sys.argv[1]).items()}))
"""

ASK = """
import sys, urllib.request, urllib.error
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""

pytestmark = pytest.mark.timeout(240)


class Rollout:
    """The hosts, their files, and their parts once started."""

    def __init__(self, path: Path, network: Network) -> None:
        self.path, self.network = path, network
        self.processes: dict[str, Process] = {}
        self.platform = SimulatedPlatform.create(path / "tee")
        self.home = Home.open(self.host("keyservice") / "var/lib/stip/keyservice")
        self.instance = path / "instance"
        self.manifest: dict[str, Any] = {}

    def host(self, name: str) -> Path:
        """The folder that stands for a host's root."""
        folder = self.path / "hosts" / name
        (folder / "etc/stip/tls").mkdir(parents=True, exist_ok=True)
        return folder

    def configure(self, host: str, name: str, **more: Any) -> Path:
        """Write a file of the page on a host, below the host's folder, for this instance."""
        text = page.files()[name].replace("<32 hex digits>", self.manifest["instance"])
        text = text.replace("<MRENCLAVE>", MEASUREMENT.hex())
        for root in ("/srv/", "/var/", "/run/"):
            text = text.replace(f'"{root}', f'"{self.host(host)}{root}')
        path = self.host(host) / "etc/stip" / name
        path.write_text(tomli_w.dumps({**tomllib.loads(text), **more}))
        return path

    def provide(self, host: str, place: str, *sources: Path) -> None:
        """Copy files to a host, as the page's tables say."""
        folder = self.host(host) / place
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            (folder / source.name).symlink_to(source)

    def keyservice(self, *arguments: str) -> str:
        return run([str(BIN / "stip-keyservice"), *arguments, "--home", str(self.home.path)])

    def start(self, host: str, argv: list[str]) -> None:
        log = self.host(host) / "log.jsonl"
        environment = {"OMP_NUM_THREADS": "1"}
        self.processes[host] = Process(host, self.network.within(host, argv), log, environment=environment)

    def stop(self) -> None:
        for process in reversed(list(self.processes.values())):
            process.terminate()
        for process in self.processes.values():
            process.stop()

    def knock(self, source: str) -> dict[str, str]:
        """What connecting to every part gives on one host."""
        targets = {host: (self.network.addresses[host], port) for host, port in PORTS.items() if host != source}
        return json.loads(run(self.network.within(source, [sys.executable, "-c", KNOCK, json.dumps(targets)])))

    def speak(self, ids: list[int], tokens: int) -> subprocess.Popen[str]:
        profile = self.host("client") / "etc/stip/profile.toml"
        argv = [sys.executable, str(SPEAKER), str(profile), json.dumps(ids), str(tokens)]
        return subprocess.Popen(self.network.within("client", argv), stdout=subprocess.PIPE, text=True)


def protect(rollout: Rollout) -> None:
    """Step 1."""
    run([str(BIN / "stip-keyservice"), "protect", str(MODEL), "--preset", "hardened", "--out", str(rollout.instance),
         "--home", str(rollout.home.path), "--quiet"])  # fmt: skip
    rollout.manifest = json.loads((rollout.instance / "manifest.json").read_text())


def key_service(rollout: Rollout) -> None:
    """Step 2."""
    policy = tomllib.loads(page.files()["policy.toml"])
    evidence = {
        "mode": "development",
        "measurements": [MEASUREMENT.hex()],
        "simulated_root_sha256": rollout.platform.root_sha256.hex(),
    }
    folder = rollout.host("keyservice") / "etc/stip"
    policy = {name: table for name, table in policy.items() if name != "instances"} | {"evidence": evidence}
    (folder / "policy.toml").write_text(tomli_w.dumps(policy))
    (folder / "simulated-root.der").write_bytes(rollout.platform.root_der)
    rollout.configure("keyservice", "keyservice.toml", simulated=True, simulated_root="simulated-root.der")
    user = keys.create(rollout.host("client") / "etc/stip/key.pem")
    rollout.keyservice("instances", "add", str(rollout.instance), "--shared")
    rollout.keyservice("users", "add", "alice", "--public-key", user.public.hex(), "--budget", "1000000",
                       "--instance", rollout.manifest["instance"])  # fmt: skip


def certificates(rollout: Rollout) -> Path:
    """Step 3: the page's own commands."""
    admin = rollout.host("admin")
    for words in page.commands():
        if words[:2] == ["stip-gateway", "tls"]:
            subprocess.run([str(BIN / words[0]), *words[1:]], cwd=admin, check=True, capture_output=True, timeout=60)
    return admin / "tls"


def configurations(rollout: Rollout, tls: Path) -> None:
    """The files of steps 4 to 7, where the page puts them."""
    public, instance = rollout.home.path, rollout.instance
    manifest = (instance / "manifest.json", instance / "manifest.json.sig")
    for name in REPLICAS:
        rollout.provide(name, "etc/stip", public / "developer.pub")
        rollout.provide(name, "etc/stip/tls", tls / f"{name}.pem", tls / "operator-ca.pem")
        rollout.provide(name, "srv/stip/instance", *manifest, instance / "server")
        credentials = rollout.host(name) / f"run/credentials/stip-server@{name}.service"
        credentials.mkdir(parents=True)
        (credentials / "replica.key").symlink_to(tls / f"{name}.key")
        rollout.configure(name, f"{name}.toml", simulated=True)
    rollout.provide("gateway", "etc/stip", public / "service.pub", public / "link-ca.pem")
    rollout.provide(
        "gateway", "etc/stip/tls", *(tls / f"{name}.pem" for name in ("gateway", "gateway-client", "operator-ca"))
    )
    rollout.provide("gateway", "run/credentials/stip-gateway.service", tls / "gateway.key", tls / "gateway-client.key")
    rollout.configure("gateway", "gateway.toml", simulated=True)
    rollout.provide("enclave", "etc/stip", public / "developer.pub", public / "service.pub", public / "tls-ca.pem",
                    tls / "operator-ca.pem")  # fmt: skip
    rollout.provide("enclave", "srv/stip/instance", *manifest, instance / "enclave")
    (rollout.host("enclave") / "etc/stip/collateral.json").write_bytes(rollout.platform.collateral(int(time.time())))
    rollout.configure("enclave", "enclave.toml", simulated=True)
    rollout.provide("client", "etc/stip", public / "developer.pub")
    rollout.provide("client", "etc/stip/instance", instance / "client")
    root = rollout.host("client") / "etc/stip/simulated-root.der"
    root.write_bytes(rollout.platform.root_der)
    rollout.configure("client", "profile.toml", mode="development", simulated_root=root.name)
    pinned = rollout.platform.root_sha256.hex()
    rollout.configure("client", "client-policy.toml", mode="development", simulated_root_sha256=pinned)


def start(rollout: Rollout) -> None:
    """Every part in its namespace, by its serve command, in the order of the page; evidence is simulated."""

    def config(host: str) -> str:
        return str(rollout.host(host) / "etc/stip" / f"{host}.toml")

    rollout.start("keyservice", [str(BIN / "stip-keyservice"), "serve", "--config", config("keyservice")])
    for name in REPLICAS:
        rollout.start(name, [str(BIN / "stip-server"), "serve", "--config", config(name)])
    rollout.start("gateway", [str(BIN / "stip-gateway"), "serve", "--config", config("gateway")])
    rollout.start("enclave", [
        sys.executable, "-m", "stip_stack.enclave_main", "--config", config("enclave"),
        "--insecure-simulated-tee", str(rollout.platform.directory), "--measurement", MEASUREMENT.hex(),
    ])  # fmt: skip
    for process in rollout.processes.values():
        process.wait_until_listening()


@pytest.fixture(scope="module")
def namespaces() -> None:
    """What namespaces take, installed where this is Debian's root; else a skip, which CI does not accept."""
    if missing() is not None and os.geteuid() == 0 and shutil.which("apt-get"):
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", "iproute2", "nftables"]):
            subprocess.run(["apt-get", "-qq", *arguments], capture_output=True, timeout=200, check=False)
    if (lacking := missing()) is not None:
        pytest.skip(f"the rollout over network namespaces was not tried: {lacking}")


@pytest.fixture(scope="module")
def rollout(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rollout]:
    with Network(page.addresses(), page.flows()) as network:
        made = Rollout(tmp_path_factory.mktemp("rollout"), network)
        protect(made)
        key_service(made)
        configurations(made, certificates(made))
        try:
            start(made)
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module")
def plain(rollout: Rollout) -> Any:
    from stip_stack.reference import PlainModel

    return PlainModel(MODEL)


def said(speaker: subprocess.Popen[str], count: int | None = None) -> list[Any]:
    """The next `count` lines of a client, or all to its end."""
    assert speaker.stdout is not None
    lines = speaker.stdout if count is None else (speaker.stdout.readline() for _ in range(count))
    return [json.loads(line) for line in lines]


def test_every_part_listens_on_the_address_that_the_page_gives_it(rollout: Rollout) -> None:
    for host, process in rollout.processes.items():
        assert process.address == f"{rollout.network.addresses[host]}:{PORTS[host]}"


def test_the_network_lets_through_the_flows_of_the_page_and_no_other(rollout: Rollout) -> None:
    allowed = {(flow.source, flow.target) for flow in page.flows()}
    assert {(flow.target, flow.port) for flow in page.flows()} <= set(PORTS.items())
    for source in rollout.network.addresses:
        for target, outcome in rollout.knock(source).items():
            assert (outcome == "open") == ((source, target) in allowed), f"{source} to {target}: {outcome}"


def test_every_part_becomes_ready_and_says_so_on_its_own_host(rollout: Rollout) -> None:
    """A gateway is once a replica has answered it, which it asks for every five seconds."""
    for host, process in rollout.processes.items():
        argv = [sys.executable, "-c", ASK, f"http://{process.metrics}{page.PROBE}"]
        deadline, said = time.monotonic() + READY_SECONDS, ""
        while said != "200" and time.monotonic() < deadline:
            said = run(rollout.network.within(host, argv)).strip()
        assert said == "200", f"{host}: {said}"


def test_the_client_verifies_the_enclave(rollout: Rollout) -> None:
    profile = rollout.host("client") / "etc/stip/profile.toml"
    run(rollout.network.within("client", [str(BIN / "stip"), "verify", "--profile", str(profile)]))


def test_a_client_that_expects_another_measurement_refuses(rollout: Rollout) -> None:
    folder = rollout.host("client") / "etc/stip"
    policy = (folder / "client-policy.toml").read_text().replace(MEASUREMENT.hex(), "ab" * 32)
    (folder / "other-policy.toml").write_text(policy)
    profile = (folder / "profile.toml").read_text().replace("client-policy.toml", "other-policy.toml")
    (folder / "other-profile.toml").write_text(profile)
    argv = [str(BIN / "stip"), "verify", "--profile", str(folder / "other-profile.toml")]
    done = subprocess.run(
        rollout.network.within("client", argv), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3, done.stderr


def test_an_answer_over_real_addresses_is_the_plain_models_and_goes_on_when_a_server_dies(
    rollout: Rollout, plain: Any
) -> None:
    """The last test: it kills a server. Two answers at once lie on a server each, so either loses one."""
    from stip_stack.trials import Job

    prompts, tokens = [[5, 17, 101, 9, 44], [7, 300, 12, 81, 3, 90]], 300
    speakers = [rollout.speak(prompt, tokens) for prompt in prompts]
    try:
        answers = [said(speaker, 10) for speaker in speakers]
        rollout.processes["replica-1"].kill()
        for prompt, speaker, heard in zip(prompts, speakers, answers, strict=True):
            *rest, last = said(speaker)
            assert last == {"finish": "LENGTH"}
            assert speaker.wait(30) == 0
            expected = plain.generate(prompt, Job([]).sampler(), max_tokens=tokens, stop_ids=frozenset())
            assert heard + rest == expected
        log = [json.loads(line) for line in rollout.processes["enclave"].log.read_text().splitlines()]
        assert {"replica-1"} == {entry["replica"] for entry in log if entry["event"] == "seat lost"}
        assert {"replica-2"} == {entry["replica"] for entry in log if entry["event"] == "session goes on"}
    finally:
        for speaker in speakers:
            speaker.kill()
            speaker.wait()
            assert speaker.stdout is not None
            speaker.stdout.close()
