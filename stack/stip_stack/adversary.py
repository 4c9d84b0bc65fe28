"""Peers that break the rules with genuine credentials: what tests send to a running stack.

Nothing here forges anything. A `RawClient` holds a user's key and speaks to the enclave without the checks of the
client; a `RawEnclave` is a simulated enclave of its own, released to like any other, whose link to the gateway says
whatever the test likes; `channel_to` opens a channel with the credentials that a part's own peers have.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from stip import keys
from stip.channel import fetch_certificate
from stip.keys import UserKey
from stip.profile import Profile
from stip_enclave.cards import OUTPUT
from stip_enclave.identity import EnclaveIdentity
from stip_enclave.release import ReleaseClient
from stip_keyservice.service.linkca import issue_link_certificate
from stip_protocol import rpc
from stip_protocol.attestation import ratls
from stip_protocol.documents import Signed
from stip_protocol.errors import StipError, from_code
from stip_protocol.release import Bundle, Delegation
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import enclave_pb2, enclave_pb2_grpc, model_pb2, model_pb2_grpc
from stip_stack.stack import Stack
from stip_stack.workspace import AUDIENCE, ENCLAVE_NAME, MEASUREMENT, Published

REPLY_SECONDS = 20.0
DELEGATION_SECONDS = 3600


def unbounded_channel(
    address: str, roots: bytes, server_name: str, identity: tuple[bytes, bytes] | None = None
) -> grpc.aio.Channel:
    """As `stip_protocol.rpc.channel`, and messages of any size leave."""
    certificate, key = identity or (None, None)
    credentials = grpc.ssl_channel_credentials(roots, private_key=key, certificate_chain=certificate)
    kept = [option for option in rpc.CHANNEL_OPTIONS if option[0] != "grpc.max_send_message_length"]
    options: list[tuple[str, Any]] = [*kept, ("grpc.ssl_target_name_override", server_name)]
    return grpc.aio.secure_channel(address, credentials, options=[*options, ("grpc.max_send_message_length", -1)])


async def channel_to(stack: Stack, name: str) -> grpc.aio.Channel:
    """A channel to the process `name`, with the credentials its peers would have."""
    workspace, address = stack.workspace, stack.processes[name].address
    if name == "keyservice":
        return unbounded_channel(address, workspace.home.tls_ca.pem, "localhost")
    if name == "enclave":
        return unbounded_channel(address, await _enclave_pem(address), ENCLAVE_NAME)
    roots = (workspace.operator / "ca.pem").read_bytes()
    if name == "gateway":
        return unbounded_channel(address, roots, "gateway", _link_identity(stack))
    operator = workspace.identity("a gateway")
    return unbounded_channel(address, roots, name, (operator.certificate, operator.private_key))


class RawClient:
    """A client that sends what it is told to. `sent` and `failed` are for one session at a time."""

    def __init__(self, channel: grpc.aio.Channel, profile: Profile, spki_sha256: bytes, key: UserKey) -> None:
        self.channel = channel
        self._profile, self._spki, self._key = profile, spki_sha256, key

    @classmethod
    @asynccontextmanager
    async def connect(cls, profile: Profile) -> AsyncIterator[RawClient]:
        """A channel to the profile's enclave, which is taken at its word."""
        pem = await _enclave_pem(profile.enclave)
        spki = ratls.read(ssl.PEM_cert_to_DER_cert(pem.decode()), now=int(time.time())).spki_sha256
        async with unbounded_channel(profile.enclave, pem, profile.server_name) as channel:
            yield cls(channel, profile, spki, keys.load(profile.user_key))

    def delegation(self, **changes: Any) -> bytes:
        """A delegation signed by this user, with some fields changed."""
        fields = {"enclave_key": self._spki, "instance": self._profile.instance, **changes}
        return delegate(self._key, **fields)

    async def talk(self, *frames: enclave_pb2.ClientFrame) -> StipError:
        """Send frames and wait for the error that the session ends with."""
        call: Any = enclave_pb2_grpc.EnclaveStub(self.channel).Session()
        async with asyncio.timeout(REPLY_SECONDS):
            try:
                for frame in frames:
                    await call.write(frame)
                while (reply := await call.read()) is not grpc.aio.EOF:
                    if reply.HasField("failed"):
                        return from_code(reply.failed.code, reply.failed.message)
            except grpc.aio.AioRpcError as error:
                return rpc.from_rpc(error)
            finally:
                call.cancel()
        raise AssertionError("the session ended without an error")

    def open(self, delegation: bytes | None = None, **fields: Any) -> enclave_pb2.ClientFrame:
        """The first frame of a session, with this user's delegation unless another is given."""
        fields = {"instance": self._profile.instance, **fields}
        return enclave_pb2.ClientFrame(
            open=enclave_pb2.Open(delegation=self.delegation() if delegation is None else delegation, **fields)
        )


