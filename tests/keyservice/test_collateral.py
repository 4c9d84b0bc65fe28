"""The key service's own collateral, and the commands about collateral and evidence."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_keyservice.home import Home
from stip_protocol import rpc
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc
from stip_stack.pccs import Answer, StandIn, serve
from stip_stack.tee import Faults, SimulatedPlatform

from .conftest import MEASUREMENT, Enclave, Person, make_instance, refusal
from .place import Place, run, told_here

SGX = PlatformKind("sgx", b"STIPSM", "platform")
TDX = PlatformKind("tdx", b"STIPSM", "platform")
DAY = 24 * 3600


@pytest.fixture
def pccs(place: Place) -> Iterator[StandIn]:
    now = int(time.time())
    issued = {SGX: place.platform.collateral(now - 60), TDX: place.platform.collateral(now - 60, tee="TDX")}
    with serve(StandIn(issued)) as served:
        yield served


@pytest.fixture
def configured(place: Place, pccs: StandIn) -> Place:
    """A service with `[collateral]` from a stand-in."""
    limits = "retry_minutes = 0.001\nfetch_seconds = 1\n"
    table = f'[collateral]\ncache = "collateral"\n{limits}[[collateral.endpoints]]\nurl = "{pccs.url}"\n'
    place.config.write_text(place.config.read_text() + table)
    return place


class Live(Enclave):
    """An enclave by the machine's clock, whose host sends the collateral it likes."""

    def __init__(self, platform: SimulatedPlatform, sent: bytes | None = None) -> None:
        super().__init__(platform)
        self.provider = platform.provider(self.measurement)
        self._sent = sent

    def request(self, *arguments: Any, **options: Any) -> keyservice_pb2.ReleaseRequest:
        made = super().request(*arguments, **options)
        if self._sent is not None:
            made.collateral = self._sent
        return made


def scrape(announced: dict[str, str]) -> bytes:
    with urllib.request.urlopen(f"http://{announced['metrics']}/metrics", timeout=10) as reply:
        return bytes(reply.read())


async def ask(stub: Any, person: Person, enclave: Enclave, instance: str) -> bytes:
    delegation = person.delegate(enclave, instance, expires=int(time.time()) + 600)
    claims = enclave.claims(await stub.Challenge(keyservice_pb2.ChallengeRequest()), delegation, instance)
    return bytes((await stub.Release(enclave.request(claims, delegation))).sealed)


async def test_evidence_is_judged_with_the_services_collateral_and_not_with_the_hosts(
    configured: Place, pccs: StandIn
) -> None:
    place, now = configured, int(time.time())
    home = Home.open(place.home)
    made = make_instance(place.folder / "instance", home)
    alice = Person("alice")
    pem = alice.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (place.folder / "alice.pub").write_bytes(pem)
    place.call_here("users", "add", "alice", "--public-key", str(place.folder / "alice.pub"), "--budget", "15000")
    place.call_here("instances", "add", str(made.directory), "--dedicated-to", "alice")
    expired = place.platform.collateral(now - 40 * DAY)
    with place.service() as (announced, _):
        async with rpc.channel(announced["address"], roots=home.tls_ca.pem, server_name="localhost") as channel:
            stub = keyservice_pb2_grpc.KeyServiceStub(channel)
            pccs.fault = lambda _, answer: Answer(status=404)
            assert await refusal(ask(stub, alice, Live(place.platform), made.id)) == "collateral_unavailable"
            pccs.fault = lambda _, answer: answer
            await asyncio.sleep(0.1)  # the pause after a failure, a tenth of a second here
            # whatever the host sends along: its age and its form do not matter
            for sent in (None, expired, b"{}"):
                assert await ask(stub, alice, Live(place.platform, sent), made.id)
            metrics = (await asyncio.to_thread(scrape, announced)).decode()
            (age,) = re.findall(r"^stip_collateral_age_seconds ([0-9.]+)$", metrics, re.MULTILINE)
            assert 60 <= float(age) < 3600
            assert 'stip_refusals_total{code="collateral_unavailable"} 1.0' in metrics
            # and a newer word of Intel's reaches a host that keeps sending the old one
            revoked = place.platform.collateral(now - 30, faults=Faults(pck_revoked=True))
            pccs.collateral = {SGX: revoked}
            await asyncio.to_thread(place_fetch, place)
            good = place.platform.collateral(now - 60)
            assert await refusal(ask(stub, alice, Live(place.platform, good), made.id)) == "evidence_refused"
            # a quote of another root makes the service fetch nothing
            asked = len(pccs.asked)
            other = SimulatedPlatform.create(place.folder / "other")
            assert await refusal(ask(stub, alice, Live(other), made.id)) == "evidence_refused"
            assert len(pccs.asked) == asked
    codes = [(entry["event"], entry["code"]) for entry in place.call_here("audit-log", "list")]
    assert ("release", "collateral_unavailable") in codes


