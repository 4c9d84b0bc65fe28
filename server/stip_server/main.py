"""Puts a model server together and runs it."""

from __future__ import annotations

import asyncio

import structlog

from stip_protocol.rpc import server_credentials
from stip_protocol.runtime import logs
from stip_protocol.runtime.files import read_ed25519, read_file
from stip_protocol.runtime.probes import Check
from stip_protocol.runtime.serving import leave_with, serve
from stip_protocol.telemetry import Telemetry
from stip_server.config import ServerSettings
from stip_server.engines.factories import FACTORIES
from stip_server.service import ModelService


async def run(settings: ServerSettings) -> None:
    """Load, serve until SIGTERM, drain. Raises `ConfigurationError` or `IntegrityError` before it listens."""
    logs.configure("server", simulated=settings.simulated, level=settings.serving.log_level)
    log = structlog.get_logger()
    credentials = server_credentials(
        read_file(settings.certificate, field="certificate"),
        read_file(settings.private_key, field="private_key"),
        client_ca=read_file(settings.client_ca, field="client_ca"),
    )
    developer = read_ed25519(settings.developer_key, field="developer_key")
    engine = await FACTORIES[settings.engine.kind](settings.instance, developer, settings.engine)
    card, kind = engine.card, settings.engine.kind
    log.info("loaded", engine=kind, instance=card.instance, epoch=card.epoch, preset=card.preset, dtype=card.dtype)
    telemetry = Telemetry("server", simulated=settings.simulated)
    service = ModelService(engine, telemetry, name=settings.name, drain_seconds=settings.serving.drain_seconds)
    pump = asyncio.create_task(service.pump())
    leave_with(pump, "engine")
    try:
        loaded = Check("model", lambda: "the engine has stopped" if pump.done() else None)
        await serve(settings.serving, telemetry, credentials, service.register, service.drain, ready=[loaded])
    finally:
        await engine.stop()
        await pump
