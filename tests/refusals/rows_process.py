"""Commands and processes: simulated evidence in production under any environment, and policies that do not load."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import tomli_w
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_keyservice.cli import main
from stip_keyservice.home import Home
from stip_keyservice.service.config import KeyServiceSettings
from stip_keyservice.service.policy.reloading import PolicyLoader
from stip_keyservice.service.state.store import Store
from stip_protocol import rpc
from stip_protocol.errors import StipError, from_code
from stip_protocol.runtime.config import load
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc
from stip_stack.tee import SimulatedPlatform
from tests.keyservice.conftest import MEASUREMENT, Enclave, Person
from tests.refusals.table import Act, Case, Section

CONFIGURATION, POLICY, SIGNATURE = "configuration_invalid", "policy_invalid", "signature_invalid"
SIMULATED = "simulated_evidence_refused"
BIN = Path(sys.executable).parent
SECONDS = 60
Tables = dict[str, Any]
Edit = Callable[[Tables], object]


def production() -> Tables:
    """A policy for production, as its file says it."""
    return {
        "serial": 5,
        "evidence": {"mode": "production", "measurements": [MEASUREMENT.hex()]},
        "instances": [{"manifest": "ab" * 32}],
    }


@dataclass
class ProcessScene:
    """A folder with a home, a signed policy for production, and the configuration that belongs to it."""

    folder: Path
    platform: SimulatedPlatform
    client: Callable[[], Path]
    """The profile of a user in production mode, for a simulated enclave that runs."""
    settings: Tables = field(default_factory=dict)
    metrics: str = ""
    """Of a process that was asked."""

    def __post_init__(self) -> None:
        (self.folder / "root.der").write_bytes(self.platform.root_der)
        self.home = Home.open(self.folder / "home")
        self.settings = {"home": "home", "policy": "policy.toml", "serving": {"metrics_snapshot_seconds": 0}}
        self.write(production())
        self.sign()

    @property
    def policy(self) -> Path:
        return self.folder / "policy.toml"

    def write(self, tables: Tables) -> None:
        self.policy.write_text(tomli_w.dumps(tables))

    def command(self, *arguments: str, home: bool = True) -> None:
        """Run `stip-keyservice` in this process. Raises what it was refused with."""
        whose = ["--home", str(self.home.path)] if home else []
        done = CliRunner().invoke(main, [*arguments, *whose, "--json"])
        if done.exit_code:
            refused = json.loads(done.stdout)["error"]
            raise from_code(refused["code"], refused["message"])

    def sign(self) -> None:
        self.command("policy", "sign", str(self.policy))

    @contextmanager
    def serving(self, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """A key service as a process: what it announces. Raises what it refuses to start for."""
        config = self.folder / "keyservice.toml"
        config.write_text(tomli_w.dumps(self.settings))
        process = subprocess.Popen(
            [BIN / "stip-keyservice", "serve", "--config", str(config)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            announced = process.stdout.readline()
            if not announced:
                _, told = process.communicate(timeout=SECONDS)
                assert process.returncode in (1, 2), told
                raise named(told)
            yield json.loads(announced)
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=SECONDS)

    def load(self) -> None:
        """What a key service does with policy and configuration before it serves, in this process."""
        config = self.folder / "keyservice.toml"
        config.write_text(tomli_w.dumps(self.settings))
        settings = load(KeyServiceSettings, config)
        with closing(Store(self.home.database)) as store:
            PolicyLoader(settings, self.home, store, Telemetry("keyservice", simulated=False)).load()

    def verify(self, environment: Mapping[str, str]) -> None:
        """Run `stip verify` as a user. Raises what the enclave is refused with."""
        done = subprocess.run(
            [BIN / "stip", "verify", "--profile", self.client(), "--json"],
            capture_output=True, text=True, timeout=SECONDS, env=os.environ | environment,
        )  # fmt: skip
        document = json.loads(done.stdout)
        assert done.returncode == 3, done.stderr
        assert not document["verified"]
        raise from_code(document["refusal"]["code"], document["refusal"]["message"])

    def root(self) -> str:
        return str(self.folder / "root.der")


def named(told: str) -> StipError:
    """The refusal in a command's last line: "stip-keyservice: message [code] (action)"."""
    line = told.strip().splitlines()[-1]
    message, _, rest = line.rpartition(" [")
    return from_code(rest.partition("]")[0], message)


