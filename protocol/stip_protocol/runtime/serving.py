"""One way to serve: gRPC with TLS, health, metrics, an announcement, and a drain on SIGTERM."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from stip_protocol.errors import ConfigurationError, StipError
from stip_protocol.rpc import SERVER_OPTIONS, ErrorInterceptor
from stip_protocol.runtime.config import Serving
from stip_protocol.runtime.logs import fault
from stip_protocol.runtime.metrics import MetricsServer
from stip_protocol.telemetry import TASKS, Telemetry


async def serve(
    settings: Serving,
    telemetry: Telemetry,
    credentials: grpc.ServerCredentials,
    register: Callable[[grpc.aio.Server], None],
    drain: Callable[[], Awaitable[None]],
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Once ready, one JSON line on stdout announces `{"event": "listening", "part", "address", "metrics"}`.
    On a signal health turns NOT_SERVING, `drain()` runs for at most `settings.drain_seconds`, and the server
    stops. Raises `ConfigurationError` where an address cannot be bound.
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
        serving = asyncio.Event()
        host, metrics_port = settings.metrics.rsplit(":", 1)
        metrics = MetricsServer(
            host,
            int(metrics_port),
            telemetry.registry,
            serving.is_set,
            snapshot_seconds=settings.metrics_snapshot_seconds,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigurationError(f"listen: {settings.listen}, metrics: {settings.metrics}: cannot bind") from error
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Read in the thread of the metrics; asyncio tries again where the set changes meanwhile.
    telemetry.gauge(TASKS).set_function(lambda: len(asyncio.all_tasks(loop)))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    serving.set()
    address = f"{settings.listen.rsplit(':', 1)[0]}:{port}"
    announcement = {"event": "listening", "part": telemetry.part, "address": address, "metrics": metrics.address}
    sys.stdout.write(json.dumps(announcement) + "\n")
    sys.stdout.flush()
    log.info("listening", address=address, metrics=metrics.address)
    await stop.wait()
    log.info("draining", seconds=settings.drain_seconds)
    serving.clear()
    await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    try:
        await asyncio.wait_for(drain(), settings.drain_seconds)
    except TimeoutError:
        log.warning("drain ran out of time")
    finally:
        await server.stop(grace=1.0)
        metrics.stop()
        log.info("stopped")


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
