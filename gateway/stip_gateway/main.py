"""Builds a gateway from its settings and runs it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc.aio
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from stip_gateway.admission import Admission
from stip_gateway.config import GatewaySettings
from stip_gateway.replicas import Replicas
from stip_gateway.service import GatewayService
from stip_protocol import rpc
from stip_protocol.errors import ConfigurationError
from stip_protocol.runtime import logs
from stip_protocol.runtime.serving import serve
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import model_pb2_grpc


async def run(settings: GatewaySettings) -> None:
    """Serve until SIGTERM. Raises `ConfigurationError` where a file cannot be used."""
    logs.configure("gateway", simulated=settings.simulated, level=settings.serving.log_level)
    if settings.simulated:
        structlog.get_logger().warning("simulated evidence is accepted upstream: nothing is protected")
    telemetry = Telemetry("gateway", simulated=settings.simulated)
    replicas = Replicas(
        settings.replicas,
        roots=_read(settings.replica_ca),
        identity=(_read(settings.replica_certificate), _read(settings.replica_private_key)),
        limits=settings.limits,
    )
    admission = Admission(key=_ed25519(settings.service_key), audience=settings.audience, limit=settings.limits.leases)
    service = GatewayService(replicas, admission, settings.limits, telemetry)
    credentials = rpc.server_credentials(
        _read(settings.certificate), _read(settings.private_key), client_ca=_read(settings.link_ca)
    )

    def register(server: grpc.aio.Server) -> None:
        model_pb2_grpc.add_ModelServicer_to_server(service, server)

    refreshing = asyncio.create_task(replicas.refresh())
    try:
        await serve(settings.serving, telemetry, credentials, register, service.drain)
    finally:
        refreshing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await refreshing
        await replicas.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None


def _ed25519(path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(_read(path))
    except ValueError:
        raise ConfigurationError(f"{path}: not a PEM public key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigurationError.because(str(path), type(key).__name__, "an Ed25519 public key")
    return key
