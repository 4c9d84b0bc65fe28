"""A client of Intel's provisioning certification service, or of a cache in front of it (PCCS).

Paths, parameters and headers: Intel, "PCS for SGX and TDX, API version 4" (Get TCB Info, Get QE Identity, Get
Revocation Lists), and Intel's PCCS, which serves the same and the root CA's revocation list beside it. Of Intel's own
service that list is at the root certificate's CRL distribution point.

What comes is signed, so a source can withhold or age it but not forge it. It is still held to sizes, times and form:
a source that misbehaves costs the next one's turn, and nothing else.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes, urlsplit

import httpx2
from pydantic import AfterValidator, Field

from stip_protocol.attestation.authenticity import require_authentic, require_current
from stip_protocol.attestation.collateral import Collateral, assemble
from stip_protocol.attestation.evidence import COLLATERAL_LIMIT
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.errors import AttestationError, CollateralUnavailable, ConfigurationError
from stip_protocol.runtime.config import ConfigPath, Settings

INTEL_PCS = "https://api.trustedservices.intel.com"
INTEL_ROOT_CA_CRL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
"""CRL distribution point of the Intel SGX Root CA."""
TCB_CHAIN_HEADER = "TCB-Info-Issuer-Chain"
QE_CHAIN_HEADER = "SGX-Enclave-Identity-Issuer-Chain"
"""Of the TD quoting enclave's identity too."""
CRL_CHAIN_HEADER = "SGX-PCK-CRL-Issuer-Chain"
CHAIN_LIMIT = 16 * 1024
"""Bytes of the longest issuer chain in a header, decoded."""
REDIRECTS = 2
TEMPORARY = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses (RFC 9110, section 15) after which asking again may help."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds before asking again: doubled each round, then drawn evenly between none and all of it."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_SIGNED = re.compile(
    rb'\s*\{\s*"(tcbInfo|enclaveIdentity)"\s*:\s*(\{.*\})\s*,\s*"signature"\s*:\s*"([0-9a-fA-F]{128})"\s*\}\s*', re.S
)
"""The signed text must be taken as it stands: a JSON library would write it anew, and the signature covers bytes."""


def _endpoint_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("not a URL") from None
    if not host or parts.username is not None or parts.query or parts.fragment:
        raise ValueError("allowed: scheme, host, port and path, without user, query or fragment")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in LOOPBACK):
        raise ValueError("allowed: https, or http on this machine")
    return url.rstrip("/")


Url = Annotated[str, Field(max_length=2048), AfterValidator(_endpoint_url)]


class Endpoint(Settings):
    """One source of collateral."""

    url: Url = INTEL_PCS
    """What stands before `/sgx/certification/v4`."""
    root_ca_crl: Url | None = None
    """Where the root CA's revocation list is, where that is not the endpoint's `/sgx/certification/v4/rootcacrl`."""
    ca: ConfigPath | None = None
    """PEM roots of its TLS certificate; None: those of the system."""
    proxy: Url | None = None
    """An HTTP proxy. Proxies in the environment are not looked at."""

    @property
    def root_crl_url(self) -> str:
        if self.root_ca_crl is not None:
            return self.root_ca_crl
        return INTEL_ROOT_CA_CRL if self.url == INTEL_PCS else f"{self.url}/sgx/certification/v4/rootcacrl"


class Temporary(Exception):
    """A failure after which the same endpoint may do better. `pause`: seconds it asked for."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class Permanent(Exception):
    """A failure that asking again does not mend."""


@dataclass(frozen=True, slots=True)
class Reply:
    body: bytes
    headers: httpx2.Headers

    def chain(self, header: str) -> str:
        """The PEM chain that stands percent-encoded (RFC 3986) in a header."""
        value = self.headers.get(header)
        if value is None:
            raise Permanent(f"no header {header}")
        pem = unquote_to_bytes(value)
        if len(pem) > CHAIN_LIMIT or not pem.isascii():
            raise Permanent(f"header {header}: {len(pem)} bytes, allowed: at most {CHAIN_LIMIT}, ASCII")
        return pem.decode()

    def signed(self, name: str) -> tuple[str, str]:
        """The signed text under `name` as it stands, and its signature."""
        found = _SIGNED.fullmatch(self.body)
        if found is None or found[1].decode() != name:
            raise Permanent(f'body: not {{"{name}": ..., "signature": ...}}')
        try:
            return found[2].decode(), found[3].decode()
        except UnicodeDecodeError:
            raise Permanent(f"{name}: not UTF-8") from None

    def crl(self) -> str:
        """Hexadecimal DER. Intel's PCCS hands out hexadecimal where PCS hands out DER."""
        if self.body[:1] == b"\x30" and self.body[1:2] >= b"\x80":
            return self.body.hex()
        try:
            return bytes.fromhex(self.body.decode("ascii").strip()).hex()
        except ValueError:
            raise Permanent("revocation list: neither DER nor hexadecimal") from None


