"""The leakage maxima at work: releases, renewals and instances on their way in, over sockets and processes."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from stip_keyservice.home import Home
from stip_keyservice.service import instances
from stip_keyservice.service.state.store import Store
from stip_keyservice.service.vault import open_vault
from stip_protocol import rpc
from stip_protocol.errors import LeakageRefused, StipError
from stip_protocol.release import Heartbeat

from .conftest import Serve, cell, make_instance, no_cell
from .place import Place, told_here

RULE: dict[str, Any] = {"knowledge": ["server"], "metric": "token_top1", "at_most": 0.2}
WELL = (cell("server", "A", token_top1=0.1), no_cell("base", "D"), cell("table", "B", token_top1=1.0))
BADLY = (cell("server", "A", token_top1=0.41),)
TOML = """
[leakage]
required = true
[[leakage.maxima]]
knowledge = ["server"]
metric = "token_top1"
at_most = 0.2
"""


async def refused(call: Any) -> StipError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return rpc.from_rpc(caught.value)


@pytest.mark.parametrize("kind", ["bundle", "grant"])
@pytest.mark.parametrize(
    ("measured", "said"), [(None, "was not audited"), (BADLY, "rule 1 .* reaches 0.41"), ([], "server was not audited")]
)
async def test_an_instance_that_the_maxima_refuse_gets_no_release_and_its_neighbour_does(
    serve: Serve, policy_tables: dict[str, Any], measured: Any, said: str, kind: str
) -> None:
    policy_tables["leakage"] = {"maxima": [RULE]}
    async with serve() as world:
        alice, enclave = world.person("alice"), world.enclave()
        refused_one = world.instance(members=(alice,), measured=measured)
        served = world.instance(members=(alice,), measured=WELL)
        delegation = alice.delegate(enclave, refused_one.id)
        error = await refused(world.release(enclave, delegation, refused_one.id, kind=kind))
        assert isinstance(error, LeakageRefused)
        with pytest.raises(LeakageRefused, match=said):
            raise error
        assert world.user(alice).spent == 0
        entry = world.entries()[-1]
        assert (entry.event, entry.code, entry.kind, entry.instance, entry.tokens) == (
            "release", "leakage_refused", kind, refused_one.id, None,
        )  # fmt: skip
        assert entry.user == world.user(alice).id
        sample = world.telemetry.registry.get_sample_value
        assert sample("stip_refusals_total", {"code": "leakage_refused"}) == 1
        await world.release(enclave, alice.delegate(enclave, served.id), served.id, kind=kind)


async def test_a_dedicated_instance_is_refused_like_a_shared_one(serve: Serve, policy_tables: dict[str, Any]) -> None:
    policy_tables["leakage"] = {"required": True}
    async with serve() as world:
        alice, enclave = world.person("alice"), world.enclave()
        instance = world.instance(owner=alice)
        assert isinstance(await refused(world.bundle(enclave, alice, instance.id)), LeakageRefused)
        await world.bundle(enclave, alice, world.instance(owner=alice, measured=BADLY).id)


async def test_who_may_not_use_an_instance_is_not_told_what_leaks_from_it(
    serve: Serve, policy_tables: dict[str, Any]
) -> None:
    policy_tables["leakage"] = {"maxima": [RULE]}
    async with serve() as world:
        mallory, enclave = world.person("mallory"), world.enclave()
        instance = world.instance(owner=world.person("alice"), measured=BADLY)
        error = await refused(world.bundle(enclave, mallory, instance.id))
        assert error.code == "user_refused"


async def test_a_stricter_policy_ends_running_leases_at_their_next_heartbeat(
    serve: Serve, policy_tables: dict[str, Any]
) -> None:
    async with serve() as before:
        alice = before.person("alice")
        instance, audited = before.instance(owner=alice), before.instance(owner=alice, measured=WELL)
        enclave = before.enclave()
        _, lease = await before.bundle(enclave, alice, instance.id)
        _, other = await before.bundle(enclave, alice, audited.id)
        answered = Heartbeat(handle=lease.handle, serial=0, nonce=bytes(32), fed=10, wanted=10)
        await before.send(answered, enclave)
    policy_tables["leakage"] = {"maxima": [RULE]}
    async with serve() as after:
        spent = after.user(alice).spent
        again = answered.model_copy(update={"serial": 1})
        for beat in (again, answered):
            error = await refused(after.send(beat, enclave))
            assert isinstance(error, LeakageRefused)
            assert "token_top1 at most 0.2 with server" in error.message
            entry = after.entries()[-1]
            assert (entry.event, entry.code, entry.instance) == ("renewal", "leakage_refused", instance.id)
        assert after.user(alice).spent == spent
        _, renewed = await after.renew(enclave, other, fed=10, wanted=10)
        assert renewed.serial == 1
    del policy_tables["leakage"]
    async with serve() as relaxed:
        await relaxed.send(again, enclave)


async def test_a_damaged_summary_is_a_refusal_and_not_an_audit_that_passed(
    serve: Serve, policy_tables: dict[str, Any]
) -> None:
    policy_tables["leakage"] = {"maxima": [RULE]}
    async with serve() as world:
        alice, enclave = world.person("alice"), world.enclave()
        instance = world.instance(owner=alice, measured=WELL)
        with sqlite3.connect(world.home.database) as db:
            db.execute("UPDATE leakage_summaries SET summary = ?", (b'{"cells": []}',))
        db.close()
        error = await refused(world.bundle(enclave, alice, instance.id))
        assert error.code == "integrity_violated"
        assert (world.entries()[-1].code, world.user(alice).spent) == ("integrity_violated", 0)


def test_what_was_measured_is_stored_as_it_was_signed(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    made = [make_instance(tmp_path / name, home, measured=it) for name, it in (("audited", WELL), ("plain", None))]
    store = Store(home.database)
    for one in made:
        inspected = instances.inspect(one.directory, home.developer.public_key(), home.sealing)
        with store.write() as db:
            instances.add(db, inspected, vault=open_vault(home), domain=None, now=1)
    store.close()
    reopened = Store(home.database)
    with reopened.read() as db:
        audited, plain = (instances.by_id(db, one.id).epochs[0].leakage for one in made)
    reopened.close()
    assert audited is not None
    assert audited.cells == WELL
    assert plain is None


def add(place: Place, directory: Path, policy: str) -> list[str]:
    path = place.folder / "strict.toml"
    path.write_text((place.folder / "policy.toml").read_text() + policy)
    return ["instances", "add", str(directory), "--shared", "--policy", str(path)]


@pytest.mark.parametrize("measured", [None, BADLY], ids=["not audited", "above"])
def test_add_with_a_policy_refuses_at_once_what_it_would_refuse_at_release(place: Place, measured: Any) -> None:
    made = make_instance(place.folder / "instance", Home.open(place.home), measured=measured)
    refusal = place.call(*add(place, made.directory, TOML), code=1)["error"]
    assert (refusal["code"], refusal["action"]) == ("leakage_refused", "fix_configuration")
    assert place.call_here("instances", "list") == []
    (entry,) = place.call_here("audit-log", "list")
    assert (entry["event"], entry["code"], entry["instance"]) == ("instance_added", "leakage_refused", made.id)
    # the same instance can be added where the policy is another
    assert place.call_here(*add(place, made.directory, ""))["id"] == made.id


def test_add_with_a_policy_that_cannot_be_read_adds_nothing(place: Place) -> None:
    made = make_instance(place.folder / "instance", Home.open(place.home), measured=WELL)
    assert place.call_here(*add(place, made.directory, "[leakage]"), code=2)["error"]["code"] == "policy_invalid"
    assert not (place.home / "state.db").exists()


@pytest.mark.parametrize(("measured", "said"), [(None, "is not audited"), (BADLY, "is audited")])
def test_add_without_a_policy_says_that_the_policy_decides_at_release(place: Place, measured: Any, said: str) -> None:
    made = make_instance(place.folder / "instance", Home.open(place.home), measured=measured)
    done = told_here("instances", "add", str(made.directory), "--shared", "--home", str(place.home))
    assert done.exit_code == 0
    assert said in done.stderr
    assert "the policy decides at release" in done.stderr
    another = make_instance(place.folder / "another", Home.open(place.home), measured=measured)
    alone = told_here(*add(place, another.directory, ""), "--home", str(place.home))
    assert alone.exit_code == 0
    assert "decides at release" not in alone.stderr


def test_list_and_show_say_what_was_measured(place: Place) -> None:
    home = Home.open(place.home)
    audited = make_instance(place.folder / "audited", home, measured=WELL)
    plain = make_instance(place.folder / "plain", home)
    for made in (audited, plain):
        place.call_here("instances", "add", str(made.directory), "--shared")
    listed = {one["id"]: one["epochs"][0]["leakage"] for one in place.call_here("instances", "list")}
    assert listed[plain.id] is None
    assert listed[audited.id]["worst"] == {
        "server": {"upper": 0.1, "metric": "token_top1", "attack": "A"},
        "base": None,
        "table": {"upper": 1.0, "metric": "token_top1", "attack": "B"},
    }
    shown = place.call_here("instances", "show", audited.id)
    assert shown["epochs"][0]["leakage"] == listed[audited.id]
    assert [(one["knowledge"], one["attack"]) for one in shown["cells"]] == [
        ("server", "A"), ("base", "D"), ("table", "B"),
    ]  # fmt: skip
    assert place.call_here("instances", "show", plain.id)["cells"] == []
    assert place.call_here("instances", "show", "0" * 32, code=1)["error"]["code"] == "instance_refused"


def test_list_and_show_for_people_round_bounds_up(place: Place) -> None:
    leaky = (cell("server", "A", token_top1=0.20001), no_cell("base", "D"))
    made = make_instance(place.folder / "instance", Home.open(place.home), measured=leaky)
    place.call_here("instances", "add", str(made.directory), "--shared")
    listed = told_here("instances", "list", "--home", str(place.home))
    assert "server 20.1 %, base -" in listed.stdout
    shown = told_here("instances", "show", made.id, "--home", str(place.home))
    assert "16.0 % to 20.1 %" in shown.stdout
    assert "there is no public base" in shown.stdout


def test_serve_says_at_start_which_instances_its_policy_refuses(place: Place) -> None:
    home = Home.open(place.home)
    made = {
        name: make_instance(place.folder / name, home, measured=measured)
        for name, measured in (("plain", None), ("badly", BADLY), ("well", WELL))
    }
    for one in made.values():
        place.call_here("instances", "add", str(one.directory), "--shared")
    with place.service() as (_, log):
        pass
    assert not [line for line in log if "leakage_refused" in line]
    with (place.folder / "policy.toml").open("a") as policy:
        policy.write(TOML)
    with place.service() as (_, log):
        pass
    said = {line["instance"]: line for line in map(json.loads, log) if line.get("code") == "leakage_refused"}
    assert said.keys() == {made["plain"].id, made["badly"].id}
    assert "was not audited" in said[made["plain"].id]["reason"]
    assert "token_top1 at most 0.2 with server" in said[made["badly"].id]["reason"]
    assert {line["level"] for line in said.values()} == {"warning"}


def test_policy_check_shows_the_maxima(place: Place) -> None:
    path = place.folder / "policy.toml"
    plain = json.loads(told_here("policy", "check", str(path), "--json").stdout)
    assert (plain["leakage_required"], plain["leakage_maxima"]) == (False, [])
    with path.open("a") as policy:
        policy.write(TOML + 'attacks = ["A", "B"]\n')
    strict = json.loads(told_here("policy", "check", str(path), "--json").stdout)
    assert strict["leakage_required"]
    assert strict["leakage_maxima"] == [RULE | {"attacks": ["A", "B"], "presets": None}]
    assert strict["digest"] != plain["digest"]
    table = told_here("policy", "check", str(path))
    assert "token_top1 at most 0.2 with server; attacks A, B" in table.stdout
