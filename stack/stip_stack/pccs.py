"""A stand-in for a PCCS: serves collateral of platforms over HTTP(S), with every fault on demand. For tests only.

Paths, bodies and headers as Intel, "PCS for SGX and TDX, API version 4", and Intel's PCCS have them. What it serves
is `QuoteCollateralV3` taken apart again: of simulated platforms, or recorded from Intel.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from stip_protocol.attestation.pccs import CRL_CHAIN_HEADER, QE_CHAIN_HEADER, TCB_CHAIN_HEADER
from stip_protocol.attestation.platforms import PlatformKind


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer."""

    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    promised: int | None = None
    """Content-Length, where it is to be another than the body's."""
    delay: float = 0.0
    """Seconds between any two bytes of the body."""


NOT_FOUND = Answer(status=404)
Fault = Callable[[str, Answer], Answer]
"""What becomes of an answer, by the path that was asked for."""


@dataclass
class StandIn:
    """What a stand-in serves, and what it was asked. Change `collateral` and `fault` while it runs."""

    collateral: Mapping[PlatformKind, bytes]
    """`QuoteCollateralV3` by platform."""
    fault: Fault = field(default=lambda _, answer: answer)
    hexadecimal: bool = False
    """Revocation lists in hexadecimal, as Intel's PCCS hands out the root's."""
    asked: list[str] = field(default_factory=list)
    """Paths with their queries, in order."""
    url: str = ""

    def answer(self, target: str) -> Answer:
        self.asked.append(target)
        parts = urlsplit(target)
        return self.fault(parts.path, self._answer(parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()}))

    def _answer(self, path: str, query: dict[str, str]) -> Answer:
        """Only a TCB info is about one platform: identities are shared by a TEE, revocation lists by a CA."""
        tee, _, rest = path.removeprefix("/").partition("/certification/v4/")
        if rest == "tcb":
            found = self._first(lambda kind: (kind.tee, kind.fmspc.hex().upper()) == (tee, query.get("fmspc")))
            return NOT_FOUND if found is None else _signed("tcbInfo", found, "tcb_info", TCB_CHAIN_HEADER)
        if rest == "qe/identity":
            found = self._first(lambda kind: kind.tee == tee)
            return NOT_FOUND if found is None else _signed("enclaveIdentity", found, "qe_identity", QE_CHAIN_HEADER)
        if (tee, rest, query.get("encoding")) == ("sgx", "pckcrl", "der"):
            found = self._first(lambda kind: kind.ca == query.get("ca"))
            if found is not None:
                return Answer(self._crl(found["pck_crl"]), {CRL_CHAIN_HEADER: quote(found["pck_crl_issuer_chain"])})
        if (tee, rest) == ("sgx", "rootcacrl"):
            found = self._first(lambda _: True)
            if found is not None:
                return Answer(self._crl(found["root_ca_crl"]))
        return NOT_FOUND

    def _first(self, wanted: Callable[[PlatformKind], bool]) -> dict[str, str] | None:
        made: dict[str, str] | None = next(
            (json.loads(data) for kind, data in self.collateral.items() if wanted(kind)), None
        )
        return made

    def _crl(self, hexadecimal: str) -> bytes:
        return hexadecimal.upper().encode() if self.hexadecimal else bytes.fromhex(hexadecimal)


def _signed(name: str, v3: dict[str, str], field_: str, header: str) -> Answer:
    body = f'{{"{name}":{v3[field_]},"signature":"{v3[f"{field_}_signature"]}"}}'
    return Answer(body.encode(), {header: quote(v3[f"{field_}_issuer_chain"])})


@contextmanager
def serve(stand_in: StandIn, *, certificate: tuple[str, str] | None = None) -> Iterator[StandIn]:
    """Serve on a free port of this machine; `certificate`: paths of a PEM chain and its key, for HTTPS."""
    stopping = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def do_GET(self) -> None:
            answer = stand_in.answer(self.path)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            promised = len(answer.body) if answer.promised is None else answer.promised
            self.send_header("content-length", str(promised))
            self.end_headers()
            if not answer.delay:
                self.wfile.write(answer.body)
                return
            for byte in answer.body:
                if stopping.wait(answer.delay):
                    return
                self.wfile.write(bytes([byte]))

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            """Nothing: a test reads `asked`."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that leaves in the middle is what some tests are about."""

    with Server(("127.0.0.1", 0), Handler) as server:
        if certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "http" if certificate is None else "https"
        stand_in.url = f"{scheme}://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield stand_in
        finally:
            stopping.set()
            server.shutdown()
            thread.join()
