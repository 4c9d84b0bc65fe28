"""Builds the key service from its settings and runs it."""

from __future__ import annotations

import grpc.aio
import structlog

from stip_keyservice.home import Home
from stip_keyservice.service.config import KeyServiceSettings, trust
from stip_keyservice.service.issuer import Issuer
from stip_keyservice.service.policy import Policy
from stip_keyservice.service.server import KeyServiceServicer
from stip_keyservice.service.state.store import Store
from stip_protocol import rpc
from stip_protocol.runtime import logs
from stip_protocol.runtime.serving import serve
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import keyservice_pb2_grpc


async def run(settings: KeyServiceSettings) -> None:
    """Serve until SIGTERM. Raises `ConfigurationError` where a file cannot be used or consents disagree."""
    logs.configure("keyservice", simulated=settings.simulated, level=settings.serving.log_level)
    log = structlog.get_logger()
    policy = Policy.load(settings.policy)
    root_der = trust(settings, policy)
    if settings.simulated:
        log.warning("simulated evidence is accepted: nothing is protected")
    home = Home.open(settings.home)
    tls = home.tls(settings.dns_name)
    telemetry = Telemetry("keyservice", simulated=settings.simulated)
    store = Store(home.database)
    issuer = Issuer(home, store, policy, telemetry, root_der=root_der)
    servicer = KeyServiceServicer(issuer, settings.limits)

    def register(server: grpc.aio.Server) -> None:
        keyservice_pb2_grpc.add_KeyServiceServicer_to_server(servicer, server)

    log.info("policy loaded", policy=policy.digest().hex(), mode=policy.evidence.mode)
    try:
        for instance, refusal in issuer.refused_instances().items():
            log.warning("the policy refuses an instance", instance=instance, code=refusal.code, reason=refusal.message)
        credentials = rpc.server_credentials(tls.chain, tls.private_key, client_ca=None)
        await serve(settings.serving, telemetry, credentials, register, servicer.drain)
    finally:
        store.close()
