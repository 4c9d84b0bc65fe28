"""Two worlds for the enclave.

`bench`: a toy instance behind scripted replicas: what an enclave should generate is known, and what a replica says can
be bent. `world`: the real parts with protected tiny models.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stip_enclave.lease import LeaseAccount
from stip_keyservice.home import Home
from stip_stack.tee import SimulatedPlatform
from tests.enclave.bench import Bench, Unbounded, held_lease, make_bench
from tests.enclave.toy import Toy, make_toy
from tests.enclave.world import Developer, World

torch.set_num_threads(1)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Bench]]]:
    """Makes benches: `await bench(preset=..., limits=..., replicas=...)`."""
    async with contextlib.AsyncExitStack() as stack:
        yield lambda **options: make_bench(stack, tmp_path, **options)


@pytest.fixture
def toys(tmp_path: Path) -> Callable[..., Toy]:
    """Makes toy instance directories."""
    return lambda **options: make_toy(tmp_path / secrets.token_hex(4), **options)


@pytest.fixture
def leases() -> Callable[..., tuple[LeaseAccount, Unbounded]]:
    """Makes a lease account and the key service that stands behind it."""

    def make(
        *,
        tokens: int = 100,
        heartbeat_tokens: int = 8,
        chunk: int = 100,
        expires: int = 2**39,
        clock: Callable[[], float] = time.time,
    ) -> tuple[LeaseAccount, Unbounded]:
        renewing = Unbounded()
        held = held_lease(tokens=tokens, expires=expires)
        options: dict[str, Any] = {"heartbeat_tokens": heartbeat_tokens, "chunk": chunk, "clock": clock}
        return LeaseAccount(held, renewing, **options), renewing

    return make


@pytest.fixture(scope="session")
def developer(tmp_path_factory: pytest.TempPathFactory) -> Developer:
    folder = tmp_path_factory.mktemp("developer")
    platform = SimulatedPlatform.create(folder / "tee")
    return Developer(Home.open(folder / "home"), platform, folder)


@pytest.fixture
async def world(developer: Developer, tmp_path: Path) -> AsyncIterator[World]:
    """Not started: `await world.start(developer.protected("llama", "hardened"))`."""
    async with contextlib.AsyncExitStack() as stack:
        yield World(developer, stack, tmp_path)
