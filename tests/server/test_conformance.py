"""The conformance suite over the engines that need no installation of their own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from stip_server.config import TransformersSettings
from stip_server.engine import Engine, Form
from stip_server.engines.transformers import TransformersEngine, card_for, split
from tests.server.conformance import Check, Model, Wanted, checks
from tests.server.scripted import ScriptedEngine


@contextlib.asynccontextmanager
async def scripted(wanted: Wanted) -> AsyncIterator[tuple[Engine, Model]]:
    engine = ScriptedEngine(
        slots=wanted.slots, max_positions=wanted.positions, idle_seconds=wanted.idle_seconds, chunk=5
    )
    yield engine, engine.model


@pytest.mark.parametrize("check", checks(set(Form), max_outputs=8), ids=str)
async def test_the_scripted_engine_conforms(check: Check) -> None:
    await check.run(scripted)


@pytest.mark.parametrize("check", checks(set(Form), max_outputs=8), ids=str)
async def test_the_transformers_engine_conforms(plain: Any, check: Check) -> None:
    @contextlib.asynccontextmanager
    async def transformers(wanted: Wanted) -> AsyncIterator[tuple[Engine, Model]]:
        settings = TransformersSettings(
            slots=wanted.slots, max_positions=wanted.positions, idle_seconds=wanted.idle_seconds, prefill_chunk=5
        )
        base, head = split(plain.model)
        yield TransformersEngine(base, head, card_for(base, head, settings), settings), plain

    await check.run(transformers)
