"""Puts a model server together and runs it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import structlog
import torch
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from stip_protocol.errors import ConfigurationError
from stip_protocol.rpc import server_credentials
from stip_protocol.runtime import logs
from stip_protocol.runtime.serving import serve
from stip_protocol.telemetry import Telemetry
from stip_server.config import ServerSettings
from stip_server.engines.transformers import TransformersEngine, card_for, load
from stip_server.service import ModelService


async def run(settings: ServerSettings) -> None:
    """Load, serve until SIGTERM, drain. Raises `ConfigurationError` or `IntegrityError` before it listens."""
    logs.configure("server", simulated=settings.simulated, level=settings.serving.log_level)
    log = structlog.get_logger()
    credentials = server_credentials(
        _read(settings.certificate, "certificate"),
        _read(settings.private_key, "private_key"),
        client_ca=_read(settings.client_ca, "client_ca"),
    )
    device = settings.engine.device
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigurationError.because("engine.device", device, "cpu (this machine offers no CUDA device)")
    loaded = load(settings.instance, _developer(settings.developer_key), device)
    card = card_for(loaded.model, loaded.head, settings.engine, manifest=loaded.manifest, digest=loaded.digest)
    engine = TransformersEngine(loaded.model, loaded.head, card, settings.engine)
    log.info("loaded", instance=card.instance, epoch=card.epoch, preset=card.preset, dtype=card.dtype)
    telemetry = Telemetry("server", simulated=settings.simulated)
    service = ModelService(engine, telemetry, name=settings.name, drain_seconds=settings.serving.drain_seconds)
    pump = asyncio.create_task(service.pump())
    pump.add_done_callback(_leave_with_the_engine)
    try:
        await serve(settings.serving, telemetry, credentials, service.register, service.drain)
    finally:
        await engine.stop()
        await pump


def _leave_with_the_engine(pump: asyncio.Task[None]) -> None:
    """A server whose engine died only looks alive: leave, so that whoever supervises the process starts another."""
    if not pump.cancelled() and pump.exception() is not None:
        structlog.get_logger().error("engine failed", exc_info=pump.exception())
        signal.raise_signal(signal.SIGTERM)


def _developer(path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(_read(path, "developer_key"))
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigurationError.because("developer_key", "no public key", "PEM of an Ed25519 public key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigurationError.because("developer_key", "a key of another kind", "PEM of an Ed25519 public key")
    return key


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{field}: {path}: {error.strerror}", field=field) from None
