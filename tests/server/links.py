"""The far end of a link: a small enclave, a service on a real socket, and the certificates of both."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import os
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import grpc.aio
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from stip_protocol.rpc import channel
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import model_pb2 as wire
from stip_protocol.wire import model_pb2_grpc
from stip_server.engine import Card, Hidden, Logits, Top
from stip_server.service import ModelService


@dataclass(frozen=True)
class Pki:
    """PEM of an operator's CA, and (certificate, key) of a server and of a client under it."""

    ca: bytes
    server: tuple[bytes, bytes]
    client: tuple[bytes, bytes]

    @classmethod
    def make(cls) -> Self:
        ca = _issue("operator", None)
        return cls(_pem(ca)[0], _pem(_issue("server", ca)), _pem(_issue("gateway", ca)))


def _issue(subject: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None) -> Any:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer[0].subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(issuer[1] if issuer else key, hashes.SHA256())
    )
    return certificate, key


def _pem(pair: Any) -> tuple[bytes, bytes]:
    certificate, key = pair
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Enclave:
    """One link, as an enclave drives it: sessions by handle, replies sorted by handle."""

    def __init__(self, plain: Any, card: wire.Card, call: Any) -> None:
        self.plain, self.card, self.call = plain, card, call
        self.drained = asyncio.Event()
        self.load = 0
        self._boxes: dict[bytes, asyncio.Queue[Any]] = {}
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for down in self.call:
            self.load = down.load
            body = down.WhichOneof("body")
            if body == "drain":
                self.drained.set()
            elif body == "fed":
                start = 0
                for piece in down.fed.slices:
                    out = self._cut(down.fed, start, piece.count)
                    self.box(piece.session).put_nowait((piece.position, out, down.fed))
                    start += piece.count
            else:
                message = getattr(down, body)
                self.box(message.session).put_nowait(message)

    def _cut(self, fed: wire.Fed, start: int, count: int) -> Hidden | Top | Logits | list[int]:
        """The outputs of one slice."""
        form, stop = fed.WhichOneof("out"), start + count
        if form == "ids":
            return [int(one) for one in np.frombuffer(fed.ids.ids, "<u4")[start:stop]]
        if form == "top":
            most, size = fed.top.count, self.plain.table.element_size()
            return Top(
                most,
                fed.top.indices[start * most * 4 : stop * most * 4],
                fed.top.values[start * most * size : stop * most * size],
                fed.top.log_sum_exp[start * 4 : stop * 4],
            )
        rows = getattr(fed, form)
        size = len(rows) // sum(piece.count for piece in fed.slices)
        row = rows[start * size : stop * size]
        return Hidden(row) if form == "hidden" else Logits(row)

    def box(self, handle: bytes) -> asyncio.Queue[Any]:
        return self._boxes.setdefault(handle, asyncio.Queue())

    async def next(self, handle: bytes) -> Any:
        return await self.box(handle).get()

    async def send(self, **body: Any) -> None:
        # gRPC takes one write of a stream at a time.
        async with self._writing:
            await self.call.write(wire.Up(**body))

    async def open(self, handle: bytes, **changes: Any) -> None:
        fields = {
            "output": self.card.outputs[0],
            "max_positions": self.card.max_positions,
            "request_id": handle.hex(),
            **changes,
        }
        await self.send(open=wire.Open(session=handle, **fields))

    async def feed(self, handle: bytes, position: int, ids: list[int], *, last: bool = True) -> None:
        piece = wire.Slice(session=handle, position=position, count=len(ids), outputs=int(last))
        await self.send(feed=wire.Feed(slices=[piece], rows=self.plain.rows(ids)))

    async def feed_ids(self, handle: bytes, position: int, ids: list[int], *, back: int = 0) -> None:
        piece = wire.Slice(session=handle, position=position, count=len(ids), back=back)
        await self.send(feed=wire.Feed(slices=[piece], ids=np.array(ids, "<u4").tobytes()))

    async def decoded(self, handle: bytes, position: int) -> list[int]:
        """The ids of a generation that began at `position`, to its end."""
        ids: list[int] = []
        while True:
            at, more, fed = await self.next(handle)
            assert at == position + len(ids)
            ids += more
            if next(piece for piece in fed.slices if piece.session == handle).done:
                return ids

    async def generate(self, prompt: list[int], count: int, **changes: Any) -> list[int]:
        handle = os.urandom(16)
        await self.open(handle, **changes)
        await self.feed(handle, 0, prompt)
        assert isinstance(await self.next(handle), wire.Opened)
        ids: list[int] = []
        while len(ids) < count:
            if ids:
                await self.feed(handle, len(prompt) + len(ids) - 1, ids[-1:])
            position, out, _ = await self.next(handle)
            assert position == len(prompt) + len(ids) - 1
            ids.append(self.plain.pick(out))
        await self.send(close=wire.Close(session=handle))
        return ids

    async def ended(self) -> grpc.aio.AioRpcError:
        """The error that the stream ends with."""
        try:
            await self._reader
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError("the stream ended without an error")

    async def leave(self) -> None:
        self.call.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await self._reader


@dataclass
class Service:
    """A service on a real socket."""

    plain: Any
    pki: Pki
    address: str
    service: ModelService
    telemetry: Telemetry
    card: Card
    _enclaves: list[Enclave] = field(default_factory=list)
    _channels: list[grpc.aio.Channel] = field(default_factory=list)

    def unlimited_stub(self) -> Any:
        """A client that does not check the size of what it sends."""
        certificate, key = self.pki.client
        credentials = grpc.ssl_channel_credentials(self.pki.ca, private_key=key, certificate_chain=certificate)
        made = grpc.aio.secure_channel(self.address, credentials, options=[("grpc.max_send_message_length", -1)])
        self._channels.append(made)
        return model_pb2_grpc.ModelStub(made)  # type: ignore[no-untyped-call]

    def stub(self, *, identity: bool = True) -> Any:
        made = channel(
            self.address,
            roots=self.pki.ca,
            identity=self.pki.client if identity else None,
            server_name="localhost",
        )
        self._channels.append(made)
        return model_pb2_grpc.ModelStub(made)  # type: ignore[no-untyped-call]

    def reference(self) -> wire.InstanceRef:
        return wire.InstanceRef(instance=self.card.instance, epoch=self.card.epoch)

    async def link(self, **changes: str) -> Enclave:
        stub = self.stub()
        card = await stub.Describe(self.reference())
        metadata = {"stip-instance": card.instance, "stip-epoch": str(card.epoch), **changes}
        enclave = Enclave(self.plain, card, stub.Link(metadata=tuple(metadata.items())))
        self._enclaves.append(enclave)
        return enclave

    def metric(self, name: str, **labels: str) -> float:
        return self.telemetry.registry.get_sample_value(name, labels) or 0.0

    async def quiet(self) -> None:
        """Until no session is open."""
        while self.service.sessions:  # noqa: ASYNC110 - the state is the service's own
            await asyncio.sleep(0.002)

    async def leave(self) -> None:
        for enclave in self._enclaves:
            await enclave.leave()
        for made in self._channels:
            await made.close()
