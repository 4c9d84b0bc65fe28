"""Several model servers behind the real gateway: killed, drained, and overloaded in the middle of answers."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

PROMPTS = [np.random.default_rng(number).integers(3, 151, 5 + 3 * number).tolist() for number in range(6)]


async def turns(world: Any, delegation: bytes, count: int) -> tuple[list[Any], list[list[int]]]:
    """Sessions in the middle of a turn, and the first token of each."""
    clients = [await world.opened(delegation) for _ in PROMPTS]
    for number, client in enumerate(clients):
        await client.begin(PROMPTS[number], max_tokens=count, temperature=0.75, seed=number)
    return clients, [[(await client.read()).step.id] for client in clients]


async def finished(world: Any, clients: list[Any], given: list[list[int]], count: int) -> None:
    for number, client in enumerate(clients):
        tokens, kind = await client.rest()
        expected = world.protected.generate(PROMPTS[number], count, temperature=0.75, seed=number)
        assert (given[number] + tokens, kind) == (expected, 2)


@pytest.mark.parametrize("preset", ["hardened", "paper", "throughput"])
async def test_answers_go_on_when_a_model_server_is_gone(world: Any, developer: Any, preset: str) -> None:
    await world.start(developer.protected("llama", preset), replicas=2)
    delegation = world.delegate(world.person("ada"))
    clients, given = await turns(world, delegation, 25)
    assert [service.sessions for service, _ in world.replicas] == [3, 3]
    await world.replicas[0][1].stop(0)
    await finished(world, clients, given, 25)
    assert world.replicas[1][0].sessions == 6
    client = await world.opened(delegation)
    assert (await client.turn(PROMPTS[0], max_tokens=4))[1] == 2


@pytest.mark.parametrize("preset", ["hardened", "throughput"])
async def test_answers_go_on_when_a_model_server_drains(world: Any, developer: Any, preset: str) -> None:
    await world.start(developer.protected("llama", preset), replicas=2)
    clients, given = await turns(world, world.delegate(world.person("ada")), 40)
    draining = asyncio.create_task(world.replicas[0][0].drain())
    await finished(world, clients, given, 40)
    await asyncio.wait_for(draining, 10)
    assert [(await client.turn([40], max_tokens=2))[1] for client in clients] == [2] * 6  # also of those that rested
    assert [service.sessions for service, _ in world.replicas] == [0, 6]
