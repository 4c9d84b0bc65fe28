"""The policy at work: what it refuses at release and at renewal, and how a running service takes another one."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
import tomli_w

from stip_keyservice.home import Home
from stip_keyservice.service import instances
from stip_keyservice.service.policy import Policy
from stip_keyservice.service.policy.enclaves import require_enclave
from stip_keyservice.service.policy.signing import sign, signature_path
from stip_keyservice.service.release import EnclaveFacts
from stip_protocol import rpc
from stip_protocol.attestation.policy import EvidencePolicy
from stip_protocol.documents import Signed
from stip_protocol.errors import EvidenceRefused, MeasurementRefused, SimulatedEvidenceRefused, StipError
from stip_protocol.lease import Lease
from stip_protocol.release import Bundle, Claims, Heartbeat, Renewal, sign_heartbeat, unseal
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc
from stip_stack.tee import SimulatedPlatform

from .conftest import MEASUREMENT, START, Clock, Enclave, Person, Serve, World, make_instance, refusal
from .place import Place, run

OTHER = "11" * 32
Tables = dict[str, Any]


def manifest(world: World, instance: str) -> str:
    """The digest that `[[instances]]` names the instance's first epoch by."""
    with world.store.read() as db:
        return instances.by_id(db, instance).epochs[0].manifest_digest.hex()


async def running(serve: Serve, **made: Any) -> tuple[Any, ...]:
    """Alice's enclave with a lease of an instance, under the policy as it is."""
    async with serve() as world:
        alice, enclave = world.person("alice"), world.enclave()
        instance = world.instance(**({"owner": alice} if not made.get("shared") else {"members": (alice,)}))
        _, lease = await world.bundle(enclave, alice, instance.id)
        return alice, enclave, instance, lease, manifest(world, instance.id)