def place_fetch(place: Place) -> None:
    done = run("collateral", "fetch", "--config", str(place.config), "--platform", str(SGX), "--json")
    assert done.returncode == 0, done.stdout + done.stderr


def test_collateral_is_fetched_shown_carried_and_imported_by_hand(configured: Place, pccs: StandIn) -> None:
    place = configured
    quote = place.folder / "quote"
    quote.write_bytes(place.platform.provider(MEASUREMENT).quote(bytes(64)) + bytes(50))
    config = ("--config", str(place.config))
    fetched = told_here("collateral", "fetch", "--quote", str(quote), "--platform", str(TDX), *config, "--json")
    documents = json.loads(fetched.stdout)
    assert [one["platform"] for one in documents] == [str(SGX), str(TDX)]
    assert documents[0]["tcb_evaluation_number"] == 17
    assert documents[0]["issued"] < documents[0]["refresh_due"] < documents[0]["expires"]
    shown = told_here("collateral", "show", *config).stdout
    assert all(word in shown for word in (str(SGX), str(TDX), "TCB evaluation", "refresh due"))

    bundle = place.folder / "bundle.json"
    assert told_here("collateral", "bundle", str(bundle), *config).exit_code == 0
    offline = place.folder / "offline.toml"
    offline.write_text(
        'policy = "policy.toml"\nsimulated_root = "root.der"\nsimulated = true\n[collateral]\ncache = "carried"\n'
    )
    there = ("--config", str(offline))
    assert "No collateral is kept" in told_here("collateral", "show", *there).stdout
    imported = told_here("collateral", "import", str(bundle), *there, "--json")
    assert [one["platform"] for one in json.loads(imported.stdout)] == [str(SGX), str(TDX)]
    refused = told_here("collateral", "fetch", *there)
    assert (refused.exit_code, "offline" in refused.stderr) == (1, True)

    pccs.fault = lambda _, answer: Answer(status=500)
    other = PlatformKind("sgx", b"OTHERS", "processor")
    unknown = told_here("collateral", "fetch", "--platform", str(other), *config)
    assert (unknown.exit_code, "collateral_unavailable" in unknown.stderr) == (1, True)


def test_a_bundle_that_is_not_in_order_is_refused_whole(configured: Place) -> None:
    place, config = configured, ("--config", str(configured.config))
    for number, content in enumerate((b"", b"{}", place.platform.collateral(int(time.time()) - 40 * DAY))):
        path = place.folder / f"{number}.json"
        path.write_bytes(content)
        assert told_here("collateral", "import", str(path), *config).exit_code in (1, 2)
    assert "No collateral is kept" in told_here("collateral", "show", *config).stdout


def test_serve_starts_with_no_bundle_of_another_root_and_no_more_waiters_than_threads(
    configured: Place, tmp_path: Path
) -> None:
    place, text = configured, configured.config.read_text()
    foreign = SimulatedPlatform.create(tmp_path / "other").collateral(int(time.time()))
    (place.folder / "foreign.json").write_bytes(foreign)
    for changed, told in (
        (text.replace("[collateral]", '[collateral]\nbundle = "foreign.json"'), "collateral.bundle"),
        (text.replace("[collateral]", "[collateral]\nwaiters = 4"), "collateral.waiters"),
    ):
        place.config.write_text(changed)
        done = run("serve", "--config", str(place.config))
        assert (done.returncode, done.stdout, told in done.stderr) == (2, "", True), done.stderr


def test_commands_without_the_table_say_what_to_write(place: Place) -> None:
    told = told_here("collateral", "show", "--config", str(place.config))
    assert (told.exit_code, "[collateral]" in told.stderr) == (2, True)


HOST_POLICY = """
mode = "development"
measurements = ["{mrtd}"]
simulated_root_sha256 = "{root}"
"""


@pytest.fixture
def quotes(place: Place) -> dict[str, Path]:
    """Quotes, collateral and policies as files."""
    now, platform = int(time.time()), place.platform
    contents = {
        "sgx": platform.provider(MEASUREMENT).quote(bytes(64)),
        "sgx.json": platform.collateral(now - 60),
        "tdx": platform.host_quote(bytes(48), bytes(64)) + bytes(70),
        "tdx.json": platform.collateral(now - 60, tee="TDX"),
        "host.toml": HOST_POLICY.format(mrtd=bytes(48).hex(), root=platform.root_sha256.hex()).encode(),
    }
    for name, content in contents.items():
        (place.folder / name).write_bytes(content)
    paths = {name: place.folder / name for name in contents}
    return paths | {"policy": place.folder / "policy.toml", "root": place.folder / "root.der"}


