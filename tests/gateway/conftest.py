"""A running gateway: with one replica and tight limits, or with two."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from stip_gateway.config import Limits
from tests.gateway.running import Running, running_gateway


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with running_gateway(Limits(sessions_per_link=3, links=2, retry_seconds=2.5)) as gateway:
        yield gateway


@pytest.fixture
async def pair() -> AsyncIterator[Running]:
    async with running_gateway(Limits(refresh_seconds=0.2), replicas=2) as gateway:
        yield gateway
