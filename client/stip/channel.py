"""The network seam: fetch a certificate, pin it, challenge, and notice when another enclave answers.

gRPC has no hook for verifying a certificate, so: fetch the certificate over a connection that says nothing
else, verify the quote in it, and open a channel that trusts exactly this certificate. Whoever holds another
key fails the handshake, before a byte of a request leaves.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl
from contextlib import suppress

import grpc
import grpc.aio

from stip_protocol import rpc
from stip_protocol.errors import ChannelChanged, DeadlineExceeded, StipError, Unavailable
from stip_protocol.wire import enclave_pb2, enclave_pb2_grpc

DIAGNOSIS_SECONDS = 5.0
"""How long the search for the reason of a lost connection may take."""


def request_id() -> str:
    """A random, content-free id: 32 hex digits, bound in the logs of every part."""
    return secrets.token_hex(16)


def cancelled_here() -> bool:
    """True where this task is being cancelled: grpc.aio raises `CancelledError` also where only the call was, by
    another task or by closing its channel."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def fetch_certificate(address: str, server_name: str, *, timeout: float) -> bytes:
    """DER of the certificate presented at `address`, within `timeout` seconds in all. Nothing else is sent.

    Raises `Unavailable`, `DeadlineExceeded`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False  # nothing is believed yet: the quote inside decides
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, port = address.rsplit(":", 1)
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(
                host.strip("[]"), int(port), ssl=context, server_hostname=server_name
            )
    except TimeoutError:
        raise DeadlineExceeded(f"enclave {address}: no TLS handshake within {timeout:.1f} s") from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"enclave {address}: cannot be reached ({type(error).__name__})") from None
    try:
        presented = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
    if not presented:
        raise Unavailable(f"enclave {address}: presents no certificate")
    return bytes(presented)


class PinnedChannel:
    """A gRPC channel to the holder of one certificate's key, and to nobody else."""

    def __init__(self, address: str, server_name: str, certificate: bytes) -> None:
        self._address = address
        self._server_name = server_name
        self._certificate = certificate
        pem = ssl.DER_cert_to_PEM_cert(certificate).encode()
        self._channel = rpc.channel(address, roots=pem, server_name=server_name)
        self.stub = enclave_pb2_grpc.EnclaveStub(self._channel)
        self.continuous = False
        """True while the connection that carried the last challenge is still the one in use."""
        self._watch: asyncio.Task[None] | None = None

    async def attest(self, nonce: bytes, *, timeout: float) -> enclave_pb2.AttestReply:
        """Challenge the enclave. Raises `ChannelChanged`, `Unavailable`, or what the enclave reports."""
        self.continuous = True
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_connection())
        try:
            return await self.stub.Attest(
                enclave_pb2.AttestRequest(nonce=nonce),
                timeout=max(timeout, 0.001),
                metadata=((rpc.REQUEST_ID_KEY, request_id()),),
            )
        except grpc.aio.AioRpcError as error:
            self.continuous = False
            raise await self.explain(rpc.from_rpc(error)) from None
        except asyncio.CancelledError:
            self.continuous = False
            if cancelled_here():
                raise
            raise Unavailable("enclave: cancelled the challenge") from None

    async def explain(self, error: StipError) -> StipError:
        """`error`, or `ChannelChanged` where the connection was lost to another certificate at this address."""
        if type(error) is not Unavailable:
            return error
        try:
            found = await fetch_certificate(self._address, self._server_name, timeout=DIAGNOSIS_SECONDS)
        except StipError:
            return error
        if secrets.compare_digest(found, self._certificate):
            return error
        return ChannelChanged(
            f"enclave {self._address}: presents another certificate than the verified one; nothing was sent to it"
        )

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        await self._channel.close()

    async def _watch_connection(self) -> None:
        """Every connection that ends takes its verification along."""
        state = self._channel.get_state()
        while state is not grpc.ChannelConnectivity.SHUTDOWN:
            await self._channel.wait_for_state_change(state)
            left, state = state, self._channel.get_state()
            if left is grpc.ChannelConnectivity.READY:
                self.continuous = False
