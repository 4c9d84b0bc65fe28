"""Builds the key service from its settings and runs it."""

from __future__ import annotations

import asyncio
import signal
from contextlib import closing

import grpc.aio
import structlog

from stip_keyservice.home import Home
from stip_keyservice.rootkey.memory import refuse_dumps
from stip_keyservice.service.collateral import dates, keep_fresh, open_source
from stip_keyservice.service.config import KeyServiceSettings
from stip_keyservice.service.issuer import Issuer
from stip_keyservice.service.operations import Operations
from stip_keyservice.service.policy.loading import InForce
from stip_keyservice.service.policy.reloading import PolicyLoader, reload_on
from stip_keyservice.service.server import KeyServiceServicer
from stip_keyservice.service.state.store import Store
from stip_protocol import rpc
from stip_protocol.errors import PolicyInvalid, SignatureInvalid, StipError
from stip_protocol.runtime import logs
from stip_protocol.runtime.serving import leave_with, serve
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import keyservice_pb2_grpc


async def run(settings: KeyServiceSettings) -> None:
    """Serve until SIGTERM. Raises `ConfigurationError` where a file cannot be used or consents disagree."""
    logs.configure("keyservice", simulated=settings.simulated, level=settings.serving.log_level)
    refuse_dumps()
    log = structlog.get_logger()
    hangup = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.set)
    if settings.simulated:
        log.warning("simulated evidence is accepted: nothing is protected")
    home = Home.open(settings.home)
    tls = home.tls(settings.dns_name)
    telemetry = Telemetry("keyservice", simulated=settings.simulated)
    with closing(Store(home.database, password_file=home.password_file)) as store:
        loader = PolicyLoader(settings, home, store, telemetry)
        try:
            in_force = loader.load()
        except SignatureInvalid as error:  # here it is a configuration that cannot be used
            raise PolicyInvalid(error.message) from None
        in_full = settings.limits.refusals_in_full
        source = open_source(settings)

        def adopt(found: InForce) -> None:
            issuer.adopt(found)
            _announce(found, issuer)

        issuer = Issuer(
            home,
            store,
            in_force.policy,
            telemetry,
            root_der=in_force.root_der,
            refusals_in_full=in_full,
            collateral=None if source is None else source.for_quote,
            catch_up=lambda: loader.catch_up(adopt),
        )
        operations = Operations(home, store, issuer, telemetry)
        servicer = KeyServiceServicer(issuer, settings.limits, observe=operations.streams, limited=operations.limited)

        def register(server: grpc.aio.Server) -> None:
            keyservice_pb2_grpc.add_KeyServiceServicer_to_server(servicer, server)

        adopt(in_force)
        reloading = asyncio.create_task(reload_on(hangup, loader, adopt))
        leave_with(reloading, "reloading the policy")
        credentials = rpc.server_credentials(tls.chain, tls.private_key, client_ca=None)
        keeping = asyncio.create_task(operations.keep_house())
        leave_with(keeping, "housekeeping")
        if source is not None:
            operations.watch_collateral(lambda: dates(source))
            refreshing = asyncio.create_task(keep_fresh(source))
            leave_with(refreshing, "collateral")
        await serve(settings.serving, telemetry, credentials, register, servicer.drain, ready=operations.ready())
        keeping.cancel()
        if source is not None:
            refreshing.cancel()
            source.close()
        await asyncio.to_thread(issuer.close)


def _announce(in_force: InForce, issuer: Issuer) -> None:
    """Log which policy decides from now on, and which registered instances it does not serve."""
    log, policy = structlog.get_logger(), in_force.policy
    log.info(
        "policy loaded",
        policy=in_force.digest.hex(),
        serial=policy.serial,
        signed=in_force.signed,
        mode=policy.evidence.mode,
    )
    if not in_force.signed:
        log.warning("the policy is not signed")
    try:
        refused = issuer.refused_instances()
    except StipError as error:  # the policy is in force all the same
        log.error("cannot tell which instances the policy refuses", code=error.code)
        return
    for instance, refusal in refused.items():
        log.warning("the policy refuses an instance", instance=instance, code=refusal.code, reason=refusal.message)