def everywhere(*names: str, value: str) -> dict[str, str]:
    return {prefix + name: value for name in names for prefix in ("", "STIP_", "STIP_KEYSERVICE_", "STIP_CLIENT_")}


FAMILIES: dict[str, Callable[[str], dict[str, str]]] = {
    "RA_TLS_": lambda root: {
        **dict.fromkeys(("RA_TLS_MRENCLAVE", "RA_TLS_MRSIGNER", "RA_TLS_ISV_PROD_ID", "RA_TLS_ISV_SVN"), "any"),
        **dict.fromkeys(
            (
                "RA_TLS_ALLOW_OUTDATED_TCB_INSECURE", "RA_TLS_ALLOW_HW_CONFIG_NEEDED",
                "RA_TLS_ALLOW_SW_HARDENING_NEEDED", "RA_TLS_ALLOW_DEBUG_ENCLAVE_INSECURE",
            ),
            "1",
        ),
        "RA_TLS_ROOT": root, "SGX_MODE": "SIM", "SGX_DEBUG": "1", "SGX_AESM_ADDR": "1",
    },
    "STIP_": lambda root: {
        **everywhere("SIMULATED_ROOT", "ROOT", "TRUST_ANCHOR", value=root),
        **everywhere("MODE", "EVIDENCE_MODE", "EVIDENCE__MODE", "PROFILE_MODE", value="development"),
        **everywhere("SIMULATED", "SIMULATION", "DEVELOPMENT", "DEV", "DEBUG", "INSECURE", "TEST", "CI", value="true"),
        **everywhere("SKIP_VERIFY", "NO_VERIFY", "ALLOW_SIMULATED", "ALLOW_DEBUG", "ALLOW_UNSIGNED", value="1"),
    },
    "SSL_": lambda root: {
        **dict.fromkeys(
            (
                "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
                "NODE_EXTRA_CA_CERTS",
            ),
            root,
        ),
        "SSL_CERT_DIR": str(Path(root).parent), "PYTHONHTTPSVERIFY": "0", "GRPC_SSL_TARGET_NAME_OVERRIDE": "any",
        "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9",
    },
    "QCNL_": lambda root: {
        "QCNL_CONF_PATH": root, "QCNL_USE_SECURE_CERT": "false", "PCCS_URL": "http://127.0.0.1:9/sgx/certification/v4/",
        "SGX_QCNL_CONF": root, "DCAP_ROOT_CA": root, "DCAP_QVL_ROOT": root, "PCCS_API_KEY": "any",
        "AZDCAP_BASE_CERT_URL": "http://127.0.0.1:9", "AZDCAP_DEBUG_LOG_LEVEL": "INFO",
    },
    "PYTHON": lambda root: {
        "PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "ignore", "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1", "PYTHONNODEBUGRANGES": "1", "PYTHONFAULTHANDLER": "1",
        "TZ": "Pacific/Kiritimati", "SOURCE_DATE_EPOCH": "0", "FAKETIME": "-10y",
    },
}  # fmt: skip
"""Environments by their prefix, each with everything in it that somebody might hope for. `PYTHONOPTIMIZE` strips every
assertion: none of them may be what refuses."""


def at_the_service(family: str) -> Case:
    async def arrange(scene: ProcessScene) -> Act:
        async def released() -> None:
            with scene.serving(FAMILIES[family](scene.root())) as announced:
                try:
                    await ask(scene, announced)
                finally:
                    scene.metrics = counted(announced)

        return released

    return Case(
        f"simulated evidence at a key service in production under {family}* variables",
        "the environment of `stip-keyservice serve`", SIMULATED, arrange,
    )  # fmt: skip


