"""The other end of one `Link` stream, as the service sees it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from stip_server.engine import Form, Ids
from stip_server.messages import Answer, fed_frames
from stip_server.outbox import Outbox

FORGOTTEN = 4096
"""Ended sessions that a peer's rows are still passed over for, before they count as of unknown sessions."""


@dataclass(frozen=True, slots=True)
class Member:
    """A session of a link."""

    request_id: str
    form: Form


class Peer:
    """One stream: its sessions, and what waits to be sent. `number` is the first half of its sessions' keys."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sessions: dict[bytes, Member] = {}
        """By handle."""
        self.outbox = Outbox()
        self._ended: OrderedDict[bytes, None] = OrderedDict()

    def answer(self, answers: list[Answer]) -> None:
        """Send what the engine says."""
        self.outbox.add(answer for answer in answers if isinstance(answer, Ids))
        for frame in fed_frames(answer for answer in answers if not isinstance(answer, Ids)):
            self.outbox.put(frame)

    def read_to_the_end(self, reader: asyncio.Task[None]) -> None:
        """Called when nothing more comes from the peer: end the stream. Whoever sends raises what `reader` raised."""
        if not reader.cancelled():
            reader.exception()
        self.outbox.finish()

    def drop(self, handle: bytes) -> str:
        """Forget a session and remember that it was; its request id."""
        self._ended[handle] = None
        self._ended.move_to_end(handle)
        if len(self._ended) > FORGOTTEN:
            self._ended.popitem(last=False)
        member = self.sessions.pop(handle, None)
        return "" if member is None else member.request_id

    def had(self, handle: bytes) -> bool:
        """Whether the session ended."""
        return handle in self._ended

    def admit(self, handle: bytes, member: Member) -> None:
        self._ended.pop(handle, None)
        self.sessions[handle] = member
