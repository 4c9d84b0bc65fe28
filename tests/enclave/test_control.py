"""The control stream: what is believed of it, what it ends, and that it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import secrets
import time
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

from stip_enclave import control as control_module
from stip_enclave.control import ControlStream
from stip_enclave.identity import EnclaveIdentity
from stip_enclave.release import ReleaseClient
from stip_keyservice.service import revocations, users
from stip_protocol import rpc
from stip_protocol.documents import Signed
from stip_protocol.errors import LeaseRevoked, StipError
from stip_protocol.release import NONCE_BYTES, AuditHead, Notice, Watch, open_watch, service_id
from stip_protocol.telemetry import CONTROL_STREAM, Telemetry
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc
from stip_stack.pki import Authority
from tests.enclave.bench import until
from tests.enclave.world import MEASUREMENT, Developer

SERVICE = Ed25519PrivateKey.generate()
Script = Callable[[bytes], list[bytes]]
"""What a stream says, by the nonce it was asked with."""


def notice(nonce: bytes, sequence: int, kind: str = "revoked", *, key: Ed25519PrivateKey = SERVICE) -> bytes:
    fields = {"kind": kind, "nonce": nonce, "sequence": sequence, "handles": (bytes(16),) if sequence else ()}
    return Signed.sign(Notice.model_validate(fields), key).to_bytes()


@dataclass
class ScriptedService(keyservice_pb2_grpc.KeyServiceServicer):
    """A key service that holds a watch to the wire's rules, and says what its script says."""

    script: Script
    watches: list[Watch] = field(default_factory=list)
    nonces: list[bytes] = field(default_factory=list)

    async def Challenge(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.nonces.append(secrets.token_bytes(NONCE_BYTES))
        return keyservice_pb2.ChallengeReply(
            nonce=self.nonces[-1], seconds=60, service=service_id(SERVICE.public_key())
        )

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        key = load_der_public_key(request.link_key)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        self.watches.append(open_watch(request.watch, request.signature, key))
        for signed in self.script(self.watches[-1].nonce):
            yield keyservice_pb2.WatchReply(notice=signed)


@dataclass
class Scene:
    service: ScriptedService
    releases: ReleaseClient
    identity: EnclaveIdentity
    telemetry: Telemetry


@pytest.fixture
async def scene(developer: Developer) -> AsyncIterator[Scene]:
    operator = Authority("a key service's CA")
    service, tls = ScriptedService(lambda nonce: []), operator.issue("keys.test")
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(lambda error: None)], options=rpc.SERVER_OPTIONS)
    keyservice_pb2_grpc.add_KeyServiceServicer_to_server(service, server)
    credentials = rpc.server_credentials(tls.certificate, tls.private_key, client_ca=None)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    provider = developer.platform.provider(MEASUREMENT)
    identity = EnclaveIdentity.create(provider, dns_name="enclave.test", lifetime=3600, now=int(time.time()))
    telemetry = Telemetry("enclave", simulated=True)
    async with rpc.channel(f"127.0.0.1:{port}", roots=operator.pem, server_name="keys.test") as channel:
        releases = ReleaseClient(
            channel, SERVICE.public_key(), provider, identity, telemetry, audience="gateway.test", timeout=10
        )
        yield Scene(service, releases, identity, telemetry)
    await server.stop(0)


async def heard(scene: Scene) -> tuple[list[str], str]:
    """The kinds of notices that were believed, and the code that the stream ended with."""
    kinds: list[str] = []
    try:
        async with asyncio.timeout(20):
            async for each in scene.releases.watch():
                kinds += [each.kind]
    except StipError as error:
        return kinds, error.code
    raise AssertionError("a stream of notices ends with an error")


