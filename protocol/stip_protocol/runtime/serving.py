"""One way to serve: gRPC with TLS, health, metrics, an announcement, and a drain on SIGTERM."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from stip_protocol.errors import ConfigurationError, StipError
from stip_protocol.rpc import SERVER_OPTIONS, ErrorInterceptor
from stip_protocol.runtime.config import Serving
from stip_protocol.runtime.logs import fault
from stip_protocol.runtime.metrics import MetricsServer
from stip_protocol.runtime.probes import CHECK_SECONDS, Check, Runner
from stip_protocol.telemetry import READY, TASKS, Telemetry

READY_SECONDS = 2.0
"""Between two looks at readiness for gRPC health."""


async def serve(
    settings: Serving,
    telemetry: Telemetry,
    credentials: grpc.ServerCredentials,
    register: Callable[[grpc.aio.Server], None],
    drain: Callable[[], Awaitable[None]],
    *,
    ready: Sequence[Check] = (),
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Once ready, one JSON line on stdout announces `{"event": "listening", "part", "address", "metrics"}`.
    Beside `/metrics` and `/healthz` (up and not draining) there are the probes: `/startupz` (has come up), `/livez`
    (the event loop turns) and `/readyz` (not draining, and every check of `ready` holds). gRPC health says what
    `/readyz` says, looked at every `READY_SECONDS`. On a signal health turns NOT_SERVING, `drain()` runs for at most
    `settings.drain_seconds`, and the server stops. Raises `ConfigurationError` where an address cannot be bound.
    """
    log = structlog.get_logger()

    def report(error: BaseException) -> None:
        code = error.code if isinstance(error, StipError) else "internal"
        telemetry.refused(code)
        log.warning("refused", code=code, fault=fault(error))

    server = grpc.aio.server(interceptors=[ErrorInterceptor(report)], options=SERVER_OPTIONS)
    register(server)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    try:
        port = server.add_secure_port(settings.listen, credentials)
        serving, started = threading.Event(), threading.Event()
        loop = asyncio.get_running_loop()
        readiness = Runner((Check("serving", _unless(serving, "starting or draining")), *ready))
        host, metrics_port = settings.metrics.rsplit(":", 1)
        metrics = MetricsServer(
            host,
            int(metrics_port),
            telemetry.registry,
            serving.is_set,
            snapshot_seconds=settings.metrics_snapshot_seconds,
            probes={
                "/startupz": Runner((Check("started", _unless(started, "starting")),)).answer,
                "/livez": Runner((Check("event loop", lambda: _turns(loop)),)).answer,
                "/readyz": readiness.answer,
            },
        )
    except (RuntimeError, OSError) as error:
        raise ConfigurationError(f"listen: {settings.listen}, metrics: {settings.metrics}: cannot bind") from error
    stop = asyncio.Event()
    # Read in the thread of the metrics; asyncio tries again where the set changes meanwhile.
    telemetry.gauge(TASKS).set_function(lambda: len(asyncio.all_tasks(loop)))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    serving.set()
    started.set()
    health_of = _Health(servicer, readiness, telemetry)
    await health_of.look()
    looking = asyncio.create_task(health_of.keep_looking())
    leave_with(looking, "looking at readiness")
    address = f"{settings.listen.rsplit(':', 1)[0]}:{port}"
    announcement = {"event": "listening", "part": telemetry.part, "address": address, "metrics": metrics.address}
    sys.stdout.write(json.dumps(announcement) + "\n")
    sys.stdout.flush()
    log.info("listening", address=address, metrics=metrics.address)
    await stop.wait()
    log.info("draining", seconds=settings.drain_seconds)
    serving.clear()
    looking.cancel()
    await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    try:
        await asyncio.wait_for(drain(), settings.drain_seconds)
    except TimeoutError:
        log.warning("drain ran out of time")
    finally:
        await server.stop(grace=1.0)
        metrics.stop()
        log.info("stopped")


class _Health:
    """gRPC health and the metric of readiness, kept to what the checks say."""

    def __init__(self, servicer: health.aio.HealthServicer, readiness: Runner, telemetry: Telemetry) -> None:
        self._servicer, self._readiness, self._gauge = servicer, readiness, telemetry.gauge(READY)
        self._failing: Mapping[str, str | None] | None = None

    async def keep_looking(self) -> None:
        while True:
            await asyncio.sleep(READY_SECONDS)
            await self.look()

    async def look(self) -> None:
        answer = await asyncio.to_thread(self._readiness.answer)
        for name, reason in answer.checks.items():
            self._gauge.labels(check=name).set(reason is None)
        failing = {name: reason for name, reason in answer.checks.items() if reason is not None}
        if failing != self._failing and (failing or self._failing):
            structlog.get_logger().warning("ready" if answer.good else "not ready", failing=failing)
        self._failing = failing
        status = health_pb2.HealthCheckResponse.SERVING if answer.good else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._servicer.set("", status)


def _unless(event: threading.Event, reason: str) -> Callable[[], str | None]:
    return lambda: None if event.is_set() else reason


def _turns(loop: asyncio.AbstractEventLoop) -> str | None:
    """Waits until the loop has run something."""
    turned = threading.Event()
    loop.call_soon_threadsafe(turned.set)
    return None if turned.wait(CHECK_SECONDS) else f"stuck for {CHECK_SECONDS:g} s"


def leave_with(task: asyncio.Task[None], what: str) -> None:
    """Stop this process where a task it cannot do without fails.

    A part that lost its engine or its routing table only looks alive: leaving lets whoever supervises the process
    start another. Cancelling the task is no failure.
    """

    def done(ended: asyncio.Task[None]) -> None:
        if not ended.cancelled() and ended.exception() is not None:
            structlog.get_logger().error(f"{what} failed", exc_info=ended.exception())
            signal.raise_signal(signal.SIGTERM)

    task.add_done_callback(done)