def counted(announced: Mapping[str, str]) -> str:
    """The metrics of a process, as a scraper reads them."""
    with urllib.request.urlopen(f"http://{announced['metrics']}/metrics", timeout=SECONDS) as reply:
        return str(reply.read().decode())


async def ask(scene: ProcessScene, announced: Mapping[str, str]) -> None:
    """A release by a simulated enclave in which everything else is in order."""
    async with rpc.channel(
        announced["address"], roots=scene.home.tls_ca.pem, server_name="localhost"
    ) as channel:  # fmt: skip
        stub = keyservice_pb2_grpc.KeyServiceStub(channel)
        enclave, instance = Enclave(scene.platform), secrets.token_hex(16)
        word = Person("alice").delegate(enclave, instance, expires=int(time.time()) + 600)
        challenge = await stub.Challenge(keyservice_pb2.ChallengeRequest())
        try:
            await stub.Release(enclave.request(enclave.claims(challenge, word, instance), word))
        except grpc.aio.AioRpcError as error:
            raise rpc.from_rpc(error) from None


def at_the_client(family: str) -> Case:
    async def arrange(scene: ProcessScene) -> Act:
        async def verified() -> None:
            scene.verify(FAMILIES[family](scene.root()))

        return verified

    return Case(
        f"a simulated enclave before `stip verify` in production under {family}* variables",
        "the environment of `stip verify`", SIMULATED, arrange, event=None,
    )  # fmt: skip


ENVIRONMENTS = Section(
    "Simulation in production",
    "A real process of the key service and the real client command, under every variable that somebody might hope "
    "for: what evidence is believed stands in signed and configured files alone.",
    "process",
    (*(at_the_service(family) for family in FAMILIES), *(at_the_client(family) for family in FAMILIES)),
)


def checked(name: str, told: str, edit: Edit, code: str = POLICY) -> Case:
    """A policy file that `stip-keyservice policy check` refuses."""

    async def arrange(scene: ProcessScene) -> Act:
        tables = production()
        edit(tables)
        scene.write(tables)

        async def check() -> None:
            scene.command("policy", "check", str(scene.policy), home=False)

        return check

    return Case(name, told, code, arrange, event=None)


def evidence(**rules: Any) -> Edit:
    return lambda tables: tables["evidence"].update(rules)


def signers(**rule: Any) -> Edit:
    return evidence(signers=[{"mrsigner": "ab" * 32} | rule])


FILES = Section(
    "Policy files",
    "A policy that leaves something open, contradicts itself or has a rule that nobody knows does not load.",
    "process",
    (
        checked("a policy without [evidence]", "`[evidence]`", lambda tables: tables.pop("evidence")),
        checked("a policy that accepts no enclave", "`measurements`", evidence(measurements=[])),
        checked("a policy with a rule that nobody knows", "`allow_debug`", evidence(allow_debug=True)),
        checked("a policy with a table that nobody knows", "`[override]`", lambda tables: tables.update(override={})),
        checked("a policy with a signer without product and SVN", "`signers`", signers()),
        checked("a policy with a signer without product", "`isv_prod_id`", signers(minimum_isv_svn=1)),
        checked("a policy with a signer without minimum SVN", "`minimum_isv_svn`", signers(isv_prod_id=1)),
        checked("a policy with a measurement of 31 bytes", "`measurements`", evidence(measurements=["ab" * 31])),
        checked("a policy that accepts a revoked TCB", "`accepted_statuses`",
                evidence(accepted_statuses=[{"status": "Revoked"}])),
        checked("a policy that accepts no TCB status", "`accepted_statuses`", evidence(accepted_statuses=[])),
        checked("a policy that names a status twice", "`accepted_statuses`",
                evidence(accepted_statuses=[{"status": "UpToDate"}, {"status": "UpToDate"}])),
        checked("a policy that enrols no platform", "`platforms`", evidence(platforms=[])),
        checked("a policy for production that pins a simulated root", "`simulated_root_sha256`",
                evidence(simulated_root_sha256="ab" * 32)),
        checked("a policy of a mode that does not exist", "`mode`", evidence(mode="staging")),
        checked("a policy for production without a serial", "`serial`", lambda tables: tables.pop("serial")),
        checked("a policy for production that lists no instance", "`[[instances]]`",
                lambda tables: tables.pop("instances")),
        checked("a policy that would never revoke", "`heartbeat_tokens`, more than a lease has",
                lambda tables: tables.update(lease={"tokens": 10, "heartbeat_tokens": 11})),
        checked("a policy of another major version", "`version`", lambda tables: tables.update(version=[2, 0]),
                "version_unsupported"),
    ),
)  # fmt: skip


