"""One link a replica: which replicas there are, which one takes the next session.

The gateway lists the replicas of an instance that answer. A link is opened to each of them; one that is lost or drains
takes nothing new, and is not tried again for a moment while others stand. Nothing here knows a session.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Callable, Collection

import grpc.aio
import structlog

from stip_enclave.cards import describe
from stip_enclave.config import Limits
from stip_enclave.inbox import Deliver
from stip_enclave.link import Link
from stip_enclave.outbox import Encoding
from stip_protocol.errors import PositionRefused, ReplicaLost, StipError, Unavailable
from stip_protocol.manifest import Manifest
from stip_protocol.telemetry import Telemetry
from stip_protocol.wire import model_pb2

Connect = Callable[[bytes], grpc.aio.Channel]
"""A channel to the gateway under a link certificate (DER)."""
REFRESH_SECONDS = 10.0
"""Age at which the list of replicas is asked for again, when a session is placed."""
HOLD_OFF_SECONDS = 2.0
"""How long a replica whose link ended is left alone while there are others."""
GRACE_SECONDS = 0.5
"""How long the first session waits for links to all replicas once there is one."""
RETRY_SECONDS = 5.0
"""What a client is told to wait where no replica takes sessions."""
REPLICAS_LIMIT = 256
"""Replicas of one instance that are linked, whatever a gateway lists."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""A replica's name, as a gateway's table has it: it goes into metadata and logs."""


class Links:
    """The links of one instance."""

    def __init__(
        self,
        connect: Connect,
        manifest: Manifest,
        digest: bytes,
        encoding: Encoding,
        deliver: Deliver,
        limits: Limits,
        telemetry: Telemetry,
    ) -> None:
        """`digest`: of the manifest."""
        self._connect, self._manifest, self._digest = connect, manifest, digest
        self._encoding, self._deliver, self._limits, self._telemetry = encoding, deliver, limits, telemetry
        self._links: list[Link] = []
        self._held_off: dict[str, float] = {}
        self._refreshed = -REFRESH_SECONDS
        self._refreshing: asyncio.Task[None] | None = None
        self._stopping: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def place(self, certificate: bytes, *, positions: int = 0, avoid: Collection[str] = ()) -> Link:
        """The least loaded link that takes new sessions of `positions` rows, if possible none to a replica in `avoid`.

        `certificate` (DER) is for links that have to be opened. Raises `PositionRefused` where every replica's sessions
        are shorter, `ReplicaLost` where none takes sessions, or what the gateway and the cards say.
        """
        if self._stopped:
            raise ReplicaLost("the instance was closed")
        if positions > self._manifest.max_positions:
            raise PositionRefused.because("max_positions", positions, f"at most {self._manifest.max_positions}")
        refreshing = None
        if not self._choices(avoid) or time.monotonic() - self._refreshed > REFRESH_SECONDS:
            refreshing = self._refresh(certificate)
        while refreshing is not None and not self._choices(avoid) and not refreshing.done():
            await asyncio.wait([refreshing], timeout=GRACE_SECONDS)
        usable = self._choices(avoid) or self._choices(())
        if not usable:
            if refreshing is not None and (error := refreshing.exception()) is not None:
                raise _fresh(error)
            raise ReplicaLost("no replica of this instance takes sessions", retry_after=RETRY_SECONDS)
        long_enough = [link for link in usable if link.max_positions >= positions]
        if not long_enough:
            longest = max(link.max_positions for link in usable)
            raise PositionRefused.because("max_positions", positions, f"at most {longest}")
        return min(long_enough, key=lambda link: link.load)

    def elsewhere(self, link: Link) -> bool:
        """Whether another link takes sessions."""
        return any(other is not link for other in self._choices(()))

    async def stop(self) -> None:
        """End all links, and open none any more. Once."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        for link in list(self._links):
            self._over(link)
        await asyncio.gather(*self._stopping)
        # Sessions that have ended may still know this object, and what a grant opened must not outlive it.
        self._stopped = True
        del self._encoding, self._deliver

    def _choices(self, avoid: Collection[str]) -> list[Link]:
        return [link for link in self._links if link.usable and link.replica not in avoid]

    def _over(self, link: Link) -> None:
        """A link was lost, or has drained: close it in the background."""
        if link in self._links:
            self._links.remove(link)
            self._held_off[link.replica] = time.monotonic() + HOLD_OFF_SECONDS
            task = asyncio.create_task(link.stop())
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)

    def _refresh(self, certificate: bytes) -> asyncio.Task[None]:
        """One refresh at a time, for all who wait."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._relist(certificate))
            self._refreshing.add_done_callback(_noted)
        return self._refreshing

    async def _relist(self, certificate: bytes) -> None:
        """Ask which replicas there are, and open the links that are missing.

        Raises what the gateway says, or what was said of the last replica, where no link could be opened.
        """
        channel = self._connect(certificate)
        try:
            card = await describe(channel, self._manifest, self._digest, self._limits.open_seconds)
        except BaseException:
            await channel.close()
            raise
        listed = _listed(card)
        now = time.monotonic()
        self._refreshed = now
        standing = {link.replica for link in self._links if link.usable}
        missing = [name for name in listed if name not in standing][: REPLICAS_LIMIT - len(self._links)]
        if standing:
            missing = [name for name in missing if self._held_off.get(name, now) <= now]
        self._held_off = {name: until for name, until in self._held_off.items() if until > now}
        if not missing:
            await channel.close()
            return
        # The channel that asked carries the first of them.
        channels = [channel, *(self._connect(certificate) for _ in missing[1:])]
        results = await asyncio.gather(
            *(self._open(channel, name) for channel, name in zip(channels, missing, strict=True)),
            return_exceptions=True,
        )
        errors = [result for result in results if result is not None]
        for error in errors:
            if not isinstance(error, StipError):
                raise error
            structlog.get_logger().warning("replica not linked", code=error.code, detail=error.message)
        if errors and not self._choices(()):
            raise errors[-1]

    async def _open(self, channel: grpc.aio.Channel, replica: str) -> None:
        try:
            card = await describe(channel, self._manifest, self._digest, self._limits.open_seconds, replica)
        except BaseException:
            await channel.close()
            raise
        link = Link(
            channel,
            card,
            replica,
            self._manifest,
            self._encoding,
            self._deliver,
            self._over,
            self._limits,
            self._telemetry,
        )
        self._links.append(link)


def _listed(card: model_pb2.Card) -> list[str]:
    """The replicas that a card names, each once; "" where it names none: whoever answers."""
    names = itertools.islice(filter(_NAME.fullmatch, dict.fromkeys(card.replicas)), REPLICAS_LIMIT)
    return list(names) or [""]


def _noted(task: asyncio.Task[None]) -> None:
    """What a refresh in the background raised is told where a session has no link."""
    if not task.cancelled():
        task.exception()


def _fresh(error: BaseException) -> BaseException:
    """The error for one of several who wait for the same refresh: each raises its own."""
    if not isinstance(error, StipError):
        return error
    retry_after = error.retry_after
    if retry_after is None and isinstance(error, Unavailable):
        retry_after = RETRY_SECONDS
    return type(error)(error.message, field=error.field, retry_after=retry_after)
