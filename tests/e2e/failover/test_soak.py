"""Ten minutes of sixteen streams: every part holds at the end what it held before. `make test-long`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from statistics import median

import pytest

import stip
from stip_protocol import telemetry
from stip_stack.footprint import Footprint
from stip_stack.latency import gauge
from stip_stack.trials import Served
from tests.e2e.conftest import System

SEED = 31_000
STREAMS = 16
WARM_SECONDS = 150.0
"""Allocators, caches and histories of ended sessions fill up to their bounds."""
MEASURED_SECONDS = 600.0
SAMPLE_SECONDS = 5.0
SHARE = 0.02
"""By which the memory at the end may differ from the memory at the beginning."""
POOLS = 4
"""Descriptors and threads by which pools may still fill up, such as the key service's connections to its database. A
leak by session would be one for each of at least `LEAST_SESSIONS`."""
LEAST_SESSIONS = 100 * POOLS
SESSIONS, TASKS, LINKS = telemetry.SESSIONS, telemetry.TASKS, telemetry.LINKS


async def _stream(connection: stip.AsyncConnection, served: Served, seed: int, wanted: Callable[[], bool]) -> int:
    """One session after the other; how many there were."""
    generator, count = random.Random(seed), 0
    while wanted():
        for job in served.mixed(4, seed=generator.randrange(2**31)):
            job.until = generator.randint(1, job.max_tokens) if generator.random() < 0.3 else None
            async with await connection.session() as session:
                answer = await job.run(session)
            count += 1
        served.require_plain(job, answer)
    return count


def _held(system: System) -> dict[str, Footprint]:
    return {name: Footprint.of_tree(process.pid) for name, process in system.stack.processes.items()}


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_ten_minutes_of_sixteen_streams_leave_every_part_as_it_was(failover: System) -> None:
    instances = list(failover.served.values())
    began = time.monotonic()
    end = began + WARM_SECONDS + MEASURED_SECONDS
    connections = [await stip.aconnect(served.profile) for served in instances]
    samples: list[dict[str, Footprint]] = []
    try:
        async with asyncio.TaskGroup() as group:
            places = [number % len(instances) for number in range(STREAMS)]
            streams = [
                group.create_task(
                    _stream(connections[at], instances[at], SEED + number, lambda: time.monotonic() < end)
                )
                for number, at in enumerate(places)
            ]
            await asyncio.sleep(WARM_SECONDS)
            while time.monotonic() < end:
                samples.append(_held(failover))
                await asyncio.sleep(SAMPLE_SECONDS)
    finally:
        for connection in connections:
            await connection.close()
    assert sum(stream.result() for stream in streams) > LEAST_SESSIONS
    third = len(samples) // 3
    grown = {}
    for name in samples[0]:
        before, after = (median(each[name].pss for each in part) for part in (samples[:third], samples[-third:]))
        if abs(after - before) > SHARE * before:
            grown[name] = f"{before / 1e6:.1f} to {after / 1e6:.1f} MB"
    assert not grown
    for name in samples[0]:
        fds = [each[name].fds for each in samples]
        threads = [each[name].threads for each in samples]
        assert max(fds[-third:]) <= max(fds[:third]) + POOLS, name
        assert max(threads[-third:]) <= max(threads[:third]) + POOLS, name
    await _require_nothing_left(failover)


async def _require_nothing_left(system: System) -> None:
    """No session, no KV slot (a server's session holds one), no task of one, once all clients have gone."""
    parts = [name for name in system.stack.processes if name.split("-")[0] in ("enclave", "gateway", "server")]
    async with asyncio.timeout(30):
        while any(gauge(system.stack.processes[name].metrics, SESSIONS) for name in parts):  # noqa: ASYNC110 - of others
            await asyncio.sleep(0.1)
    for name in parts:
        # What a part runs for itself and for its links, however many sessions it had.
        tasks = gauge(system.stack.processes[name].metrics, TASKS)
        links = gauge(system.stack.processes[name].metrics, LINKS)
        assert tasks <= 12 + 6 * links, name
