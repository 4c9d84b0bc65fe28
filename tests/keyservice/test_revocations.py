"""Revocations: refused at release and at renewal from then on, whoever asks, and lifted for new leases alone."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from stip_keyservice.home import Home
from stip_keyservice.service import revocations
from stip_keyservice.service.endings import listed
from stip_keyservice.service.revocations import KINDS, Kind
from stip_protocol import rpc
from stip_protocol.documents import Signed
from stip_protocol.errors import ConfigurationError, StipError
from stip_protocol.lease import Lease
from stip_protocol.release import Bundle, Notice, Watch
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc

from .conftest import MEASUREMENT, START, Enclave, MadeInstance, Person, World, make_instance, refusal
from .place import Place
from .test_commands import LiveEnclave, ask
from .test_watching import WAIT_SECONDS, request


@dataclass
class Scene:
    """Alice's running session, and everything in it that can be revoked."""

    world: World
    alice: Person
    enclave: Enclave
    instance: MadeInstance
    lease: Lease

    def revoke(self, kind: Kind, given: str) -> tuple[int, int]:
        """(number of the revocation, leases that it ended)."""
        with self.world.store.write() as db:
            subject = revocations.subject_of(db, kind, given)
            made, ended = revocations.revoke(db, kind, subject, reason="incident 7", now=self.world.clock.now)
        return made.number, ended

    def lift(self, number: int) -> None:
        with self.world.store.write() as db:
            revocations.lift(db, number, now=self.world.clock.now)


@pytest.fixture
async def scene(world: World) -> Scene:
    alice = world.person("alice")
    instance, enclave = world.instance(members=(alice,)), world.enclave()
    _, lease = await world.bundle(enclave, alice, instance.id)
    return Scene(world, alice, enclave, instance, lease)


