"""Builds a gateway from its settings and runs it."""

from __future__ import annotations

import asyncio
import contextlib

import grpc.aio
import structlog

from stip_gateway.admission import Admission
from stip_gateway.config import GatewaySettings
from stip_gateway.replicas import Replicas
from stip_gateway.service import GatewayService
from stip_protocol import rpc
from stip_protocol.runtime import logs
from stip_protocol.runtime.files import read_ed25519, read_file
from stip_protocol.runtime.serving import leave_with, serve
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import model_pb2_grpc


async def run(settings: GatewaySettings) -> None:
    """Serve until SIGTERM. Raises `ConfigurationError` where a file cannot be used."""
    logs.configure("gateway", simulated=settings.simulated, level=settings.serving.log_level)
    if settings.simulated:
        structlog.get_logger().warning("simulated evidence is accepted upstream: nothing is protected")
    telemetry = Telemetry("gateway", simulated=settings.simulated)
    identity = (
        read_file(settings.replica_certificate, field="replica_certificate"),
        read_file(settings.replica_private_key, field="replica_private_key"),
    )
    roots = read_file(settings.replica_ca, field="replica_ca")
    replicas = Replicas(settings.replicas, roots=roots, identity=identity, limits=settings.limits)
    key = read_ed25519(settings.service_key, field="service_key")
    admission = Admission(key=key, audience=settings.audience, limit=settings.limits.leases)
    service = GatewayService(
        replicas, admission, settings.limits, telemetry, drain_seconds=settings.serving.drain_seconds
    )
    credentials = rpc.server_credentials(
        read_file(settings.certificate, field="certificate"),
        read_file(settings.private_key, field="private_key"),
        client_ca=read_file(settings.link_ca, field="link_ca"),
    )

    def register(server: grpc.aio.Server) -> None:
        model_pb2_grpc.add_ModelServicer_to_server(service, server)

    refreshing = asyncio.create_task(replicas.refresh())
    leave_with(refreshing, "routing table")
    try:
        await serve(settings.serving, telemetry, credentials, register, service.drain)
    finally:
        refreshing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await refreshing
        await replicas.close()