@pytest.mark.parametrize(("tee", "policy"), [("sgx", "policy"), ("tdx", "host.toml")])
def test_evidence_is_examined_step_by_step(quotes: dict[str, Path], tee: str, policy: str) -> None:
    given = (str(quotes[tee]), "--policy", str(quotes[policy]), "--collateral", str(quotes[f"{tee}.json"]))
    unsaid = told_here("evidence", "examine", *given)
    assert (unsaid.exit_code, "what the quote must vouch for" in unsaid.stderr) == (2, True)
    verified = told_here("evidence", "examine", *given, "--report-data", "any")
    assert verified.exit_code == 0, verified.output
    assert "compared with nothing" in verified.stderr
    unbound = json.loads(told_here("evidence", "examine", *given, "--report-data", "any", "--json").stdout)
    steps = {step["name"]: step["status"] for step in unbound["steps"]}
    assert (steps.pop("report data"), set(steps.values())) == ("skipped", {"passed"})
    assert unbound["report_data_compared"] is False
    assert all(word in verified.stdout for word in ("condition", "expected", "got", "TCB status", "passed"))
    bound = told_here("evidence", "examine", *given, "--report-data", "00" * 64, "--json")
    document = json.loads(bound.stdout)
    assert (bound.exit_code, document["verified"], document["report_data_compared"]) == (0, True, True)
    assert document["tee"] == tee.upper()
    refused = told_here("evidence", "examine", *given, "--report-data", "01" * 64, "--json")
    document = json.loads(refused.stdout)
    failed = [step for step in document["steps"] if step["status"] == "failed"]
    assert (refused.exit_code, document["verified"]) == (1, False)
    assert [(step["name"], step["code"]) for step in failed] == [("report data", "report_data_mismatch")]
    assert all(step["remedy"] for step in failed)
    given = (*given, "--report-data", "any")
    later = told_here("evidence", "examine", *given, "--at", str(int(time.time()) + 40 * DAY), "--json")
    steps = {step["name"]: step["status"] for step in json.loads(later.stdout)["steps"]}
    assert (later.exit_code, steps["dates"], steps["signatures"]) == (1, "failed", "skipped")


def test_evidence_is_examined_with_the_services_own_collateral(configured: Place, quotes: dict[str, Path]) -> None:
    given = (str(quotes["sgx"]), "--policy", str(quotes["policy"]), "--config", str(configured.config))
    given = (*given, "--report-data", "00" * 64)
    assert told_here("evidence", "examine", *given).exit_code == 0


def test_evidence_that_cannot_be_examined_is_no_success(quotes: dict[str, Path], place: Place) -> None:
    sgx, policy, collateral = str(quotes["sgx"]), str(quotes["policy"]), str(quotes["sgx.json"])
    (place.folder / "bad").write_bytes(b"\x03\x00" + bytes(100))
    unbound = ("--report-data", "any")
    for arguments, code in (
        ((sgx, "--policy", policy), 2),  # no collateral
        ((sgx, "--policy", policy, "--collateral", collateral, "--config", str(place.config)), 2),
        ((sgx, "--policy", policy, "--collateral", collateral, "--report-data", "00"), 2),
        ((sgx, "--policy", policy, "--collateral", collateral), 2),  # compared with nothing, and nobody said so
        ((sgx, "--policy", policy, "--collateral", collateral, *unbound, "--claims", policy), 2),
        ((sgx, "--policy", str(quotes["host.toml"]), "--collateral", collateral, *unbound), 2),  # the policy of a host
        ((str(quotes["tdx"]), "--policy", policy, "--collateral", collateral, *unbound), 2),
        ((str(place.folder / "bad"), "--policy", policy, "--collateral", collateral, *unbound), 1),
        ((sgx, "--policy", policy, "--collateral", str(quotes["tdx.json"]), *unbound), 1),
    ):
        assert told_here("evidence", "examine", *arguments).exit_code == code, arguments


@pytest.mark.dcap_vectors
def test_real_evidence_is_examined_by_the_command(tmp_path: Path) -> None:
    named = os.environ.get("STIP_DCAP_VECTORS")
    if not named:
        pytest.skip("STIP_DCAP_VECTORS is not set: NO REAL QUOTE WAS EXAMINED in this run")
    mrtd = (Path(named) / "tdx_quote").read_bytes()[184:232]
    mrenclave = (Path(named) / "sgx_quote").read_bytes()[112:144]
    (tmp_path / "tdx.toml").write_text(f'mode = "production"\nmeasurements = ["{mrtd.hex()}"]\n')
    (tmp_path / "sgx.toml").write_text(
        f'mode = "production"\nmeasurements = ["{mrenclave.hex()}"]\n[[accepted_statuses]]\n'
        'status = "ConfigurationAndSWHardeningNeeded"\nadvisories = ["INTEL-SA-00289", "INTEL-SA-00615"]\n'
    )
    for tee in ("sgx", "tdx"):
        given = (f"{named}/{tee}_quote", "--collateral", f"{named}/{tee}_quote_collateral.json",
                 "--policy", str(tmp_path / f"{tee}.toml"), "--report-data", "any")  # fmt: skip
        assert told_here("evidence", "examine", *given, "--at", "1750400000").exit_code == 0
        assert told_here("evidence", "examine", *given).exit_code == 1