class PccsClient:
    """Fetches collateral from the first of several endpoints that gives good one. Blocking; safe between threads."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        anchor: bytes,
        *,
        request_seconds: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`anchor`: DER of the root. Raises `ConfigurationError` where a CA file cannot be used."""
        if not endpoints:
            raise ConfigurationError.because("collateral endpoints", "none", "at least one")
        self._anchor, self._clock, self._request_seconds = anchor, clock, request_seconds
        self._stopped = threading.Event()
        self._endpoints = tuple((endpoint, _tls(endpoint)) for endpoint in endpoints)

    def fetch(self, kind: PlatformKind, *, seconds: float) -> bytes:
        """`QuoteCollateralV3` JSON for a platform, authentic and in its dates, within `seconds` and one request more.

        Every endpoint is asked in turn; those that failed temporarily are asked again, after a pause, until the time
        is over. One that asks for a longer pause than that is left alone. Raises `CollateralUnavailable` naming every
        endpoint's last failure.
        """
        end = time.monotonic() + seconds
        waiting, failures, ceiling = list(self._endpoints), dict[str, str](), FIRST_PAUSE
        while waiting:
            asked = 0.0
            for one in tuple(waiting):
                endpoint, tls = one
                try:
                    return self._from(endpoint, tls, kind, end)
                except Temporary as failure:
                    failures[endpoint.url] = str(failure)
                    if time.monotonic() + failure.pause >= end:
                        waiting.remove(one)
                    else:
                        asked = max(asked, failure.pause)
                except Permanent as failure:
                    failures[endpoint.url] = str(failure)
                    waiting.remove(one)
            pause = max(asked, random.uniform(0, ceiling))  # noqa: S311 - spreads load, guards nothing
            ceiling = min(2 * ceiling, LONGEST_PAUSE)
            if not waiting or time.monotonic() + pause >= end:
                break
            if self._stopped.wait(pause):
                break
        told = "; ".join(f"{url}: {reason}" for url, reason in failures.items())
        raise CollateralUnavailable(f"collateral of {kind}: no source gives it ({told})", field="collateral")

    def stop(self) -> None:
        """End the pauses of fetches that are under way: they fail with what they have."""
        self._stopped.set()

    def _from(self, endpoint: Endpoint, tls: ssl.SSLContext, kind: PlatformKind, end: float) -> bytes:
        base, fmspc = endpoint.url, kind.fmspc.hex().upper()
        with (
            contextlib.closing(_Sockets()) as sockets,
            httpx2.Client(
                verify=tls,
                trust_env=False,
                proxy=endpoint.proxy,
                follow_redirects=False,
                headers={"accept-encoding": "identity", "user-agent": "stip"},
            ) as client,
        ):

            def get(url: str) -> Reply:
                return _get(client, sockets, url, end, self._request_seconds)

            tcb = get(f"{base}/{kind.tee}/certification/v4/tcb?fmspc={fmspc}")
            identity = get(f"{base}/{kind.tee}/certification/v4/qe/identity")
            pck_crl = get(f"{base}/sgx/certification/v4/pckcrl?ca={kind.ca}&encoding=der")
            root_crl = get(endpoint.root_crl_url)
        tcb_info, tcb_signature = tcb.signed("tcbInfo")
        qe_identity, qe_signature = identity.signed("enclaveIdentity")
        data = assemble(
            pck_crl_issuer_chain=pck_crl.chain(CRL_CHAIN_HEADER),
            root_ca_crl=root_crl.crl(),
            pck_crl=pck_crl.crl(),
            tcb_info_issuer_chain=tcb.chain(TCB_CHAIN_HEADER),
            tcb_info=tcb_info,
            tcb_info_signature=tcb_signature,
            qe_identity_issuer_chain=identity.chain(QE_CHAIN_HEADER),
            qe_identity=qe_identity,
            qe_identity_signature=qe_signature,
        )
        try:
            collateral = Collateral.parse(data)
            require_authentic(collateral, kind, self._anchor)
            require_current(collateral, int(self._clock()))
        except AttestationError as error:
            raise Permanent(error.message) from None
        return data


