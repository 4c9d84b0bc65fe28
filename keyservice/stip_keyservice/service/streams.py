"""Open watch streams: one look at the state for all of them, and each told at its own pace.

What a stream has not been told yet is the difference between two sets that are bounded by its leases, not a queue: one
that does not read keeps nothing but the last look.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import count

import structlog

from stip_keyservice.service.config import Limits
from stip_keyservice.service.watching import WATCHING, Change, Standing, changes
from stip_protocol.errors import Draining, Overloaded, Unavailable
from stip_protocol.runtime.serving import leave_with

LOOK_SECONDS = 0.25
"""Between two looks at the state: what another process revoked is told within twice that."""


@dataclass(eq=False)
class _Stream:
    link_key: bytes
    standing: Standing = field(default_factory=Standing)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False

    def end(self) -> None:
        self.over = True
        self.woken.set()


class Streams:
    """The watch streams of one process."""

    def __init__(
        self,
        look: Callable[[Collection[bytes]], Mapping[bytes, Standing]],
        limits: Limits,
        *,
        observe: Callable[[int], None] = lambda open_now: None,
    ) -> None:
        """`look` finds the standings of link keys, and blocks. `observe` is told how many streams are open."""
        self._look, self._limits, self._observe = look, limits, observe
        self._open: list[_Stream] = []
        self._closing = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    async def changes(self, link_key: bytes) -> AsyncGenerator[tuple[int, Change], None]:
        """What a link key is told, numbered from 0, until it leaves or the process drains. To be closed by the caller.

        Beyond the bound of one link key its oldest stream ends: a peer that lost its connection comes back before this
        side has noticed. Raises `Overloaded`, `Draining`.
        """
        stream, sequence = self._enter(link_key), count()
        try:
            yield next(sequence), WATCHING
            told = Standing()
            while not stream.over:
                await stream.woken.wait()
                stream.woken.clear()
                found = stream.standing
                for change in changes(told, found):
                    yield next(sequence), change
                told = found
        finally:
            self._open.remove(stream)
            self._observe(len(self._open))

    async def close(self) -> None:
        """End every stream, and accept no more."""
        self._closing.set()
        for stream in self._open:
            stream.end()
        if self._looking is not None:
            await self._looking

    def _enter(self, link_key: bytes) -> _Stream:
        if self._closing.is_set():
            raise Draining("watch: this key service is stopping")
        allowed = self._limits.watches_per_key
        same = [stream for stream in self._open if stream.link_key == link_key]
        told = [stream for stream in same if not stream.over]
        # one that was ended is still there while its peer does not read what it was told last
        for name, found, limit in (
            ("watch streams", len(self._open), self._limits.watches),
            ("watch streams of one link key", len(same), 2 * allowed),
        ):
            if found >= limit:
                raise Overloaded.because(name, found, f"fewer than {limit}")
        if len(told) >= allowed:
            told[0].end()
        stream = _Stream(link_key)
        self._open.append(stream)
        self._observe(len(self._open))
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._keep_looking())
            leave_with(self._looking, "watching the state")
        return stream

    async def _keep_looking(self) -> None:
        """While there are streams. A state that cannot be read is tried again: heartbeats are the bound meanwhile."""
        readable = True
        while self._open and not self._closing.is_set():
            try:
                found = await asyncio.to_thread(self._look, {stream.link_key for stream in self._open})
            except Unavailable as error:
                if readable:
                    structlog.get_logger().warning("watch streams are told late", code=error.code)
                readable = False
            else:
                readable = True
                self._tell(found)
            await self._pause()

    def _tell(self, found: Mapping[bytes, Standing]) -> None:
        for stream in self._open:
            standing = found.get(stream.link_key, Standing())
            if standing != stream.standing:
                stream.standing = standing
                stream.woken.set()

    async def _pause(self) -> None:
        try:
            await asyncio.wait_for(self._closing.wait(), LOOK_SECONDS)
        except TimeoutError:
            return
