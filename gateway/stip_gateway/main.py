"""Builds a gateway from its settings and runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc.aio
import structlog

from stip_gateway.admission import Admission
from stip_gateway.config import GatewaySettings
from stip_gateway.replicas import Replicas
from stip_gateway.service import GatewayService
from stip_protocol import rpc
from stip_protocol.runtime import logs
from stip_protocol.runtime.files import read_ed25519, read_file
from stip_protocol.runtime.probes import Check
from stip_protocol.runtime.rereading import on_hangup
from stip_protocol.runtime.serving import leave_with, serve
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import model_pb2_grpc


async def run(settings: GatewaySettings, reread: Callable[[], GatewaySettings]) -> None:
    """Serve until SIGTERM. On SIGHUP, take the routing table that `reread` gives.

    Raises `ConfigurationError` where a file cannot be used.
    """
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

    def take(wanted: GatewaySettings) -> Awaitable[None]:
        return service.reread(wanted.replicas)

    background = {
        "routing table": replicas.refresh(),
        "rereading": on_hangup(settings, reread, "replicas", take),
    }
    tasks = [asyncio.create_task(work) for work in background.values()]
    for task, what in zip(tasks, background, strict=True):
        leave_with(task, what)
    try:
        answers = Check("replicas", lambda: None if replicas.answering() else "no replica answers")
        await serve(settings.serving, telemetry, credentials, register, service.drain, ready=[answers])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await service.stop()
        await replicas.close()
