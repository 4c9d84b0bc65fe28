"""The replicas behind a gateway: which one holds an instance epoch, which one answers, which one is least loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc.aio
import structlog

from stip_gateway.config import Limits, ReplicaSettings
from stip_protocol import versions
from stip_protocol.errors import InstanceRefused, ManifestMismatch, ReplicaLost, StipError, TensorInvalid
from stip_protocol.rpc import channel, from_rpc
from stip_protocol.tensor import FRAME_LIMIT, row_bytes
from stip_protocol.wire import model_pb2, model_pb2_grpc


class Replica:
    """One model server: its channel, its card once it has described itself, and the sessions routed to it."""

    def __init__(self, settings: ReplicaSettings, opened: grpc.aio.Channel) -> None:
        self.settings = settings
        self.channel = opened
        self.stub: model_pb2_grpc.ModelAsyncStub = model_pb2_grpc.ModelStub(opened)
        self.card: model_pb2.Card | None = None
        """While it answers."""
        self.sessions = 0
        self._manifest_digest: bytes | None = None

    async def describe(self, seconds: float) -> model_pb2.Card:
        """Ask again. Raises the replica's own error or `ReplicaLost`, and then it has no card any more; while it
        is being asked it keeps the one it had.
        """
        try:
            self.card = await self._ask(seconds)
        except StipError:
            self.card = None
            raise
        return self.card

    async def _ask(self, seconds: float) -> model_pb2.Card:
        wanted = self.settings
        try:
            card = await self.stub.Describe(
                model_pb2.InstanceRef(instance=wanted.instance, epoch=wanted.epoch), timeout=seconds
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
        versions.require_wire(card.version, peer=f"replica {wanted.name}")
        if (card.instance, card.epoch) != (wanted.instance, wanted.epoch):
            raise ManifestMismatch.because(
                f"replica {wanted.name}", f"{card.instance[:64]}/{card.epoch}", f"{wanted.instance}/{wanted.epoch}"
            )
        if self._manifest_digest not in (None, card.manifest_digest):
            raise ManifestMismatch(f"replica {wanted.name}: another manifest than before under the same epoch")
        if not 0 < row_bytes(card.dtype, card.width) <= FRAME_LIMIT:
            raise TensorInvalid.because(f"replica {wanted.name} width", card.width, f"rows of 1 to {FRAME_LIMIT} bytes")
        self._manifest_digest = card.manifest_digest
        return card


class Replicas:
    """The routing table, kept current by `refresh`."""

    def __init__(
        self, table: Sequence[ReplicaSettings], *, roots: bytes, identity: tuple[bytes, bytes], limits: Limits
    ) -> None:
        self._limits = limits
        self._replicas = [
            Replica(row, channel(row.address, roots=roots, identity=identity, server_name=row.server_name))
            for row in table
        ]

    async def choose(self, instance: str, epoch: int, name: str | None) -> Replica:
        """The least loaded replica that holds the instance epoch and answers; `name` asks for one.

        Raises `InstanceRefused` where the table has none and `ReplicaLost` where none answers.
        """
        rows = [
            replica
            for replica in self._replicas
            if (replica.settings.instance, replica.settings.epoch) == (instance, epoch)
            and name in (None, replica.settings.name)
        ]
        if not rows:
            raise InstanceRefused("instance: no replica of this gateway holds this instance and epoch")
        if not any(replica.card for replica in rows):
            await asyncio.gather(*(self._try(replica) for replica in rows))
        answering = [replica for replica in rows if replica.card]
        if not answering:
            raise ReplicaLost("no replica of this instance answers")
        return min(answering, key=lambda replica: replica.sessions)

    def names(self, instance: str, epoch: int) -> list[str]:
        """The replicas of an instance epoch that answer."""
        return [
            replica.settings.name
            for replica in self._replicas
            if replica.card and (replica.card.instance, replica.card.epoch) == (instance, epoch)
        ]

    def answering(self) -> int:
        return sum(replica.card is not None for replica in self._replicas)

    async def refresh(self) -> None:
        """Describe every replica again, for ever."""
        while True:
            await asyncio.gather(*(self._try(replica) for replica in self._replicas))
            await asyncio.sleep(self._limits.refresh_seconds)

    async def close(self) -> None:
        await asyncio.gather(*(replica.channel.close() for replica in self._replicas))

    async def _try(self, replica: Replica) -> None:
        was = replica.card is not None
        try:
            await replica.describe(self._limits.describe_seconds)
        except StipError as error:
            if was:
                structlog.get_logger().warning("replica lost", replica=replica.settings.name, code=error.code)
        else:
            if not was:
                structlog.get_logger().info("replica answers", replica=replica.settings.name)
