"""The command line and the service as real processes, sharing one home."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_keyservice.cli import COMMANDS, main
from stip_keyservice.home import Home
from stip_protocol import rpc
from stip_protocol.keys.stream import derive
from stip_protocol.release import Bundle, Claims, Grant, unseal
from stip_protocol.secrets_file import PART_LABEL
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc
from stip_stack.tee import SimulatedPlatform

from .conftest import MEASUREMENT, Enclave, Person, make_instance, refusal
from .place import Place, run


class LiveEnclave(Enclave):
    """An enclave by the machine's clock."""

    def __init__(self, platform: SimulatedPlatform) -> None:
        super().__init__(platform)
        self.provider = platform.provider(self.measurement)


@asynccontextmanager
async def connected(announced: dict[str, str], home: Home) -> AsyncIterator[Any]:
    async with rpc.channel(announced["address"], roots=home.tls_ca.pem, server_name="localhost") as channel:
        yield keyservice_pb2_grpc.KeyServiceStub(channel)


def scrape(announced: dict[str, str]) -> bytes:
    with urllib.request.urlopen(f"http://{announced['metrics']}/metrics", timeout=10) as reply:
        return bytes(reply.read())


async def ask(stub: Any, home: Home, person: Person, enclave: Enclave, instance: str) -> Bundle | Grant:
    delegation = person.delegate(enclave, instance, expires=int(time.time()) + 600)
    claims: Claims = enclave.claims(await stub.Challenge(keyservice_pb2.ChallengeRequest()), delegation, instance)
    reply = await stub.Release(enclave.request(claims, delegation))
    return unseal(reply.sealed, reply.signature, claims.to_bytes(), enclave.hpke, home.service.public_key())


async def test_from_an_empty_folder_to_a_revoked_user(place: Place) -> None:
    keys = place.call_here("keys", "show")
    home = Home.open(place.home)
    assert keys["link_ca"] == str(home.path / "link-ca.pem")
    made = make_instance(place.folder / "instance", home)
    alice = Person("alice")
    pem = alice.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (place.folder / "alice.pub").write_bytes(pem)

    added = place.call("users", "add", "alice", "--public-key", str(place.folder / "alice.pub"), "--budget", "1500")
    assert added["devices"] == {"first": alice.public.hex()}
    instance = place.call("instances", "add", str(made.directory), "--dedicated-to", "alice")
    assert (instance["id"], instance["kind"], instance["members"]) == (made.id, "dedicated", [added["id"]])

    with place.service() as (announced, log):
        async with connected(announced, home) as stub:
            enclave = LiveEnclave(place.platform)
            bundle = await ask(stub, home, alice, enclave, made.id)
            assert isinstance(bundle, Bundle)
            assert Grant.from_bytes(bundle.grant or b"").part_key == derive(made.root, PART_LABEL)
            # the command line works beside the running service, on the same database
            (listed,) = place.call_here("users", "list")
            assert (listed["spent"], listed["instances"]) == (100, [made.id])
            head = place.folder / "head"
            place.call_here("audit-log", "head", "--out", str(head))
            assert place.call("users", "remove", "alice")["removed_at"] is not None
            assert await refusal(ask(stub, home, alice, enclave, made.id)) == "user_refused"
            metrics = (await asyncio.to_thread(scrape, announced)).decode()
            assert 'stip_releases_total{kind="bundle"} 1.0' in metrics
            assert 'stip_refusals_total{code="user_refused"} 1.0' in metrics
            assert "stip_simulation 1.0" in metrics
            assert added["id"] not in metrics
    events = [(entry["event"], entry["code"]) for entry in place.call_here("audit-log", "list")]
    assert events == [
        ("user_added", "granted"),
        ("instance_added", "granted"),
        ("policy_loaded", "granted"),
        ("release", "granted"),
        ("user_removed", "granted"),
        ("release", "user_refused"),
    ]
    assert place.call("audit-log", "verify", "--head", str(head))["entries"] == 6
    lines = [json.loads(line) for line in log]
    assert all(line["simulated"] is True and line["part"] == "keyservice" for line in lines)
    assert any("nothing is protected" in line["event"] for line in lines)

    with place.service() as (announced, _):  # a restart forgets nothing
        async with connected(announced, home) as stub:
            assert await refusal(ask(stub, home, alice, LiveEnclave(place.platform), made.id)) == "user_refused"