class _Sockets:
    """The connections of one client, which are shut where a request takes too long.

    A timeout bounds one read alone: whoever sends a byte now and then, of the handshake, of a header, of a chunk's
    size, or one interim answer after the other, never meets it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: list[socket.socket] = []
        self.over = False
        """Whether the time was over. No connection is of use afterwards."""

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """To be told of what happens (httpcore's `trace` extension): keeps a handle of each new connection."""
        if event.endswith("connect_tcp.complete"):
            with self._lock:
                self._handles.append(info["return_value"].get_extra_info("socket").dup())
            if self.over:
                self._shut()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        timer = threading.Timer(seconds, self._shut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close(self) -> None:
        with self._lock:
            for handle in self._handles:
                handle.close()
            self._handles.clear()

    def _shut(self) -> None:
        self.over = True
        with self._lock:
            for handle in self._handles:
                with contextlib.suppress(OSError):
                    handle.shutdown(socket.SHUT_RDWR)


def _get(client: httpx2.Client, sockets: _Sockets, url: str, end: float, request_seconds: float) -> Reply:
    for _ in range(REDIRECTS + 1):
        left = end - time.monotonic()
        if left <= 0:
            raise Temporary("the time is over")
        timeout = min(left, request_seconds)
        try:
            with (
                sockets.within(timeout),
                client.stream("GET", url, timeout=timeout, extensions={"trace": sockets.trace}) as response,
            ):
                if response.is_redirect:
                    url = _redirected(response)
                    continue
                return Reply(_body(response, time.monotonic() + timeout), response.headers)
        except httpx2.TransportError as error:
            if sockets.over or isinstance(error, httpx2.TimeoutException):
                raise Temporary("the answer takes too long") from None
            if isinstance(error.__cause__, ssl.SSLError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise Permanent("TLS: the certificate is not trusted") from None
            raise Temporary(f"connection: {type(error).__name__}") from None
        except httpx2.HTTPError as error:
            raise Permanent(f"HTTP: {type(error).__name__}") from None
    raise Permanent(f"more than {REDIRECTS} redirects")


def _redirected(response: httpx2.Response) -> str:
    """Where a redirect leads, which must be the same host by the same scheme."""
    try:
        target = response.url.join(response.headers.get("location", ""))
    except httpx2.InvalidURL:
        raise Permanent("redirect: no location") from None
    if "location" not in response.headers or _origin(target) != _origin(response.url):
        raise Permanent("redirect: to another host, port or scheme")
    return str(target)


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _body(response: httpx2.Response, end: float) -> bytes:
    status = response.status_code
    if status in TEMPORARY:
        raise Temporary(f"HTTP status {status}", _retry_after(response))
    if status == 404:
        raise Permanent("HTTP status 404: it does not know this platform")
    if status != 200:
        raise Permanent(f"HTTP status {status}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise Permanent("content encoding: not asked for")
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > COLLATERAL_LIMIT:
            raise Permanent(f"body: more than {COLLATERAL_LIMIT} bytes")
        if time.monotonic() > end:
            raise Temporary("the answer takes too long")
    if not body:
        raise Permanent("body: empty")
    return bytes(body)


def _retry_after(response: httpx2.Response) -> float:
    """Seconds of a Retry-After header (RFC 9110, section 10.2.3); its dates are not read."""
    value = response.headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"[0-9]{1,5}", value) else 0.0


def _tls(endpoint: Endpoint) -> ssl.SSLContext:
    if endpoint.ca is None and not any(url.startswith("https:") for url in (endpoint.url, endpoint.root_crl_url)):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody, and reads no roots that nothing would need
    ca = endpoint.ca
    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"collateral CA {ca}: {error.strerror or 'not PEM'}", field="collateral.ca") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
