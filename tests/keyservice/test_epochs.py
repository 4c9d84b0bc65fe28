"""Epochs and canaries: a new set of keys takes over, sessions of the old one go on, and nothing is given out twice."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cbor2
import pytest
from sqlalchemy import select

from stip_keyservice.home import Home
from stip_keyservice.service import canaries, instances, revocations
from stip_keyservice.service.endings import listed
from stip_keyservice.service.state.schema import canaries as pool
from stip_keyservice.service.state.schema import grants
from stip_protocol.errors import ConfigurationError, InstanceRefused, IntegrityError
from stip_protocol.keys.stream import derive
from stip_protocol.lease import Lease
from stip_protocol.release import CANARIES_LIMIT, Bundle, Grant, Renewal
from stip_protocol.secrets_file import PART_LABEL

from .conftest import START, Enclave, MadeInstance, Person, Serve, World, make_instance, refusal
from .place import Place
from .test_watching import watching


@dataclass
class Scene:
    """Alice's instance in epoch 0, and an epoch 1 of it that stands by."""

    world: World
    alice: Person
    enclave: Enclave
    old: MadeInstance
    new: MadeInstance

    async def lease(self, **claims: Any) -> tuple[Bundle, Lease]:
        return await self.world.bundle(self.enclave, self.alice, self.old.id, **claims)

    async def renew(self, lease: Lease, fed: int = 1) -> tuple[Renewal, Lease]:
        return await self.world.renew(self.enclave, lease, fed=fed, wanted=10)

    def activate(self, epoch: int = 1, *, drain_seconds: int | None = 300) -> None:
        until = None if drain_seconds is None else self.world.clock.now + drain_seconds
        with self.world.store.write() as db:
            instances.activate(db, self.old.id, epoch, drain_until=until)

    def retire(self, epoch: int) -> None:
        with self.world.store.write() as db:
            instances.retire(db, self.world.vault, self.old.id, epoch, now=self.world.clock.now)


@pytest.fixture
def scene(world: World) -> Scene:
    alice = world.person("alice")
    old = world.instance(owner=alice)
    new = world.instance(owner=alice, instance=old.id, epoch=1)
    return Scene(world, alice, world.enclave(), old, new)


def key_of(bundle: Bundle) -> bytes:
    return Grant.from_bytes(bundle.grant or b"").part_key


async def test_a_later_epoch_stands_by_until_it_is_activated(scene: Scene) -> None:
    bundle, lease = await scene.lease(epochs=(0, 1))
    assert (bundle.epoch, lease.epoch, key_of(bundle)) == (0, 0, derive(scene.old.root, PART_LABEL))
    assert await refusal(scene.lease(epochs=(1,))) == "instance_refused"
    scene.activate()
    bundle, lease = await scene.lease(epochs=(0, 1))
    assert (bundle.epoch, lease.epoch, key_of(bundle)) == (1, 1, derive(scene.new.root, PART_LABEL))
    bundle, _ = await scene.lease()  # an enclave that does not say what it holds
    assert bundle.epoch == 1


async def test_an_enclave_without_the_new_epoch_gets_the_newest_that_drains(scene: Scene) -> None:
    newest = scene.world.instance(owner=scene.alice, instance=scene.old.id, epoch=2)
    scene.activate(1)
    scene.activate(2)
    for held, given in (((0,), 0), ((0, 1), 1), ((0, 1, 2), 2), ((2, 7), 2)):
        bundle, _ = await scene.lease(epochs=held)
        assert bundle.epoch == given
    assert newest.id == scene.old.id
    assert await refusal(scene.lease(epochs=(7,))) == "instance_refused"


async def test_a_session_of_a_draining_epoch_is_renewed_and_told_that_it_is_superseded(scene: Scene) -> None:
    _, lease = await scene.lease()
    before, lease = await scene.renew(lease, 1)
    scene.activate()
    after, lease = await scene.renew(lease, 2)
    again, lease = await scene.renew(lease, 3)
    assert (before.superseded, after.superseded, again.superseded) == (False, True, True)
    assert (lease.epoch, lease.expires) == (0, START + 300)  # no lease outlives the drain