async def test_no_secret_lands_in_logs_metrics_or_the_database(place: Place) -> None:
    home = Home.open(place.home)
    made = make_instance(place.folder / "instance", home, preset="paper")
    alice = Person("alice")
    place.call("users", "add", "alice", "--public-key", alice.public.hex(), "--budget", "1500")
    place.call("instances", "add", str(made.directory), "--dedicated-to", "alice")
    with place.service() as (announced, log):
        async with connected(announced, home) as stub:
            enclave = LiveEnclave(place.platform)
            bundle = await ask(stub, home, alice, enclave, made.id)
            for bad in (Person("eve"), alice):
                other = "0" * 32 if bad is alice else made.id
                with pytest.raises(grpc.aio.AioRpcError):
                    await ask(stub, home, bad, enclave, other)
            metrics = await asyncio.to_thread(scrape, announced)
            database = b"".join(path.read_bytes() for path in place.home.glob("state.db*"))
    assert isinstance(bundle, Bundle)
    grant = Grant.from_bytes(bundle.grant or b"")
    assert grant.vocabulary_seed is not None
    planted = (
        made.root,
        grant.part_key,
        grant.vocabulary_seed,
        home.root.material(),
        bundle.user_key,
        bundle.cache_salt,
        home.service.private_bytes_raw(),
    )
    places = {"logs": "\n".join(log).encode(), "metrics": metrics, "database": database}
    assert found(planted, places) == []
    assert alice.public in database
    # the sweep itself finds a leak, in every form it looks for
    for form in forms(made.root):
        assert found(planted, places | {"logs": b"oops " + form}) == ["logs"]


def forms(secret: bytes) -> list[bytes]:
    return [secret, secret.hex().encode(), base64.b64encode(secret).rstrip(b"="), repr(secret)[2:-1].encode()]


def found(planted: tuple[bytes, ...], places: dict[str, bytes]) -> list[str]:
    return [name for name, data in places.items() if any(form in data for one in planted for form in forms(one))]


def test_the_shared_instance_and_the_budget_by_hand(place: Place) -> None:
    made = make_instance(place.folder / "instance", Home.open(place.home))
    place.call_here("instances", "add", str(made.directory), "--shared")
    alice, bob = Person("alice"), Person("bob")
    added = place.call_here(
        "users", "add", "alice", "--public-key", alice.public.hex(), "--budget", "10", "--instance", made.id
    )
    assert added["instances"] == [made.id]
    place.call_here("users", "add", "bob", "--public-key", bob.public.hex(), "--budget", "10")
    assert place.call_here("users", "allow", "bob", made.id)["instances"] == [made.id]
    assert place.call_here("users", "budget", "bob", "500")["budget"] == 500
    (instance,) = place.call_here("instances", "list")
    assert len(instance["members"]) == 2
    assert place.call_here("instances", "remove", made.id)["removed"]
    assert place.call_here("instances", "list") == []
    assert place.call_here("audit-log", "verify")["entries"] == 6


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code"),
    [
        (["users", "add", "alice", "--public-key", "00" * 32, "--budget", "1"], 1, "user_refused"),
        (["users", "add", "bob", "--public-key", "ab" * 32, "--budget", "1"], 1, "user_refused"),
        (["users", "add", "bob", "--public-key", "short", "--budget", "1"], 2, "configuration_invalid"),
        (["users", "add", "bo b", "--public-key", "00" * 32, "--budget", "1"], 2, "configuration_invalid"),
        (["users", "add", "bob", "--public-key", "00" * 32, "--budget", "-1"], 2, "configuration_invalid"),
        (
            ["users", "add", "bob", "--public-key", "00" * 32, "--budget", "1", "--instance", "0" * 32],
            1,
            "instance_refused",
        ),
        (["users", "remove", "bob"], 1, "user_refused"),
        (["users", "allow", "alice", "0" * 32], 1, "instance_refused"),
        (["users", "budget", "alice", "9999999999999"], 2, "configuration_invalid"),
        (["instances", "remove", "0" * 32], 1, "instance_refused"),
        (["instances", "add", ".", "--shared"], 1, "manifest_mismatch"),
    ],
)
def test_a_refused_command_says_its_code_and_changes_nothing(
    place: Place, arguments: list[str], exit_code: int, code: str
) -> None:
    place.call_here("users", "add", "alice", "--public-key", "ab" * 32, "--budget", "1")
    before = place.call_here("users", "list")
    assert place.call_here(*arguments, code=exit_code)["error"]["code"] == code
    assert place.call_here("users", "list") == before


