"""Key services for the table: one a section and policy, opened when a row first needs it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from stip_stack.tee import SimulatedPlatform
from tests.keyservice.conftest import MEASUREMENT, START, Clock, World, served
from tests.refusals.forge import Forge
from tests.refusals.scene import Service
from tests.refusals.table import Case, Rules, Section

Services = Callable[[Section, Case], Awaitable[Service]]


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("tee") / "platform", now=START - 3600)


@pytest.fixture(scope="session")
def forge(platform: SimulatedPlatform) -> Forge:
    return Forge.of(platform, START)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Forge:
    """A platform with a root of its own."""
    made = SimulatedPlatform.create(tmp_path_factory.mktemp("tee") / "stranger", now=START - 3600)
    return Forge.of(made, START)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def services(
    platform: SimulatedPlatform, forge: Forge, stranger: Forge, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Services]:
    opened: dict[str, Service] = {}
    async with AsyncExitStack() as stack:

        async def service(section: Section, case: Case) -> Service:
            tables = merged(ordinary(platform), case.rules, forge)
            limits = merged({"rates": {}}, case.limits, forge)
            name = json.dumps([section.title, tables, limits])
            if name not in opened:
                folder = tmp_path_factory.mktemp("service")
                world = await stack.enter_async_context(served(folder, platform, tables, limits=limits))

                async def another(*, replica: World | None = None, ahead: int = 0, rules: Rules, **own: Any) -> World:
                    where = tmp_path_factory.mktemp("another") if replica is None else folder
                    clock = Clock(world.clock.now + ahead)
                    told = merged(tables, rules, forge)
                    return await stack.enter_async_context(served(where, platform, told, clock, limits=limits, **own))

                opened[name] = Service(world, forge, stranger, another, stack)
            return opened[name]

        yield service


def ordinary(platform: SimulatedPlatform) -> dict[str, dict[str, Any]]:
    """A policy that accepts one measurement of one simulated TEE, as its file says it."""
    return {
        "evidence": {
            "mode": "development",
            "measurements": [MEASUREMENT.hex()],
            "simulated_root_sha256": platform.root_sha256.hex(),
        },
        "lease": {"seconds": 900, "tokens": 1000, "heartbeat_tokens": 64, "audience": "gateway.test"},
        "release": {"nonce_seconds": 60},
    }


def merged(tables: dict[str, dict[str, Any]], rules: Rules, forge: Forge) -> dict[str, dict[str, Any]]:
    made: dict[str, Any] = {name: dict(values) for name, values in tables.items()}
    for name, values in rules.items():
        if not isinstance(values, Mapping):
            made[name] = values
            continue
        told = {key: value(forge) if callable(value) else value for key, value in values.items()}
        made[name] = made.get(name, {}) | told
    return made
