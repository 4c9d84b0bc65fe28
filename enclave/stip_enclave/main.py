"""Builds an enclave from its settings and runs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import grpc.aio
import structlog
import torch

from stip_enclave.accounts import Accounts
from stip_enclave.config import EnclaveSettings
from stip_enclave.control import ControlStream
from stip_enclave.guards import harden_process
from stip_enclave.identity import EnclaveIdentity
from stip_enclave.instances import Instances
from stip_enclave.release import ReleaseClient
from stip_enclave.service import EnclaveService
from stip_protocol import rpc
from stip_protocol.attestation.evidence import EvidenceProvider
from stip_protocol.errors import ConfigurationError
from stip_protocol.runtime import logs
from stip_protocol.runtime.files import read_ed25519, read_file
from stip_protocol.runtime.probes import Check
from stip_protocol.runtime.rereading import on_hangup
from stip_protocol.runtime.serving import leave_with, serve
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import enclave_pb2_grpc


async def run(settings: EnclaveSettings, provider: EvidenceProvider, reread: Callable[[], EnclaveSettings]) -> None:
    """Serve until SIGTERM, with evidence from `provider`. On SIGHUP, take the list of instances that `reread` gives.

    Raises `ConfigurationError` where a file cannot be used or `settings.simulated` and the provider disagree, and
    `IntegrityError` subclasses for a manifest that is not the developer's.
    """
    if settings.simulated != provider.simulated:
        raise ConfigurationError.because("simulated", settings.simulated, f"{provider.simulated}, as the evidence is")
    logs.configure("enclave", simulated=provider.simulated, level=settings.serving.log_level)
    harden_process()
    if provider.simulated:
        structlog.get_logger().warning("simulated evidence: nothing is protected")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    telemetry = Telemetry("enclave", simulated=provider.simulated)
    evidence_ends = time.time() + settings.certificate_hours * 3600
    identity = await asyncio.to_thread(
        EnclaveIdentity.create,
        provider,
        dns_name=settings.dns_name,
        lifetime=int(settings.certificate_hours * 3600),
        now=int(time.time()),
    )
    gateway, keyservice, limits = settings.gateway, settings.keyservice, settings.limits
    gateway_roots = read_file(gateway.ca, field="gateway.ca")

    def connect(link_certificate: bytes) -> grpc.aio.Channel:
        return rpc.channel(
            gateway.address,
            roots=gateway_roots,
            identity=identity.link_credentials(link_certificate),
            server_name=gateway.server_name,
        )

    developer = read_ed25519(settings.developer_key, field="developer_key")
    instances = Instances(settings.instances, developer, connect, limits, telemetry)
    channel = rpc.channel(
        keyservice.address, roots=read_file(keyservice.ca, field="keyservice.ca"), server_name=keyservice.server_name
    )
    releases = ReleaseClient(
        channel,
        read_ed25519(keyservice.service_key, field="keyservice.service_key"),
        provider,
        identity,
        telemetry,
        audience=gateway.audience,
        timeout=limits.key_service_seconds,
    )
    accounts = Accounts(releases, instances, limits, telemetry)
    control = ControlStream(releases, accounts, telemetry)
    service = EnclaveService(identity, provider, accounts, limits, telemetry)
    credentials = rpc.server_credentials(identity.tls.certificate_pem, identity.tls.private_key_pem, client_ca=None)

    def register(server: grpc.aio.Server) -> None:
        enclave_pb2_grpc.add_EnclaveServicer_to_server(service, server)

    def take(wanted: EnclaveSettings) -> Awaitable[None]:
        return instances.reread(wanted.instances)

    background = {
        "control stream": control.run(),
        "leases": accounts.keep_tidy(),
        "rereading": on_hangup(settings, reread, "instances", take),
    }
    tasks = [asyncio.create_task(work) for work in background.values()]
    for task, what in zip(tasks, background, strict=True):
        leave_with(task, what)

    async def drain() -> None:
        await service.drain()
        await instances.stop()

    try:
        evidence = Check("evidence", lambda: None if time.time() < evidence_ends else "its certificate has run out")
        await serve(settings.serving, telemetry, credentials, register, drain, ready=[evidence])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await accounts.stop()
        await instances.stop()
        await channel.close()