def test_a_broken_log_is_exit_code_one_and_a_mistyped_home_is_no_empty_log(place: Place) -> None:
    place.call_here("users", "add", "alice", "--public-key", "ab" * 32, "--budget", "1")
    with sqlite3.connect(place.home / "state.db") as db:
        db.execute("DELETE FROM audit")
    db.close()
    assert place.call_here("audit-log", "verify", code=1)["error"]["code"] == "integrity_violated"
    elsewhere = Place(place.folder / "elsewhere", place.platform)
    assert elsewhere.call_here("audit-log", "verify", code=2)["error"]["code"] == "configuration_invalid"
    assert not elsewhere.home.exists()


def test_policy_check_says_what_a_policy_accepts_and_refuses_a_bad_one(place: Place) -> None:
    good = run("policy", "check", str(place.folder / "policy.toml"), "--json")
    assert good.returncode == 0
    document = json.loads(good.stdout)
    assert (document["mode"], document["simulated"]) == ("development", True)
    assert document["measurements"] == [MEASUREMENT.hex()]
    table = run("policy", "check", str(place.folder / "policy.toml"), COLUMNS="200")
    assert MEASUREMENT.hex() in table.stdout
    (place.folder / "bad.toml").write_text("[evidence]\nmode = 'production'\n")
    bad = run("policy", "check", str(place.folder / "bad.toml"))
    assert bad.returncode == 2
    assert "policy_invalid" in bad.stderr


@pytest.mark.parametrize(
    "edit",
    [
        ("simulated = true", "simulated = false"),
        ("simulated = true", ""),
        ('simulated_root = "root.der"', ""),
        ('policy = "policy.toml"', 'policy = "none.toml"'),
        ('policy = "policy.toml"', 'policy = "policy.toml"\ntypo = 1'),
    ],
)
def test_serve_exits_two_on_a_configuration_that_cannot_be_meant(place: Place, edit: tuple[str, str]) -> None:
    place.config.write_text(place.config.read_text().replace(*edit))
    done = run("serve", "--config", str(place.config), STIP_SIMULATED="1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "stip-keyservice:" in done.stderr


def test_the_service_and_its_help_load_no_torch(place: Place) -> None:
    program = """
import sys
from click.testing import CliRunner
from stip_keyservice.cli import COMMANDS, main
assert CliRunner().invoke(main, ["--help"]).exit_code == 0
for name, lazy in COMMANDS.items():
    if name not in ("protect", "verify-equivalence", "audit", "leakage-report"):
        lazy.load()
offline = ("torch", "transformers", "stip_keyservice.protect", "stip_keyservice.audit")
print([name for name in offline if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_explains_itself(command: str) -> None:
    done = CliRunner().invoke(main, [command, "--help"], prog_name="stip-keyservice")
    assert done.exit_code == 0
    assert "Usage: stip-keyservice " + command in done.stdout