@dataclass
class RawLink:
    """A link under a genuine lease. Nothing is checked before it is sent."""

    call: Any
    bundle: Bundle = field(repr=False)
    published: Published

    async def open(self, session: bytes | None = None, **fields: Any) -> bytes:
        """Open a session and wait for the answer; its handle. Raises what it is closed with."""
        session = secrets.token_bytes(16) if session is None else session
        manifest = self.published.manifest
        fields = {
            "lease": self.bundle.lease,
            "output": OUTPUT[manifest.output],
            "max_positions": manifest.max_positions,
            "request_id": secrets.token_hex(16),
            **fields,
        }
        await self.send(model_pb2.Up(open=model_pb2.Open(session=session, **fields)))
        down = await self.read()
        if down.HasField("closed"):
            raise from_code(down.closed.code, down.closed.message)
        assert down.opened.session == session
        return session

    async def send(self, up: model_pb2.Up) -> None:
        await self.call.write(up)

    async def feed(self, *slices: tuple[bytes, int, int], rows: bytes) -> None:
        """Slices as (session, position, count), each the last of its rows."""
        parts = [model_pb2.Slice(session=s, position=at, count=count, outputs=1) for s, at, count in slices]
        await self.send(model_pb2.Up(feed=model_pb2.Feed(slices=parts, rows=rows)))

    async def read(self) -> model_pb2.Down:
        """The next message. Raises the error that ended the link."""
        try:
            async with asyncio.timeout(REPLY_SECONDS):
                down = await self.call.read()
                if down is grpc.aio.EOF:
                    raise AssertionError(f"the link ended: {await self.call.code()}")
        except grpc.aio.AioRpcError as error:
            raise rpc.from_rpc(error) from None
        assert isinstance(down, model_pb2.Down)
        return down


class RawEnclave:
    """A simulated enclave beside the stack's own, with the same measurement and its own keys."""

    def __init__(self, stack: Stack, published: Published) -> None:
        self._stack, self.published = stack, published
        provider = stack.workspace.platform.provider(MEASUREMENT)
        self.identity = EnclaveIdentity.create(provider, dns_name=ENCLAVE_NAME, lifetime=3600, now=int(time.time()))
        self._provider = provider

    def delegation(self, key: UserKey, **changes: Any) -> bytes:
        """A user's delegation to this enclave."""
        fields = {"enclave_key": self.identity.tls.spki_sha256, "instance": self.published.manifest.instance, **changes}
        return delegate(key, **fields)

    async def bundle(self, delegation: bytes, *, rows: int = 256) -> Bundle:
        """What the key service releases. Raises what it refuses with."""
        workspace, manifest = self._stack.workspace, self.published.manifest
        async with await channel_to(self._stack, "keyservice") as channel:
            releases = ReleaseClient(
                channel,
                workspace.home.service.public_key(),
                self._provider,
                self.identity,
                Telemetry("enclave", simulated=True),
                audience=AUDIENCE,
                timeout=REPLY_SECONDS,
            )
            return await releases.bundle(delegation, manifest.instance, {manifest.epoch: self.published.digest}, rows)

    @asynccontextmanager
    async def link(self, key: UserKey, *, rows: int = 256) -> AsyncIterator[RawLink]:
        """A link of its own under a lease that a user delegated."""
        bundle = await self.bundle(self.delegation(key), rows=rows)
        roots = (self._stack.workspace.operator / "ca.pem").read_bytes()
        identity = self.identity.link_credentials(bundle.link_certificate)
        address = self._stack.processes["gateway"].address
        async with unbounded_channel(address, roots, "gateway", identity) as channel:
            call: Any = model_pb2_grpc.ModelStub(channel).Link(metadata=route(self.published))
            try:
                yield RawLink(call, bundle, self.published)
            finally:
                call.cancel()


def route(published: Published) -> tuple[tuple[str, str], ...]:
    """Metadata of a link to an instance."""
    manifest = published.manifest
    return (rpc.INSTANCE_KEY, manifest.instance), (rpc.EPOCH_KEY, str(manifest.epoch))


def delegate(key: UserKey, **fields: Any) -> bytes:
    """A delegation signed by `key`; `enclave_key` and `instance` are wanted, the rest has honest defaults."""
    fields = {
        "user": key.public,
        "measurement": MEASUREMENT,
        "nonce": secrets.token_bytes(32),
        "expires": int(time.time()) + DELEGATION_SECONDS,
        **fields,
    }
    return Signed.sign(Delegation.model_validate(fields), key.private).to_bytes()


async def _enclave_pem(address: str) -> bytes:
    der = await fetch_certificate(address, ENCLAVE_NAME, timeout=REPLY_SECONDS)
    return ssl.DER_cert_to_PEM_cert(der).encode()


def _link_identity(stack: Stack) -> tuple[bytes, bytes]:
    """(certificate, key) in PEM under the key service's CA for links."""
    key, now = ec.generate_private_key(ec.SECP256R1()), int(time.time())
    der = issue_link_certificate(stack.workspace.home.link_ca, key.public_key(), now=now, expires=now + 600)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return ssl.DER_cert_to_PEM_cert(der).encode(), private