STRICTER: dict[str, tuple[Callable[[Tables, str], None], str]] = {
    "drops the measurement": (
        lambda tables, _: tables["evidence"].update(measurements=[OTHER]), "measurement_refused",
    ),
    "enrols other platforms": (
        lambda tables, _: tables["evidence"].update(platforms=["ee" * 16]), "evidence_refused",
    ),
    "accepts another TCB status alone": (
        lambda tables, _: tables["evidence"].update(accepted_statuses=[{"status": "ConfigurationNeeded"}]),
        "evidence_refused",
    ),
    "wants a newer TCB recovery": (
        lambda tables, _: tables["evidence"].update(minimum_tcb_evaluation_number=10**6), "evidence_refused",
    ),
    "serves another instance alone": (
        lambda tables, _: tables.update(instances=[{"manifest": OTHER}]), "instance_refused",
    ),
    "serves the instance as another kind": (
        lambda tables, served: tables.update(instances=[{"manifest": served, "kind": "shared"}]), "instance_refused",
    ),
    "serves it to other users": (
        lambda tables, served: tables.update(instances=[{"manifest": served, "users": ["bob"]}]), "user_refused",
    ),
    "serves it to other domains": (
        lambda tables, served: tables.update(instances=[{"manifest": served, "domains": ["acme"]}]), "user_refused",
    ),
    "requires an audit": (lambda tables, _: tables.update(leakage={"required": True}), "leakage_refused"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRICTER)
async def test_a_running_workload_does_not_survive_a_policy_that(
    serve: Serve, policy_tables: Tables, case: str
) -> None:
    change, code = STRICTER[case]
    alice, enclave, instance, lease, served = await running(serve)
    change(policy_tables, served)
    async with serve() as world:
        spent = world.user(alice).spent
        assert await refusal(world.renew(enclave, lease, fed=10, wanted=10)) == code
        entry = world.entries()[-1]
        assert (entry.event, entry.code, entry.instance) == ("renewal", code, instance.id)
        assert await refusal(world.bundle(enclave, alice, instance.id)) == code
        assert world.entries()[-1].code == code
        assert world.user(alice).spent == spent


ALLOWED: dict[str, Callable[[Tables, str], None]] = {
    "lists it": lambda tables, served: tables.update(instances=[{"manifest": OTHER}, {"manifest": served}]),
    "lists it as what it is": lambda tables, served: tables.update(
        instances=[{"manifest": served, "kind": "dedicated"}]
    ),
    "names the user": lambda tables, served: tables.update(
        instances=[{"manifest": served, "users": ["bob", "alice"], "domains": ["acme"]}]
    ),
    "accepts its measurement beside another": lambda tables, _: tables["evidence"].update(
        measurements=[OTHER, MEASUREMENT.hex()]
    ),
    "accepts its status beside another": lambda tables, _: tables["evidence"].update(
        accepted_statuses=[{"status": "ConfigurationNeeded"}, {"status": "UpToDate"}]
    ),
}


@pytest.mark.parametrize("case", ALLOWED)
async def test_a_running_workload_goes_on_under_a_policy_that(serve: Serve, policy_tables: Tables, case: str) -> None:
    alice, enclave, instance, lease, served = await running(serve)
    ALLOWED[case](policy_tables, served)
    async with serve() as world:
        _, renewed = await world.renew(enclave, lease, fed=10, wanted=10)
        assert renewed.serial == 1
        await world.bundle(enclave, alice, instance.id)


async def test_a_refused_renewal_is_granted_once_the_policy_allows_it_again(
    serve: Serve, policy_tables: Tables
) -> None:
    _, enclave, _, lease, _ = await running(serve)
    accepted, policy_tables["evidence"]["measurements"] = policy_tables["evidence"]["measurements"], [OTHER]
    async with serve() as world:
        assert await refusal(world.renew(enclave, lease, fed=10, wanted=10)) == "measurement_refused"
    policy_tables["evidence"]["measurements"] = accepted
    async with serve() as world:
        _, renewed = await world.renew(enclave, lease, fed=10, wanted=10)
        assert renewed.serial == 1


async def test_a_grant_of_a_shared_instance_is_held_to_the_list_as_well(serve: Serve, policy_tables: Tables) -> None:
    alice, enclave, instance, _, served = await running(serve, shared=True)
    policy_tables["instances"] = [{"manifest": served, "users": ["bob"]}]
    async with serve() as world:
        delegation = alice.delegate(enclave, instance.id)
        assert await refusal(world.release(enclave, delegation, instance.id, kind="grant")) == "user_refused"
    policy_tables["instances"][0]["users"] = ["alice"]
    async with serve() as world:
        await world.release(enclave, alice.delegate(enclave, instance.id), instance.id, kind="grant")


async def test_the_bundle_carries_the_digest_of_the_policy_that_decided(serve: Serve, policy_tables: Tables) -> None:
    async with serve() as world:
        alice, enclave = world.person("alice"), world.enclave()
        bundle, _ = await world.bundle(enclave, alice, world.instance(owner=alice).id)
        assert bundle.policy_digest == Policy.model_validate(policy_tables).digest()


async def test_the_cap_on_a_user_ends_what_the_budget_would_still_give(serve: Serve, policy_tables: Tables) -> None:
    policy_tables["budgets"] = {"tokens_per_user": 150}
    async with serve() as world:
        alice, enclave = world.person("alice"), world.enclave()
        instance = world.instance(owner=alice)
        _, first = await world.bundle(enclave, alice, instance.id)
        _, second = await world.bundle(enclave, alice, instance.id)
        assert (first.tokens, second.tokens, world.user(alice).spent) == (100, 50, 150)
        assert await refusal(world.bundle(enclave, alice, instance.id)) == "budget_spent"
        assert await refusal(world.renew(enclave, second, fed=50, wanted=1)) == "budget_spent"
        # what was debited before can be used up
        _, renewed = await world.renew(enclave, first, fed=60, wanted=0)
        assert renewed.tokens == 100


async def test_the_cap_on_a_day_holds_over_leases_and_renewals_and_ends_with_the_day(
    serve: Serve, policy_tables: Tables
) -> None:
    policy_tables["budgets"] = {"tokens_per_day": 170}
    clock = Clock(START - START % 86400 + 86400 - 300)
    async with serve(clock) as world:
        alice, bob, enclave = world.person("alice"), world.person("bob"), world.enclave()
        instance, other = world.instance(owner=alice), world.instance(owner=bob)
        delegated = {"expires": clock.now + 7200}
        bundle, _ = await world.release(enclave, alice.delegate(enclave, instance.id, **delegated), instance.id)
        assert isinstance(bundle, Bundle)
        lease = world.lease(bundle.lease)
        _, lease = await world.renew(enclave, lease, fed=100, wanted=1000)
        assert (lease.tokens, world.user(alice).spent) == (170, 170)
        assert await refusal(world.renew(enclave, lease, fed=170, wanted=1)) == "budget_spent"
        # another user has a day of their own
        await world.release(enclave, bob.delegate(enclave, other.id, **delegated), other.id)
        clock.now += 300
        _, lease = await world.renew(enclave, lease, fed=170, wanted=1)
        assert (lease.tokens, world.user(alice).spent) == (171, 171)


PRODUCTION = {"mode": "production", "audience": "keyservice", "measurements": ["aa" * 32]}
FACTS: Tables = {
    "measurement": bytes.fromhex("aa" * 32),
    "signer": bytes.fromhex("bb" * 32),
    "isv_prod_id": 1,
    "isv_svn": 3,
    "platforms": (bytes(16), bytes([1]) * 16),
    "tcb_status": "SWHardeningNeeded",
    "advisories": ("INTEL-SA-00615",),
    "tcb_evaluation_number": 17,
    "simulated": False,
}
HARDENING = {"status": "SWHardeningNeeded", "advisories": ["INTEL-SA-00615", "INTEL-SA-00289"]}
SIGNER = {"mrsigner": "bb" * 32, "isv_prod_id": 1, "minimum_isv_svn": 3}

ENCLAVES: dict[str, tuple[Tables, Tables, type[StipError] | None]] = {
    "its measurement": ({}, {}, None),
    "its signer": ({"measurements": [OTHER], "signers": [SIGNER]}, {}, None),
    "its platform by the one name": ({"platforms": ["00" * 16]}, {}, None),
    "its platform by the other": ({"platforms": ["01" * 16]}, {}, None),
    "another measurement": ({"measurements": [OTHER]}, {}, MeasurementRefused),
    "another signer": (
        {"measurements": [OTHER], "signers": [SIGNER | {"mrsigner": "cc" * 32}]}, {}, MeasurementRefused,
    ),
    "another product": (
        {"measurements": [OTHER], "signers": [SIGNER | {"isv_prod_id": 2}]}, {}, MeasurementRefused,
    ),
    "a newer product": (
        {"measurements": [OTHER], "signers": [SIGNER | {"minimum_isv_svn": 4}]}, {}, MeasurementRefused,
    ),
    "another platform": ({"platforms": ["02" * 16]}, {}, EvidenceRefused),
    "another status": ({}, {"tcb_status": "ConfigurationNeeded"}, EvidenceRefused),
    "a status that no policy knows": ({}, {"tcb_status": "Relaunch"}, EvidenceRefused),
    "another advisory": ({}, {"advisories": ("INTEL-SA-00615", "INTEL-SA-00828")}, EvidenceRefused),
    "no advisory": ({}, {"advisories": ()}, None),
    "a newer recovery": ({"minimum_tcb_evaluation_number": 18}, {}, EvidenceRefused),
    "its recovery": ({"minimum_tcb_evaluation_number": 17}, {}, None),
    "real evidence, where it was simulated": ({}, {"simulated": True}, SimulatedEvidenceRefused),
    "simulated evidence, where it was real": (
        {"mode": "development", "simulated_root_sha256": "dd" * 32}, {}, SimulatedEvidenceRefused,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENCLAVES)
def test_what_evidence_proved_is_held_against_a_policy_that_accepts(case: str) -> None:
    rules, facts, expected = ENCLAVES[case]
    policy = EvidencePolicy.from_mapping(PRODUCTION | {"accepted_statuses": [HARDENING]} | rules)
    enclave = EnclaveFacts.model_validate(FACTS | facts)
    if expected is None:
        require_enclave(policy, enclave)
    else:
        with pytest.raises(expected):
            require_enclave(policy, enclave)


class Live:
    """A running service of the place, and an enclave that talks to it."""

    def __init__(self, place: Place, announced: dict[str, str], stub: Any) -> None:
        self.place, self.announced, self.stub = place, announced, stub
        self.home = Home.open(place.home)
        self.enclave = LiveEnclave(place.platform)

    async def lease(self, person: Person, instance: str) -> Lease:
        delegation = person.delegate(self.enclave, instance, expires=int(time.time()) + 600)
        challenge = await self.stub.Challenge(keyservice_pb2.ChallengeRequest())
        claims: Claims = self.enclave.claims(challenge, delegation, instance)
        reply = await self.stub.Release(self.enclave.request(claims, delegation))
        key = self.home.service.public_key()
        bundle = unseal(reply.sealed, reply.signature, claims.to_bytes(), self.enclave.hpke, key)
        assert isinstance(bundle, Bundle)
        return Signed.from_bytes(bundle.lease).open(Lease, key)

    async def renew(self, lease: Lease) -> Lease:
        beat = Heartbeat(handle=lease.handle, serial=lease.serial, nonce=secrets.token_bytes(32), fed=10, wanted=10)
        signature = sign_heartbeat(beat, self.enclave.link)
        request = keyservice_pb2.RenewRequest(heartbeat=beat.to_bytes(), signature=signature)
        reply = await self.stub.Renew(request)
        key = self.home.service.public_key()
        return Signed.from_bytes(Signed.from_bytes(reply.renewal).open(Renewal, key).lease).open(Lease, key)

    async def hang_up(self, result: str, count: int) -> None:
        """Send SIGHUP, and wait until the service has counted that result so many times."""
        os.kill(int(self.announced["pid"]), signal.SIGHUP)
        line = f'stip_policy_loads_total{{result="{result}"}} {float(count)}'
        deadline = time.monotonic() + 20
        while line not in await asyncio.to_thread(self.scrape):
            assert time.monotonic() < deadline, f"the service never said: {line}"
            await asyncio.sleep(0.05)

    def scrape(self) -> str:
        with urllib.request.urlopen(f"http://{self.announced['metrics']}/metrics", timeout=10) as reply:
            return str(reply.read().decode())


class LiveEnclave(Enclave):
    """An enclave by the machine's clock."""

    def __init__(self, platform: SimulatedPlatform) -> None:
        super().__init__(platform)
        self.provider = platform.provider(self.measurement)


async def test_sighup_puts_another_policy_in_force_and_a_bad_one_changes_nothing(place: Place) -> None:
    home = Home.open(place.home)
    alice = Person("alice")
    made = make_instance(place.folder / "instance", home)
    place.call_here("users", "add", "alice", "--public-key", alice.public.hex(), "--budget", "1500")
    place.call_here("instances", "add", str(made.directory), "--dedicated-to", "alice")
    path = place.folder / "policy.toml"
    tables: Tables = {
        "evidence": {
            "mode": "development",
            "measurements": [MEASUREMENT.hex()],
            "simulated_root_sha256": place.platform.root_sha256.hex(),
        }
    }

    def write(serial: int, *, signed: bool = True, **evidence: Any) -> None:
        changed = tables | {"serial": serial, "evidence": tables["evidence"] | evidence}
        path.write_bytes(tomli_w.dumps(changed).encode())
        if signed:
            sign(path, home.developer, now=int(time.time()))

    write(1)
    with place.service() as (announced, log):
        async with rpc.channel(announced["address"], roots=home.tls_ca.pem, server_name="localhost") as channel:
            live = Live(place, announced, keyservice_pb2_grpc.KeyServiceStub(channel))
            lease = await live.lease(alice, made.id)
            # one that drops the measurement takes effect for the next decision
            write(2, measurements=[OTHER])
            await live.hang_up("loaded", 2)
            assert await refusal(live.renew(lease)) == "measurement_refused"
            assert await refusal(live.lease(alice, made.id)) == "measurement_refused"
            # bad ones: not TOML, changed after signing, unsigned, a step back
            signed = path.read_bytes(), signature_path(path).read_bytes()
            path.write_text("[evidence")
            await live.hang_up("signature_invalid", 1)
            signature_path(path).unlink()
            await live.hang_up("policy_invalid", 1)
            write(3, signed=False)
            await live.hang_up("policy_invalid", 2)
            write(1)
            await live.hang_up("policy_invalid", 3)
            assert await refusal(live.renew(lease)) == "measurement_refused"
            # another good one lets the workload go on
            path.write_bytes(signed[0])
            signature_path(path).write_bytes(signed[1])
            write(3)
            await live.hang_up("loaded", 3)
            assert (await live.renew(lease)).serial == 1
            assert "stip_policy_serial 3.0" in await asyncio.to_thread(live.scrape)
    errors = [line for line in log if "policy refused" in line]
    assert len(errors) == 4
    assert all('"level": "error"' in line or '"level":"error"' in line for line in errors)
    loads = [entry["code"] for entry in place.call_here("audit-log", "list") if entry["event"] == "policy_loaded"]
    assert loads == ["granted", "granted", "signature_invalid", *["policy_invalid"] * 3, "granted"]


def test_serve_refuses_to_start_with_an_old_policy_or_a_signature_that_does_not_hold(place: Place) -> None:
    path = place.folder / "policy.toml"
    text = path.read_text()
    path.write_text("serial = 2\n" + text)
    with place.service():
        pass
    path.write_text("serial = 1\n" + text)
    done = run("serve", "--config", str(place.config))
    assert (done.returncode, done.stdout) == (2, "")
    assert "policy serial: got 1, allowed: at least 2" in done.stderr
    path.write_text("serial = 2\n" + text)
    signature_path(path).write_bytes(b"\xa0")
    done = run("serve", "--config", str(place.config))
    assert (done.returncode, done.stdout) == (2, "")
    assert "not a signature of a policy" in done.stderr
