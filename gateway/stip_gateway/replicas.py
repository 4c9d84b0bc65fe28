"""The replicas behind a gateway: which one holds an instance epoch, which one answers, which one is least loaded."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import grpc.aio
import structlog

from stip_gateway.config import Limits, ReplicaSettings
from stip_protocol import versions
from stip_protocol.errors import Draining, InstanceRefused, ManifestMismatch, ReplicaLost, StipError, TensorInvalid
from stip_protocol.rpc import channel, from_rpc
from stip_protocol.tensor import FRAME_LIMIT, row_bytes
from stip_protocol.wire import model_pb2, model_pb2_grpc


class Replica:
    """One model server: its channel, its card once it has described itself, and what is known of its load."""

    def __init__(self, settings: ReplicaSettings, opened: grpc.aio.Channel) -> None:
        self.settings = settings
        self.channel = opened
        self.stub: model_pb2_grpc.ModelAsyncStub = model_pb2_grpc.ModelStub(opened)
        self.card: model_pb2.Card | None = None
        """While it answers."""
        self.sessions = 0
        """Routed to it by this gateway and open now."""
        self.links = 0
        """Of this gateway."""
        self.draining_until = -math.inf
        """On the clock of `Replicas`: no new link goes to it before."""
        self.left = False
        """Whether its channel was closed: nothing can be asked of it any more."""
        self._others = 0
        self._manifest_digest: bytes | None = None

    @property
    def load(self) -> tuple[int, int]:
        """What two replicas are compared by: sessions, those of other gateways included, and then links, because
        sessions will open on links that have none yet."""
        return self.sessions + self._others, self.links

    def reported(self, sessions: int) -> None:
        """What it said of its load: sessions beyond ours came by other gateways."""
        self._others = max(0, sessions - self.sessions)

    def forget(self) -> None:
        """It answers no more: what it said of itself holds no longer."""
        self.card, self._others, self.draining_until = None, 0, -math.inf

    async def describe(self, seconds: float) -> model_pb2.Card:
        """Ask again. Raises the replica's own error or `ReplicaLost`, and then it has no card any more; while it
        is being asked it keeps the one it had.
        """
        try:
            self.card = await self._ask(seconds)
        except StipError:
            self.forget()
            raise
        return self.card

    async def close(self) -> None:
        """Part with it: what is being asked of it ends with `ReplicaLost`."""
        self.left = True
        self.forget()
        await self.channel.close()

    async def _ask(self, seconds: float) -> model_pb2.Card:
        wanted = self.settings
        try:
            card = await self.stub.Describe(
                model_pb2.InstanceRef(instance=wanted.instance, epoch=wanted.epoch), timeout=seconds
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
        except (asyncio.CancelledError, grpc.aio.UsageError):
            # Of a channel that was closed, which cancels its calls: whoever asks must not be cancelled with them.
            if not self.left:
                raise
            raise ReplicaLost(f"replica {wanted.name}: it left the routing table") from None
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
    """The routing table, kept current by `refresh` and by what links tell of their replicas."""

    def __init__(
        self,
        table: Sequence[ReplicaSettings],
        *,
        roots: bytes,
        identity: tuple[bytes, bytes],
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: seconds, for how long a replica drains."""
        self._limits, self._clock = limits, clock
        self._roots, self._identity = roots, identity
        self._replicas = [self._replica(row) for row in table]
        self._ask_again = asyncio.Event()
        self._asking: dict[Replica, asyncio.Task[None]] = {}

    def reread(self, table: Sequence[ReplicaSettings]) -> list[Replica]:
        """Take another table: what stands in both stays as it is, and what is new is asked at once.

        Returns what left it: no new link goes there, and its channel is the caller's to close.
        """
        kept = {replica.settings: replica for replica in self._replicas}
        self._replicas = [kept.pop(row) if row in kept else self._replica(row) for row in table]
        self._ask_again.set()
        return list(kept.values())

    async def choose(self, instance: str, epoch: int, name: str | None) -> Replica:
        """The least loaded replica that holds the instance epoch, answers and does not drain; `name` asks for one.

        Raises `InstanceRefused` where the table has none, `Draining` where all that answer drain, and `ReplicaLost`
        where none answers.
        """
        rows = [replica for replica in self._holding(instance, epoch) if name in (None, replica.settings.name)]
        if not rows:
            raise InstanceRefused("instance: no replica of this gateway holds this instance and epoch")
        if not any(map(self._takes_links, rows)):
            await asyncio.gather(*(self._try(replica) for replica in rows if replica.card is None))
        if ready := [replica for replica in rows if self._takes_links(replica)]:
            return min(ready, key=lambda replica: replica.load)
        again = self._limits.refresh_seconds
        if any(replica.card for replica in rows):
            raise Draining("every replica of this instance drains", retry_after=again)
        raise ReplicaLost("no replica of this instance answers", retry_after=again)

    def names(self, instance: str, epoch: int) -> list[str]:
        """The replicas of an instance epoch that answer and do not drain."""
        return [each.settings.name for each in self._holding(instance, epoch) if self._takes_links(each)]

    def routes(self, replica: Replica) -> bool:
        """Whether it still stands in the table."""
        return replica in self._replicas

    def answering(self) -> int:
        return sum(replica.card is not None for replica in self._replicas)

    def drains(self, replica: Replica, seconds: float) -> None:
        """It said so: new links go elsewhere for `seconds`, or until it has gone and come back.

        One that does not say how long is tried again after `refresh_seconds`, and may say so again.
        """
        now = self._clock()
        if now >= replica.draining_until:
            structlog.get_logger().info("replica drains", replica=replica.settings.name, seconds=seconds)
        replica.draining_until = now + max(seconds, self._limits.refresh_seconds)

    def lost(self, replica: Replica) -> None:
        """A link to it broke: new links go elsewhere until it has described itself again. It is asked at once."""
        if replica.card is not None:
            replica.forget()
            structlog.get_logger().warning("replica lost", replica=replica.settings.name, code=ReplicaLost.code)
        self._ask_again.set()

    async def refresh(self) -> None:
        """Describe every replica again, for ever."""
        while True:
            self._ask_again.clear()
            await asyncio.gather(*(self._try(replica) for replica in list(self._replicas)))
            try:
                async with asyncio.timeout(self._limits.refresh_seconds):
                    await self._ask_again.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*(replica.channel.close() for replica in self._replicas))

    def _replica(self, row: ReplicaSettings) -> Replica:
        opened = channel(row.address, roots=self._roots, identity=self._identity, server_name=row.server_name)
        return Replica(row, opened)

    def _holding(self, instance: str, epoch: int) -> list[Replica]:
        wanted = (instance, epoch)
        return [each for each in self._replicas if (each.settings.instance, each.settings.epoch) == wanted]

    def _takes_links(self, replica: Replica) -> bool:
        return replica.card is not None and self._clock() >= replica.draining_until

    async def _try(self, replica: Replica) -> None:
        """Ask a replica, together with all who are asking it already: callers do not multiply on the way through."""
        task = self._asking.get(replica)
        if task is None:
            task = self._asking[replica] = asyncio.create_task(self._ask(replica))
            task.add_done_callback(lambda _: self._asking.pop(replica))
        await asyncio.shield(task)

    async def _ask(self, replica: Replica) -> None:
        was = replica.card is not None
        try:
            await replica.describe(self._limits.describe_seconds)
        except StipError as error:
            if was:
                structlog.get_logger().warning("replica lost", replica=replica.settings.name, code=error.code)
        else:
            if not was:
                structlog.get_logger().info("replica answers", replica=replica.settings.name)