GIVEN: dict[Kind, Callable[[Scene], str]] = {
    "user": lambda scene: "alice",
    "device": lambda scene: "alice/first",
    "enclave": lambda scene: scene.enclave.tls_key.hex(),
    "measurement": lambda scene: MEASUREMENT.hex().upper(),
    "instance": lambda scene: scene.instance.id,
    "epoch": lambda scene: f"{scene.instance.id}/0",
}
CODES: dict[Kind, str] = {
    "user": "user_refused",
    "device": "user_refused",
    "enclave": "enclave_revoked",
    "measurement": "enclave_revoked",
    "instance": "instance_refused",
    "epoch": "instance_refused",
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_revoked_subject_gets_no_release_and_no_renewal(scene: Scene, kind: Kind) -> None:
    world = scene.world
    number, ended = scene.revoke(kind, GIVEN[kind](scene))
    assert ended == 1
    spent = world.user(scene.alice).spent
    assert await refusal(world.bundle(scene.enclave, scene.alice, scene.instance.id)) == CODES[kind]
    assert await refusal(world.renew(scene.enclave, scene.lease, fed=1, wanted=1)) == "lease_revoked"
    assert world.user(scene.alice).spent == spent
    assert [entry.code for entry in world.entries()[-2:]] == [CODES[kind], "lease_revoked"]
    scene.lift(number)
    _, lease = await world.bundle(scene.enclave, scene.alice, scene.instance.id)
    await world.renew(scene.enclave, lease, fed=1, wanted=1)
    assert await refusal(world.renew(scene.enclave, scene.lease, fed=1, wanted=1)) == "lease_revoked"


@pytest.mark.parametrize("kind", ["user", "device", "enclave", "instance", "epoch"])
async def test_neighbours_go_on(scene: Scene, kind: Kind) -> None:
    bob, enclave = scene.world.person("bob"), scene.world.enclave()
    instance = scene.world.instance(owner=bob)
    _, lease = await scene.world.bundle(enclave, bob, instance.id)
    scene.revoke(kind, GIVEN[kind](scene))
    await scene.world.renew(enclave, lease, fed=1, wanted=1)
    await scene.world.bundle(enclave, bob, instance.id)


async def test_revoking_twice_is_one_revocation_and_lifting_twice_is_refused(scene: Scene) -> None:
    first, _ = scene.revoke("user", "alice")
    assert scene.revoke("user", scene.world.user(scene.alice).id) == (first, 0)
    scene.lift(first)
    for number in (first, first + 1):
        with pytest.raises(ConfigurationError):
            scene.lift(number)
    assert scene.revoke("user", "alice")[0] == first + 1


@pytest.mark.parametrize(
    ("kind", "given", "code"),
    [
        ("user", "nobody", "user_refused"),
        ("device", "alice/phone", "user_refused"),
        ("device", "0" * 32, "user_refused"),
        ("enclave", "abc", "configuration_invalid"),
        ("measurement", "x" * 64, "configuration_invalid"),
        ("instance", "0" * 32, "instance_refused"),
        ("epoch", "0" * 32, "configuration_invalid"),
        ("epoch", "0" * 32 + "/0", "instance_refused"),
        ("epoch", "0" * 32 + "/99999999999", "configuration_invalid"),
    ],
)
async def test_a_subject_that_nobody_has_is_refused(scene: Scene, kind: Kind, given: str, code: str) -> None:
    with pytest.raises(StipError) as caught:
        scene.revoke(kind, given)
    assert caught.value.code == code


async def test_the_list_of_leases_says_what_ended_them(scene: Scene) -> None:
    world = scene.world
    number, _ = scene.revoke("enclave", scene.enclave.tls_key.hex())
    other = world.enclave()
    await world.bundle(other, scene.alice, scene.instance.id)
    with world.store.read() as db:
        (running,) = listed(db, now=START, limit=10)
        found = {lease.enclave: lease for lease in listed(db, now=START, limit=10, ended_too=True)}
        (late,) = listed(db, now=running.expires, limit=10, enclave=other.tls_key, ended_too=True)
    assert (running.enclave, running.state, running.user, running.device) == (
        other.tls_key,
        "running",
        "alice",
        "first",
    )
    assert running.facts.measurement == MEASUREMENT
    ended = found[scene.enclave.tls_key]
    assert (ended.state, ended.revocation) == ("revoked", number)
    assert late.state == "expired"


def test_the_operator_revokes_and_lifts_by_hand(place: Place) -> None:
    made = make_instance(place.folder / "instance", Home.open(place.home))
    place.call_here("users", "add", "alice", "--public-key", "ab" * 32, "--budget", "10")
    place.call_here("instances", "add", str(made.directory), "--dedicated-to", "alice")
    done = place.call_here("revoke", "epoch", f"{made.id}/0", "--reason", "incident 7")
    assert (done["number"], done["subject"], done["leases_ended"]) == (1, f"{made.id}/0", 0)
    assert [each["number"] for each in place.call_here("revocations", "list")] == [1]
    assert place.call_here("revocations", "lift", "1")["lifted_at"] is not None
    assert place.call_here("revocations", "list") == []
    assert len(place.call_here("revocations", "list", "--all")) == 1
    assert place.call_here("revocations", "lift", "1", code=2)["error"]["code"] == "configuration_invalid"
    bad = place.call_here("revoke", "user", "alice", "--reason", "two\nlines", code=2)
    assert bad["error"]["code"] == "configuration_invalid"
    assert place.call_here("leases", "list", "--user", "alice", "--instance", made.id, "--all") == []
    assert place.call_here("leases", "list", "--enclave", "zz", code=2)["error"]["code"] == "configuration_invalid"
    events = [(entry["event"], entry["code"]) for entry in place.call_here("audit-log", "list")][-4:]
    assert events == [
        ("revoked", "granted"),
        ("revocation_lifted", "granted"),
        ("revocation_lifted", "configuration_invalid"),
        ("revoked", "configuration_invalid"),
    ]


async def test_a_running_service_tells_what_the_command_line_revoked_and_ends_its_streams_as_it_stops(
    place: Place,
) -> None:
    home = Home.open(place.home)
    made, alice = make_instance(place.folder / "instance", home), Person("alice")
    place.call_here("users", "add", "alice", "--public-key", alice.public.hex(), "--budget", "1000")
    place.call_here("instances", "add", str(made.directory), "--dedicated-to", "alice")
    service = home.service.public_key()
    with place.service() as (announced, _):
        limits = await asyncio.to_thread(Path(f"/proc/{announced['pid']}/limits").read_text)
        assert re.search(r"Max core file size +0 ", limits), "keys would be in a core dump"
        channel = rpc.channel(announced["address"], roots=home.tls_ca.pem, server_name="localhost")
        stub: Any = keyservice_pb2_grpc.KeyServiceStub(channel)
        enclave = LiveEnclave(place.platform)
        bundle = await ask(stub, home, alice, enclave, made.id)
        assert isinstance(bundle, Bundle)
        handle = Signed.from_bytes(bundle.lease).open(Lease, service).handle
        nonce = (await stub.Challenge(keyservice_pb2.ChallengeRequest())).nonce
        watch = Watch(nonce=nonce, link_key=hashlib.sha256(enclave.link_spki).digest())
        stream = stub.Watch(request(watch, enclave))
        await stream.read()
        (lease,) = await asyncio.to_thread(place.call, "leases", "list")
        assert lease["enclave"] == enclave.tls_key.hex()
        await asyncio.to_thread(place.call, "revoke", "enclave", lease["enclave"], "--reason", "incident 7")
        reply = await asyncio.wait_for(stream.read(), WAIT_SECONDS)
        assert Signed.from_bytes(reply.notice).open(Notice, service).handles == (handle,)
        assert await refusal(ask(stub, home, alice, enclave, made.id)) == "enclave_revoked"
    assert await asyncio.wait_for(stream.read(), WAIT_SECONDS) is grpc.aio.EOF
    assert await stream.code() is grpc.StatusCode.OK
    await channel.close()
