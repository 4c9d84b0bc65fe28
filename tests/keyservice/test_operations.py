"""What a key service says of itself to its operators: ready or not, and why; its state as numbers without names."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

import pytest
from prometheus_client import generate_latest
from sqlalchemy import text
from structlog.testing import capture_logs

from stip_keyservice.service import operations as module
from stip_keyservice.service.operations import Operations
from stip_protocol.runtime.probes import Runner

from .conftest import START, World, refusal


@pytest.fixture
def operations(world: World) -> Operations:
    assert world.servicer is not None
    return Operations(world.home, world.store, world.servicer._issuer, world.telemetry)


def failing(operations: Operations) -> set[str]:
    return {name for name, reason in Runner(operations.ready()).answer().checks.items() if reason is not None}


async def test_it_is_ready_until_the_clock_or_the_collateral_is_not(world: World, operations: Operations) -> None:
    assert failing(operations) == set()
    alice = world.person("alice")
    await world.bundle(world.enclave(), alice, world.instance(owner=alice).id)
    world.clock.now = START - 3600
    assert failing(operations) == {"clock"}
    world.clock.now = START
    now = int(time.time())
    shelves = [(now - 100, now + 100), (now - 200, now - 50)]
    operations.watch_collateral(lambda: shelves)
    assert failing(operations) == set()
    assert world.telemetry.registry.get_sample_value("stip_collateral_age_seconds") == pytest.approx(200, abs=5)
    shelves[0] = (now - 100, now - 1)
    assert failing(operations) == {"collateral"}


async def test_a_state_that_does_not_answer_is_not_ready_and_hides_no_other_number(
    world: World, operations: Operations
) -> None:
    with world.store.write() as db:
        db.exec_driver_sql("ALTER TABLE leases RENAME TO gone")
    (world.folder / "home" / "state.db").rename(world.folder / "elsewhere")
    (world.folder / "home" / "state.db").mkdir()
    world.store.close()
    assert "store" in failing(operations)
    value = world.telemetry.registry.get_sample_value
    assert math.isnan(value("stip_leases") or 0.0)
    assert b"stip_audit_log_entries" in generate_latest(world.telemetry.registry)


async def test_numbers_follow_the_state_and_name_nobody(world: World, operations: Operations) -> None:
    value = world.telemetry.registry.get_sample_value
    alice = world.person("alice")
    instance = world.instance(owner=alice)
    _, lease = await world.bundle(world.enclave(), alice, instance.id)
    assert (value("stip_leases"), value("stip_revocations")) == (1, 0)
    assert value("stip_decisions_total", {"event": "release", "code": "granted"}) == 1
    assert (value("stip_store_seconds_count", {"kind": "write"}) or 0) > 0
    world.clock.now = lease.expires + 1
    assert value("stip_leases") == 0
    operations.limited("release")
    operations.streams(3)
    assert value("stip_rate_limited_total", {"kind": "release"}) == 1
    assert value("stip_control_streams") == 3
    text = generate_latest(world.telemetry.registry).decode()
    user = world.user(alice)
    for name in (user.id, user.name, user.devices[0].id, instance.id, lease.handle.hex()):
        assert name not in text


async def test_a_state_that_fails_while_refusals_are_written_ends_nothing_and_loses_none(
    world: World, operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HOUSEKEEPING_SECONDS", 0.02)
    alice = world.person("alice")
    instance, enclave = world.instance(owner=alice), world.enclave()
    delegation = alice.delegate(enclave, instance.id)
    claims = enclave.claims(await world.challenge(), delegation, instance.id).model_copy(update={"nonce": bytes(32)})
    for _ in range(10):
        assert await refusal(world.stub.Release(enclave.request(claims, delegation))) == "nonce_refused"
    world.clock.now += 60
    with world.store.write() as db:
        db.execute(text("CREATE TRIGGER no BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no'); END"))
    keeping = asyncio.create_task(operations.keep_house())
    try:
        with capture_logs() as logs:
            await until(lambda: keeping.done() or len(logs) > 1)
        assert not keeping.done()
        with world.store.write() as db:
            db.execute(text("DROP TRIGGER no"))
        await until(lambda: world.entries()[-1].event == "refusals_folded")
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    assert world.entries()[-1].count == 2


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - what is waited for runs in a thread
            await asyncio.sleep(0.01)