FOREIGN = Ed25519PrivateKey.generate()
HOSTILE: dict[str, tuple[Script, list[str], str]] = {
    "signed by another key": (
        lambda nonce: [notice(nonce, 0, "watching"), notice(nonce, 1, key=FOREIGN)], ["watching"], "signature_invalid"
    ),
    "of another stream": (
        lambda nonce: [notice(nonce, 0, "watching"), notice(bytes(32), 1)], ["watching"], "nonce_refused"
    ),
    "one missing": (
        lambda nonce: [notice(nonce, 0, "watching"), notice(nonce, 2)], ["watching"], "frame_invalid"
    ),
    "one repeated": (
        lambda nonce: [notice(nonce, 0, "watching"), notice(nonce, 1), notice(nonce, 1)],
        ["watching", "revoked"], "frame_invalid",
    ),
    "none that says that it begins": (lambda nonce: [notice(nonce, 0)], [], "frame_invalid"),
    "one that begins again": (
        lambda nonce: [notice(nonce, 0, "watching"), notice(nonce, 1, "watching")], ["watching"], "frame_invalid"
    ),
    "no notice at all": (lambda nonce: [b"junk"], [], "frame_invalid"),
    "nothing": (lambda nonce: [], [], "unavailable"),
    "the end": (
        lambda nonce: [notice(nonce, 0, "watching"), notice(nonce, 1, "superseded")],
        ["watching", "superseded"], "unavailable",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_stream_ends_with_what_is_not_its_next_notice(scene: Scene, case: str) -> None:
    scene.service.script, kinds, code = HOSTILE[case]
    assert await heard(scene) == (kinds, code)


async def test_each_stream_asks_with_a_new_challenge_under_the_link_key(scene: Scene) -> None:
    for _ in range(2):
        await heard(scene)
    asked = [watch.nonce for watch in scene.service.watches]
    assert asked == scene.service.nonces
    assert len(set(asked)) == 2
    assert {watch.link_key for watch in scene.service.watches} == {scene.identity.link_key_digest}


# -- with the real key service ----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def controlled(world: Any) -> AsyncIterator[ControlStream]:
    """The control stream of a world's enclave."""
    stream = ControlStream(world.releases, world.accounts, world.telemetry, draw=lambda: 0.01)
    running = asyncio.create_task(stream.run())
    try:
        yield stream
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def state(world: Any) -> float:
    value: float = world.telemetry.gauge(CONTROL_STREAM)._value.get()
    return value


def revoke(world: Any, kind: str, subject: str) -> int:
    with world.store.write() as db:
        made, _ = revocations.revoke(db, kind, subject, reason="a test", now=int(time.time()))
    return made.number


async def test_the_stream_is_there_while_leases_are_held_and_no_longer(world: Any, developer: Developer) -> None:
    await world.start(developer.protected("llama", "hardened"))
    async with controlled(world):
        assert state(world) == 0
        assert not world.keyservice_servicer.streams._open
        client = await world.opened(world.delegate(world.person("ada")))
        await until(lambda: state(world) == 1)
        await client.close()
        await world.until_sessions(0)
        for held in world.accounts._everything():
            held.account.end(LeaseRevoked("a test"))
        await world.accounts.tidy()
        await until(lambda: state(world) == 0 and not world.keyservice_servicer.streams._open)
        # What a grant had opened is not kept without a lease.
        assert not any(instance.loaded for instance in world.instances._everything())


@pytest.mark.parametrize("preset", ["hardened", "paper", "throughput"])
async def test_a_closed_instance_is_forgotten_whole_and_opened_again_by_a_new_grant(
    world: Any, developer: Developer, preset: str
) -> None:
    await world.start(developer.protected("llama", preset), lease={"heartbeat_tokens": 1000})
    instance_id = world.protected.manifest.instance
    async with controlled(world):
        person = world.person("ada")
        client = await world.opened(world.delegate(person))
        await client.turn([5, 6], max_tokens=2)
        await until(lambda: state(world) == 1)
        (instance,) = world.instances.find(instance_id).values()
        opened = [weakref.ref(part) for part in (instance.encoding, instance.opened.decoder)]
        number = revoke(world, "instance", instance_id)
        # Between two turns: no heartbeat is due, and the client is told all the same.
        assert await client.failure() == "lease_revoked"
        await until(lambda: not instance.loaded)
        await world.until_sessions(0)

        def gone() -> bool:
            gc.collect()
            return all(part() is None for part in opened)

        await until(gone)
        refused = await world.client().open(world.delegate(person), instance_id)
        assert refused.failed.code == "instance_refused"
        with world.store.write() as db:
            revocations.lift(db, number, now=int(time.time()))
        again = await world.opened(world.delegate(person))
        assert await again.turn([5, 6], max_tokens=4) == (world.protected.generate([5, 6], 4), 2)


async def test_a_user_who_is_revoked_ends_and_the_others_of_the_instance_go_on(
    world: Any, developer: Developer
) -> None:
    await world.start(developer.protected("llama", "hardened"), lease={"heartbeat_tokens": 1000})
    async with controlled(world):
        ada, bob = [await world.opened(world.delegate(world.person(name))) for name in ("ada", "bob")]
        await until(lambda: state(world) == 1)
        with world.store.read() as db:
            revoked = users.by_name(db, "ada")
        revoke(world, "user", revoked.id)
        assert await ada.failure() == "lease_revoked"
        assert await bob.turn([5, 6], max_tokens=4) == (world.protected.generate([5, 6], 4), 2)
        (instance,) = world.instances.find(world.protected.manifest.instance).values()
        assert instance.loaded


async def test_what_was_revoked_while_the_stream_was_cut_is_heard_when_it_is_back(
    world: Any, developer: Developer
) -> None:
    await world.start(developer.protected("llama", "hardened"), lease={"heartbeat_tokens": 1000})
    client = await world.opened(world.delegate(world.person("ada")))
    revoke(world, "instance", world.protected.manifest.instance)
    async with controlled(world):
        assert await client.failure() == "lease_revoked"


async def test_without_the_stream_a_revocation_comes_with_the_heartbeat(world: Any, developer: Developer) -> None:
    bound = 8
    await world.start(developer.protected("llama", "hardened"), lease={"heartbeat_tokens": bound})
    client = await world.opened(world.delegate(world.person("ada")))
    await client.turn([5, 6], max_tokens=1)
    revoke(world, "instance", world.protected.manifest.instance)
    await client.begin([7], max_tokens=100)
    tokens = 0
    while not (frame := await client.read()).HasField("failed"):
        tokens += frame.HasField("step")
    assert frame.failed.code == "lease_revoked"
    assert tokens <= bound


async def test_a_lost_stream_is_opened_again_and_again(
    world: Any, developer: Developer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "FIRST_PAUSE", 0.1)
    await world.start(developer.protected("llama", "hardened"))
    await world.opened(world.delegate(world.person("ada")))
    async with controlled(world):
        for _ in range(3):
            await until(lambda: state(world) == 1)
            for stream in world.keyservice_servicer.streams._open:
                stream.end()
            await until(lambda: state(world) == 0)
        await until(lambda: state(world) == 1)


async def test_a_superseded_lease_goes_on_and_new_sessions_ask_again_where_another_epoch_is_held(
    world: Any, developer: Developer, tmp_path: Path
) -> None:
    await world.start(developer.protected("llama", "hardened"))
    delegation = world.delegate(world.person("ada"))
    first = await world.opened(delegation)
    (held,) = world.accounts._everything()
    world.accounts.supersede([held.account.held.lease.handle])
    second = await world.opened(delegation)
    assert world.accounts._everything() == [held]  # there is nothing else to ask for
    for client in (first, second):
        assert await client.turn([5, 6], max_tokens=4) == (world.protected.generate([5, 6], 4), 2)


async def test_a_revocation_that_overtakes_its_bundle_is_not_lost(
    world: Any, developer: Developer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.start(developer.protected("llama", "hardened"))
    bundle = world.releases.bundle

    async def overtaken(*arguments: Any) -> Any:
        made = await bundle(*arguments)
        lease = world.releases.held(made.lease, made.link_certificate, made).lease
        assert await world.accounts.revoke([lease.handle], None, None) == 0
        return made

    monkeypatch.setattr(world.releases, "bundle", overtaken)
    refused = await world.client().open(world.delegate(world.person("ada")), world.protected.manifest.instance)
    assert refused.failed.code == "lease_revoked"
    monkeypatch.undo()
    await world.opened(world.delegate(world.person("bob")))


# -- leases that are asked about while something else happens ---------------------------------------------------------


@contextlib.asynccontextmanager
async def held_up(world: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> AsyncIterator[Callable[[], Any]]:
    """Keep the key service's answers back: what is yielded waits for a request of this kind, and leaving lets go."""
    real, asked, free = getattr(world.releases, name), asyncio.Event(), asyncio.Event()

    async def late(*arguments: Any) -> Any:
        asked.set()
        await free.wait()
        return await real(*arguments)

    monkeypatch.setattr(world.releases, name, late)
    try:
        yield lambda: asyncio.wait_for(asked.wait(), 10)
    finally:
        free.set()
        monkeypatch.setattr(world.releases, name, real)


async def test_a_lease_that_is_renewed_for_a_new_session_is_not_lost_from_sight_by_tidying(
    world: Any, developer: Developer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.start(developer.protected("llama", "hardened"), lease={"heartbeat_tokens": 1000})
    delegation, instance = world.delegate(world.person("ada")), world.protected.manifest.instance
    await (await world.opened(delegation)).close()
    await world.until_sessions(0)
    (held,) = world.accounts._everything()
    client = world.client()
    async with held_up(world, monkeypatch, "renew") as asked:
        # By the host's clock it has run out: it is renewed before a session may use it, and meanwhile nobody does.
        held.account._clock = lambda: held.account.held.lease.expires + 1.0
        opening = asyncio.create_task(client.open(delegation, instance))
        await asked()
        await world.accounts.tidy()
        held.account._clock = time.time
    assert (await opening).HasField("opened")
    await world.accounts.tidy()
    assert await client.turn([5, 6], max_tokens=4) == (world.protected.generate([5, 6], 4), 2)
    (now,) = world.accounts._everything()
    assert await world.accounts.revoke([now.account.held.lease.handle], None, None) == 1
    assert await client.failure() == "lease_revoked"


async def test_an_epoch_that_leaves_the_configuration_while_its_lease_is_on_the_way_is_not_opened(
    world: Any, developer: Developer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.start(developer.protected("llama", "hardened"))
    delegation, instance = world.delegate(world.person("ada")), world.protected.manifest.instance
    (leaving,) = world.instances.find(instance).values()
    async with held_up(world, monkeypatch, "bundle") as asked:
        opening = asyncio.create_task(world.client().open(delegation, instance))
        await asked()
        await world.instances.reread([])
        await world.accounts.tidy()
    assert (await opening).failed.code == "instance_refused"
    assert not leaving.loaded
    assert not world.accounts._everything()


async def test_what_tidying_found_unused_is_not_closed_under_who_came_meanwhile(
    world: Any, developer: Developer
) -> None:
    await world.start(developer.protected("llama", "hardened"))
    delegation = world.delegate(world.person("ada"))
    client = await world.opened(delegation)
    (instance,) = world.instances.find(world.protected.manifest.instance).values()
    (held,) = world.accounts._everything()
    kept, world.accounts._held = world.accounts._held, {}
    await instance._loading.acquire()  # as one that another session is just opening
    tidying = asyncio.create_task(world.accounts.tidy())
    await asyncio.sleep(0)
    world.accounts._held = kept
    instance._loading.release()
    await tidying
    assert instance.loaded
    assert held.account.ended is None
    assert await client.turn([5, 6], max_tokens=4) == (world.protected.generate([5, 6], 4), 2)


async def test_a_lease_that_is_being_opened_is_not_given_up_for_room(
    world: Any, developer: Developer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.start(developer.protected("llama", "hardened"), accounts=1)
    ada, bob = [world.delegate(world.person(name)) for name in ("ada", "bob")]
    instance, first = world.protected.manifest.instance, world.client()
    async with held_up(world, monkeypatch, "grant") as asked:
        opening = asyncio.create_task(first.open(ada, instance))
        await asked()
        refused = await world.client().open(bob, instance)
        assert refused.failed.code == "overloaded"
    assert (await opening).HasField("opened")
    (held,) = world.accounts._everything()
    assert held.account.in_use


async def test_a_thousand_revocations_told_again_and_again_are_remembered_once_and_bounded(
    world: Any, developer: Developer
) -> None:
    await world.start(developer.protected("llama", "hardened"))
    first = bytes([255]) * 16
    await world.accounts.revoke([first], None, None)
    handles = [number.to_bytes(16, "big") for number in range(1000)]
    for _ in range(8):  # as many streams
        await world.accounts.revoke(handles, None, None)
    assert first in world.accounts._early
    assert len(world.accounts._early) == 1001
    for start in range(0, 10_000, 1000):
        await world.accounts.revoke([number.to_bytes(16, "big") for number in range(start, start + 1000)], None, None)
    assert len(world.accounts._early) <= 4096
    assert (9_999).to_bytes(16, "big") in world.accounts._early


async def test_a_session_that_was_revoked_asks_for_a_new_lease_and_never_gets_the_old_one(
    world: Any, developer: Developer
) -> None:
    await world.start(developer.protected("llama", "hardened"))
    delegation = world.delegate(world.person("ada"))
    client = await world.opened(delegation)
    (held,) = world.accounts._everything()
    handle = held.account.held.lease.handle
    await world.accounts.revoke([handle], None, None)
    assert await client.failure() == "lease_revoked"
    await world.opened(delegation)
    (after,) = world.accounts._everything()
    assert after.account.held.lease.handle != handle


def test_two_heads_of_one_entry_are_both_handed_to_clients(scene: Scene) -> None:
    """Which of them is the log's is not for the enclave to say: clients hold them against each other."""

    def shown(sequence: int, digest: bytes, at: int) -> bytes:
        signed = Signed.sign(AuditHead(sequence=sequence, hash=digest, at=at), SERVICE).to_bytes()
        scene.releases._note(signed, SimpleNamespace(audit_head=digest))  # type: ignore[arg-type]
        return signed

    first, second = shown(7, bytes(32), 1000), shown(7, bytes([1]) * 32, 1000)
    assert first != second
    assert scene.releases.audit_head == second
    shown(6, bytes([2]) * 32, 999)  # late, as from a call that was overtaken
    assert scene.releases.audit_head == second
