"""Several replicas, one policy: what one of them has loaded, none of the others decides against."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import urllib.error
import urllib.request
from hashlib import sha256
from typing import Any

import pytest
import tomli_w

from stip_keyservice.home import Home
from stip_keyservice.service.policy import Policy, loading
from stip_keyservice.service.policy.signing import Sealed, sign, signature_path
from stip_keyservice.service.state.schema import meta
from stip_protocol import rpc
from stip_protocol.wire import keyservice_pb2_grpc

from .conftest import MEASUREMENT, Person, Serve, World, make_instance, refusal
from .place import Place
from .test_policy_in_force import Live

Tables = dict[str, Any]
OTHER = "11" * 32


def loaded_elsewhere(world: World, tables: Tables) -> None:
    """Another replica of this state loads a policy."""
    policy = Policy.model_validate(tables)
    with world.store.write() as db:
        assert loading.record(db, Sealed(policy, policy.digest(), None, None))


async def test_a_replica_that_was_not_told_of_a_later_policy_releases_and_renews_nothing(
    serve: Serve, policy_tables: Tables
) -> None:
    policy_tables["serial"] = 4
    async with serve() as world:
        loaded_elsewhere(world, policy_tables)
        alice, enclave = world.person("alice"), world.enclave()
        instance = world.instance(owner=alice)
        _, lease = await world.bundle(enclave, alice, instance.id)
        spent = world.user(alice).spent
        loaded_elsewhere(world, policy_tables | {"serial": 5})
        assert await refusal(world.renew(enclave, lease, fed=10, wanted=10)) == "policy_outdated"
        assert await refusal(world.bundle(enclave, alice, instance.id)) == "policy_outdated"
        assert world.user(alice).spent == spent
        assert [entry.code for entry in world.entries()[-2:]] == ["policy_outdated"] * 2


@pytest.mark.parametrize("change", ["another of the same serial", "none with a serial, where one was loaded"])
async def test_a_replica_does_not_decide_by_a_policy_that_could_not_be_loaded_any_more(
    serve: Serve, policy_tables: Tables, change: str
) -> None:
    if "same" in change:
        policy_tables["serial"] = 5
    async with serve() as world:
        alice, enclave = world.person("alice"), world.enclave()
        instance = world.instance(owner=alice)
        _, lease = await world.bundle(enclave, alice, instance.id)
        loaded_elsewhere(world, policy_tables | {"serial": 5, "canaries": {"per_bundle": 1}})
        assert await refusal(world.renew(enclave, lease, fed=10, wanted=10)) == "policy_outdated"


async def test_a_policy_that_was_set_back_with_the_whole_state_is_decided_by(
    serve: Serve, policy_tables: Tables
) -> None:
    policy_tables["serial"] = 5
    async with serve() as world:
        alice, enclave = world.person("alice"), world.enclave()
        instance = world.instance(owner=alice)
        loaded_elsewhere(world, policy_tables | {"serial": 4})
        await world.bundle(enclave, alice, instance.id)
        with world.store.write() as db:
            db.execute(meta.delete().where(meta.c.key == loading.META_KEY))
        await world.bundle(enclave, alice, instance.id)


async def test_what_an_outdated_replica_would_refuse_is_to_be_asked_again(serve: Serve, policy_tables: Tables) -> None:
    policy_tables["serial"] = 4
    async with serve() as world:
        alice, enclave = world.person("alice"), world.enclave(measurement=bytes.fromhex(OTHER))
        instance = world.instance(owner=alice)
        assert await refusal(world.bundle(enclave, alice, instance.id)) == "measurement_refused"
        evidence = policy_tables["evidence"] | {"measurements": [OTHER]}
        loaded_elsewhere(world, policy_tables | {"serial": 5, "evidence": evidence})
        assert await refusal(world.bundle(enclave, alice, instance.id)) == "policy_outdated"


class Replica:
    """One of two services over one state, with a policy file of its own."""

    def __init__(self, place: Place, name: str) -> None:
        self.place = dataclasses.replace(place, config_name=f"{name}.toml")
        self.policy = place.folder / f"{name}-policy.toml"
        text = place.config.read_text().replace("policy.toml", self.policy.name)
        self.place.config.write_text(text)

    def write(self, home: Home, serial: int, measurement: str) -> None:
        """A signed policy, the signature first: a reader between the two finds a pair that does not fit."""
        tables = {
            "serial": serial,
            "evidence": {
                "mode": "development",
                "measurements": [measurement],
                "simulated_root_sha256": self.place.platform.root_sha256.hex(),
            },
        }
        self.policy.write_bytes(tomli_w.dumps(tables).encode())
        sign(self.policy, home.developer, now=int(time.time()))

    def take(self, other: Replica) -> None:
        """The other's file and signature, copied without a word to the process."""
        signature_path(self.policy).write_bytes(signature_path(other.policy).read_bytes())
        self.policy.write_bytes(other.policy.read_bytes())


def probe(announced: dict[str, str]) -> dict[str, str]:
    """Why the replica is not ready, by check."""
    try:
        with urllib.request.urlopen(f"http://{announced['metrics']}/readyz", timeout=10) as reply:
            body = reply.read()
    except urllib.error.HTTPError as error:
        body = error.read()
    return {one["name"]: one["reason"] for one in json.loads(body)["checks"] if one["status"] != "ok"}


async def test_an_outdated_replica_is_not_ready_and_catches_up_by_itself_once_its_files_are_there(
    place: Place,
) -> None:
    home, alice = Home.open(place.home), Person("alice")
    made = make_instance(place.folder / "instance", home)
    place.call_here("users", "add", "alice", "--public-key", alice.public.hex(), "--budget", "1500")
    place.call_here("instances", "add", str(made.directory), "--dedicated-to", "alice")
    old, new = Replica(place, "old"), Replica(place, "new")
    old.write(home, 1, MEASUREMENT.hex())
    new.write(home, 2, OTHER)
    with old.place.service() as (announced, log):
        async with rpc.channel(announced["address"], roots=home.tls_ca.pem, server_name="localhost") as channel:
            live = Live(place, announced, keyservice_pb2_grpc.KeyServiceStub(channel))
            lease = await live.lease(alice, made.id)
            assert await asyncio.to_thread(probe, announced) == {}
            with new.place.service():
                pass
            for _ in range(3):
                assert await refusal(live.renew(lease)) == "policy_outdated"
            deadline = time.monotonic() + 20
            while "policy" not in (found := await asyncio.to_thread(probe, announced)):
                assert time.monotonic() < deadline, found
            # what was not loaded when it was there already is not tried again and again
            loads = [one["code"] for one in place.call_here("audit-log", "list") if one["event"] == "policy_loaded"]
            assert loads == ["granted", "granted"]
            old.take(new)
            assert await refusal(live.renew(lease)) == "measurement_refused"
            while found := await asyncio.to_thread(probe, announced):
                assert time.monotonic() < deadline, found
    assert sum("policy loaded" in line for line in log) == 2
    loads = [one["code"] for one in place.call_here("audit-log", "list") if one["event"] == "policy_loaded"]
    assert loads == ["granted", "granted"]
    assert sha256(old.policy.read_bytes()).digest() == sha256(new.policy.read_bytes()).digest()