async def test_what_has_drained_is_neither_renewed_nor_released(scene: Scene) -> None:
    _, lease = await scene.lease()
    scene.activate()
    scene.world.clock.now = START + 299
    _, lease = await scene.renew(lease, 1)
    scene.world.clock.now = START + 300
    assert await refusal(scene.renew(lease, 2)) == "instance_refused"
    assert await refusal(scene.lease(epochs=(0,))) == "instance_refused"
    bundle, _ = await scene.lease(epochs=(0, 1))
    assert bundle.epoch == 1


@pytest.mark.parametrize("drain_seconds", [None, 300])
async def test_the_list_of_leases_tells_running_superseded_drained_and_removed_apart(
    scene: Scene, drain_seconds: int | None
) -> None:
    def states(*, now: int, ended_too: bool = True) -> list[str]:
        with scene.world.store.read() as db:
            return [lease.state for lease in listed(db, now=now, limit=10, ended_too=ended_too)]

    await scene.lease()
    assert states(now=START) == ["running"]
    scene.activate(drain_seconds=drain_seconds)
    assert states(now=START) == states(now=START, ended_too=False) == ["superseded"]
    late = START + 300
    assert states(now=late) == (["superseded"] if drain_seconds is None else ["epoch drained"])
    assert states(now=START + 900) == (["expired"] if drain_seconds is None else ["epoch drained"])
    scene.retire(0)
    assert states(now=START) == ["epoch removed"]
    assert states(now=START, ended_too=False) == []


async def test_a_drain_without_an_end_goes_on_until_the_epoch_is_retired(scene: Scene) -> None:
    _, lease = await scene.lease()
    scene.activate(drain_seconds=None)
    scene.world.clock.now = START + 800
    _, lease = await scene.renew(lease, 1)
    scene.retire(0)
    assert await refusal(scene.renew(lease, 2)) == "instance_refused"


async def test_an_epoch_that_drains_can_be_released_again(scene: Scene) -> None:
    _, lease = await scene.lease()
    scene.activate(1)
    scene.activate(0)
    renewal, lease = await scene.renew(lease, 1)
    assert not renewal.superseded
    assert lease.expires == START + 900
    bundle, _ = await scene.lease(epochs=(0, 1))
    assert bundle.epoch == 0


async def test_retiring_destroys_the_grant_and_what_was_left_to_draw(scene: Scene) -> None:
    with scene.world.store.write() as db:
        canaries.add(db, scene.world.vault, scene.old.id, 0, [b"one", b"two"])
    scene.activate()
    scene.retire(0)
    with scene.world.store.read() as db:
        assert db.execute(select(grants.c.epoch)).scalars().all() == [1]
        assert canaries.remaining(db, scene.old.id, 0) == 0
        with pytest.raises(IntegrityError):
            instances.grant(db, scene.world.vault, scene.old.id, 0)
    bundle, _ = await scene.lease()
    assert bundle.epoch == 1


async def test_a_watching_enclave_hears_that_it_is_superseded_and_then_that_the_epoch_is_gone(scene: Scene) -> None:
    _, lease = await scene.lease()
    async with watching(scene.world, scene.enclave) as stream:
        scene.activate(drain_seconds=None)
        heard = await stream.notice()
        assert (heard.kind, heard.handles) == ("superseded", (lease.handle,))
        _, lease = await scene.renew(lease)
        scene.retire(0)
        heard = await stream.notice()
        assert (heard.kind, heard.handles, heard.instance, heard.epoch) == ("revoked", (lease.handle,), scene.old.id, 0)


async def test_a_watching_enclave_hears_when_the_time_to_drain_is_over(scene: Scene) -> None:
    _, lease = await scene.lease()
    async with watching(scene.world, scene.enclave) as stream:
        scene.activate()
        assert (await stream.notice()).kind == "superseded"
        scene.world.clock.now += 300
        heard = await stream.notice()
        assert (heard.kind, heard.handles, heard.instance) == ("revoked", (lease.handle,), None)


async def test_a_revoked_active_epoch_is_not_replaced_by_an_older_one(scene: Scene) -> None:
    scene.activate()
    with scene.world.store.write() as db:
        revocations.revoke(db, "epoch", f"{scene.old.id}/1", reason="incident", now=START)
    assert await refusal(scene.lease(epochs=(0, 1))) == "instance_refused"


