"""`/metrics` from snapshots, and the probes `/livez`, `/readyz`, `/startupz` and `/healthz`, over HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from stip_protocol.runtime.logs import fault
from stip_protocol.runtime.probes import Answer


class _Snapshots:
    def __init__(self, registry: CollectorRegistry, seconds: float) -> None:
        self._registry, self._seconds = registry, seconds
        self._lock = threading.Lock()
        self._taken, self._text = float("-inf"), b""

    def latest(self) -> bytes:
        with self._lock:
            now = time.monotonic()
            if now - self._taken >= self._seconds:
                self._taken, self._text = now, generate_latest(self._registry)
            return self._text


CONNECTIONS = 32
"""Open at once, with a thread each. One more is not answered, and the one that is open longest ends for the next."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._lock = threading.Lock()
        self._open: dict[Any, None] = {}
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            full = len(self._open) >= CONNECTIONS
            if full:
                with contextlib.suppress(OSError):  # it has gone already
                    next(iter(self._open)).shutdown(socket.SHUT_RDWR)
            else:
                self._open[request] = None
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """The end of every connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that went away, mostly; the base class would print the exception."""
        error = sys.exception()
        structlog.get_logger().info("scrape failed", fault="none" if error is None else fault(error))


class MetricsServer:
    """A small HTTP server in a thread of its own.

    `/metrics` repeats one snapshot for `snapshot_seconds`, so that no scraper can time single tokens;
    `/healthz` says 200 while `healthy()` holds and 503 otherwise. `probes` by path answer with 200 or 503 and a JSON
    document that names each check, and why one fails.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        healthy: Callable[[], bool],
        *,
        snapshot_seconds: float,
        probes: Mapping[str, Callable[[], Answer]] | None = None,
    ) -> None:
        asked = probes or {}
        snapshots = _Snapshots(registry, snapshot_seconds)

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                path = self.path.split("?", 1)[0]
                if path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, snapshots.latest())
                elif path == "/healthz":
                    good = healthy()
                    self._answer(200 if good else 503, "text/plain", b"ok\n" if good else b"not serving\n")
                elif path in asked:
                    answer = asked[path]()
                    body = json.dumps(answer.document()).encode() + b"\n"
                    self._answer(200 if answer.good else 503, "application/json", body)
                else:
                    self._answer(404, "text/plain", b"not found\n")

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                """Scrapes are not worth a log line."""

        self._server = _Server((host, port), Handler)
        self.address = f"{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