def started(name: str, told: str, code: str, prepare: Callable[[ProcessScene], object]) -> Case:
    """A key service that refuses to start."""

    async def arrange(scene: ProcessScene) -> Act:
        prepare(scene)

        async def start() -> None:
            scene.load()

        return start

    return Case(name, told, code, arrange, event="policy_loaded")


async def really_started(scene: ProcessScene) -> Act:
    unsigned(scene)

    async def start() -> None:
        with scene.serving({}):
            raise AssertionError("it serves")

    return start


def unsigned(scene: ProcessScene) -> None:
    (scene.folder / "policy.toml.sig").unlink()


def taken_away(scene: ProcessScene) -> None:
    scene.load()
    unsigned(scene)


def edited(scene: ProcessScene) -> None:
    scene.policy.write_text(scene.policy.read_text().replace(MEASUREMENT.hex(), "ab" * 32))


def anothers(scene: ProcessScene) -> None:
    key = Person("mallory").key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (scene.folder / "policy.pub").write_bytes(key)
    scene.settings["policy_key"] = "policy.pub"


def rolled_back(scene: ProcessScene) -> None:
    """The signed policy of serial 5 was in force; the one of serial 4, as signed as it was, is put back."""
    scene.load()
    changed(scene, 4)


def same_serial(scene: ProcessScene) -> None:
    scene.load()
    changed(scene, 5)


def changed(scene: ProcessScene, serial: int) -> None:
    (scene.folder / "policy.toml.sig").unlink()
    scene.write(production() | {"serial": serial, "lease": {"seconds": 901}})
    scene.sign()


def half_simulated(scene: ProcessScene) -> None:
    scene.settings |= {"simulated": True, "simulated_root": "root.der"}


def only_a_root(scene: ProcessScene) -> None:
    scene.settings["simulated_root"] = "root.der"


def development(scene: ProcessScene) -> None:
    """A policy for development, signed, where the configuration says nothing of simulation."""
    (scene.folder / "policy.toml.sig").unlink()
    rules = {"mode": "development", "simulated_root_sha256": scene.platform.root_sha256.hex()}
    scene.write({"serial": 6, "evidence": {"measurements": [MEASUREMENT.hex()]} | rules})
    scene.sign()


STARTS = Section(
    "Policies in force",
    "What a key service refuses to start under: an unsigned policy, one that was changed or put back, and anything "
    "about simulation that policy and configuration do not both say.",
    "process",
    (
        Case("`stip-keyservice serve` with an unsigned policy for production", "the signature, left out", POLICY,
             really_started, event="policy_loaded"),
        started("a policy whose signature was taken away", "the signature, after it was in force", POLICY, taken_away),
        started("a key service with a policy edited after signing", "a measurement", SIGNATURE, edited),
        started("a key service with a policy signed by another key", "`policy_key`", SIGNATURE, anothers),
        started("a key service with an older policy put back", "`serial`: 4 after 5", POLICY, rolled_back),
        started("a key service with another policy of the same serial", "the policy, signed again", POLICY,
                same_serial),
        started("a key service told to simulate under a policy for production", "`simulated`", CONFIGURATION,
                half_simulated),
        started("a key service with a simulated root under a policy for production", "`simulated_root`",
                CONFIGURATION, only_a_root),
        started("a key service with a policy for development that was not told to simulate", "the policy",
                CONFIGURATION, development),
    ),
)  # fmt: skip