@pytest.mark.parametrize(("epoch", "owner"), [(1, True), (0, True), (2, False)])
def test_an_epoch_is_refused_that_is_not_newer_or_for_others(scene: Scene, epoch: int, owner: bool) -> None:
    with pytest.raises(InstanceRefused):
        scene.world.instance(owner=scene.alice if owner else None, instance=scene.old.id, epoch=epoch)


@pytest.fixture
def few(policy_tables: dict[str, Any]) -> dict[str, Any]:
    """A policy with four canaries a bundle."""
    policy_tables["canaries"] = {"per_bundle": 4}
    return policy_tables


def test_an_epoch_of_another_preset_is_refused(scene: Scene) -> None:
    """The users of a hardened instance would be served by one that hides less, and nobody would have told them."""
    weaker = make_instance(
        scene.world.folder / "weaker", scene.world.home, instance=scene.old.id, epoch=9, preset="paper"
    )
    home = scene.world.home
    inspected = instances.inspect(weaker.directory, home.developer.public_key(), home.sealing)
    with scene.world.store.write() as db:
        domain = instances.by_id(db, scene.old.id).domain
        with pytest.raises(InstanceRefused, match="epoch preset: got paper, allowed: hardened"):
            instances.add(db, inspected, vault=scene.world.vault, domain=domain, now=START)


@pytest.mark.usefixtures("few")
async def test_no_canary_is_drawn_twice_by_any_replica(serve: Serve) -> None:
    async with serve() as here, serve() as there:
        alice = here.person("alice")
        made = here.instance(owner=alice)
        items = [f"canary {number}".encode() for number in range(30)]
        with here.store.write() as db:
            assert canaries.add(db, here.vault, made.id, 0, items) == 30
            sealed = db.execute(select(pool.c.sealed)).scalars().all()
        assert not any(item in row for item in items for row in sealed)

        async def drawn(world: World) -> tuple[bytes, ...]:
            bundle, _ = await world.bundle(world.enclave(), alice, made.id)
            return bundle.canaries

        bundles = await asyncio.gather(*(drawn(world) for world in (here, there) for _ in range(5)))
        assert sorted(item for each in bundles for item in each) == sorted(items)
        assert sorted(map(len, bundles)) == [0, 0, 2, *[4] * 7]
        with here.store.read() as db:
            assert canaries.remaining(db, made.id, 0) == 0


@pytest.mark.usefixtures("few")
async def test_a_refused_release_draws_nothing(serve: Serve) -> None:
    async with serve() as world:
        poor = world.person("poor", budget=0)
        made = world.instance(owner=poor)
        with world.store.write() as db:
            canaries.add(db, world.vault, made.id, 0, [b"one"])
        assert await refusal(world.bundle(world.enclave(), poor, made.id)) == "budget_spent"
        with world.store.read() as db:
            assert canaries.remaining(db, made.id, 0) == 1


async def test_the_largest_canaries_of_one_bundle_fit_into_it(scene: Scene) -> None:
    with scene.world.store.write() as db:
        canaries.add(db, scene.world.vault, scene.old.id, 0, [bytes(canaries.ITEM_LIMIT)] * CANARIES_LIMIT)
        drawn = canaries.draw(db, scene.world.vault, scene.old.id, 0, CANARIES_LIMIT)
        assert sum(map(len, drawn)) == canaries.BUNDLE_BYTES
        assert canaries.remaining(db, scene.old.id, 0) == CANARIES_LIMIT - len(drawn)
    bundle, _ = await scene.lease()
    widest = bundle.model_copy(update={"canaries": drawn, "lease": bytes(4096), "link_certificate": bytes(4096)})
    assert Bundle.from_bytes(widest.to_bytes()).canaries == drawn


async def test_a_moved_canary_does_not_open(scene: Scene) -> None:
    with scene.world.store.write() as db:
        canaries.add(db, scene.world.vault, scene.old.id, 0, [b"one"])
        db.execute(pool.update().values(number=7))
        with pytest.raises(IntegrityError):
            canaries.draw(db, scene.world.vault, scene.old.id, 0, 1)


def test_canaries_come_as_a_cbor_sequence_or_as_json_lines(tmp_path: Path) -> None:
    items = [{"ids": [1, 2, 3]}, b"opaque", [1, [2]]]
    sequence = tmp_path / "canaries.cbor"
    sequence.write_bytes(b"".join(cbor2.dumps(item, canonical=True) for item in items))
    assert [cbor2.loads(item) for item in canaries.parse(sequence)] == items
    lines = tmp_path / "canaries.jsonl"
    lines.write_bytes(b'{"ids": [1, 2]}\r\n[3]\n')
    assert canaries.parse(lines) == [b'{"ids": [1, 2]}', b"[3]"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"[1]\n"),
        ("a.jsonl", b""),
        ("a.jsonl", b"[1]\n\n[2]\n"),
        ("a.jsonl", b"{\n"),
        ("a.jsonl", b'"' + b"a" * canaries.ITEM_LIMIT + b'"'),
        ("a.jsonl", b"[" * 100_000),
        ("a.cbor", b"\x82\x01"),
        ("a.cbor", b"\xff"),
        ("a.cbor", b"\x9f\x01\xff"),
        ("a.cbor", b"\x18\x01"),
        ("a.cbor", b"\xd8\x1c\x80"),
        ("a.cbor", b"\x81" * 1000),
        ("a.cbor", b"\x59\x10\x00" + bytes(4096)),
    ],
)
def test_a_file_of_canaries_is_refused_with(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError):
        canaries.parse(tmp_path / name)


def test_the_operator_rotates_an_instance_by_hand(place: Place) -> None:
    home, call = Home.open(place.home), place.call_here
    first = make_instance(place.folder / "first", home)
    second = make_instance(place.folder / "second", home, instance=first.id, epoch=1)
    call("instances", "add", str(first.directory), "--shared")
    call("instances", "add", str(second.directory), "--shared")
    (place.folder / "c.jsonl").write_text("[1]\n[2]\n")
    assert call("canaries", "add", first.id, "1", str(place.folder / "c.jsonl"))["left"] == 2
    assert {each["epoch"]: each["left"] for each in call("canaries", "list")} == {0: 0, 1: 2}
    states = [(each["epoch"], each["state"], each["canaries"]) for each in call("epochs", "list", first.id)["epochs"]]
    assert states == [(0, "active", 0), (1, "standby", 2)]
    assert call("epochs", "retire", first.id, "0", code=1)["error"]["code"] == "instance_refused"
    activated = call("epochs", "activate", first.id, "1", "--drain-seconds", "60")["epochs"]
    assert [each["state"] for each in activated] == ["draining", "active"]
    assert activated[0]["drain_until"] is not None
    assert [each["state"] for each in call("epochs", "retire", first.id, "0")["epochs"]] == ["removed", "active"]
    for arguments in (["activate", first.id, "0"], ["activate", first.id, "7"], ["retire", first.id, "1"]):
        assert call("epochs", *arguments, code=1)["error"]["code"] == "instance_refused"
    assert call("canaries", "add", first.id, "0", str(place.folder / "c.jsonl"), code=1)["error"]["code"] == (
        "instance_refused"
    )
    events = {entry["event"] for entry in call("audit-log", "list", "--last", "100")}
    assert {"instance_added", "epoch_added", "epoch_activated", "epoch_retired", "canaries_added"} <= events


async def test_an_epoch_with_running_sessions_is_retired_only_where_that_was_said(place: Place, serve: Serve) -> None:
    async with serve() as world:
        alice = world.person("alice")
        made = world.instance(owner=alice)
        world.instance(owner=alice, instance=made.id, epoch=1)
        await world.bundle(world.enclave(), alice, made.id)
        with world.store.write() as db:
            instances.activate(db, made.id, 1, drain_until=None)
    running = place.call_here("epochs", "list", made.id)["epochs"][0]["running_leases"]
    assert running == 1
    refused = place.call_here("epochs", "retire", made.id, "0", code=1)["error"]
    assert (refused["code"], "1 running leases" in refused["message"]) == ("instance_refused", True)
    assert place.call_here("epochs", "retire", made.id, "0", "--now")["epochs"][0]["state"] == "removed"
