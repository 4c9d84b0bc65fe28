"""The gRPC service: bounds, deadlines, and threads for work that blocks.

The store and the verifier block, so they run in a few threads; what waits for them is bounded, and what waits
too long is given up: a request that had not begun by then never begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import structlog

from stip_keyservice.service.config import Limits
from stip_keyservice.service.issuer import Issuer
from stip_keyservice.service.ratelimit import Kind, Limiter, peer_name
from stip_keyservice.service.release import Request
from stip_keyservice.service.streams import Streams
from stip_protocol.errors import DeadlineExceeded, Overloaded
from stip_protocol.rpc import REQUEST_ID_KEY
from stip_protocol.wire import keyservice_pb2, keyservice_pb2_grpc

T = TypeVar("T")
_REQUEST_ID = re.compile(r"[0-9a-f]{32}")


class KeyServiceServicer(keyservice_pb2_grpc.KeyServiceServicer):
    """`stip.keyservice.v1.KeyService` over an `Issuer`."""

    def __init__(
        self,
        issuer: Issuer,
        limits: Limits,
        *,
        observe: Callable[[int], None] = lambda watches: None,
        limited: Callable[[Kind], None] = lambda kind: None,
    ) -> None:
        """`observe` is told how many watch streams are open, `limited` what a peer's limit refused."""
        self._limiter = Limiter(limits.rates, issuer.link_keys, refused=limited)
        self._issuer, self._limits = issuer, limits
        self._threads = ThreadPoolExecutor(limits.threads, thread_name_prefix="keyservice")
        self._waiting: set[Future[Any]] = set()
        self.streams = Streams(issuer.standings, limits, observe=observe)

    async def Challenge(  # noqa: N802 - names of RPCs
        self, request: keyservice_pb2.ChallengeRequest, context: Any
    ) -> keyservice_pb2.ChallengeReply:
        with _request_id(context):
            self._limiter.admit("challenge", peer_name(context.peer()))
            make = self._issuer.challenge
            made = await self._in_thread(make) if self._issuer.clock.behind else make()
            return keyservice_pb2.ChallengeReply(nonce=made.nonce, seconds=made.seconds, service=made.service)

    async def Release(  # noqa: N802 - the name is the wire's
        self, request: keyservice_pb2.ReleaseRequest, context: Any
    ) -> keyservice_pb2.ReleaseReply:
        with _request_id(context):
            peer = peer_name(context.peer())
            self._limiter.admit("release", peer)
            asked = Request(request.claims, request.quote, request.collateral, request.delegation)
            sealed, signature = await self._in_thread(lambda: self._issuer.release(asked, peer=peer))
            structlog.get_logger().info("released")
            return keyservice_pb2.ReleaseReply(sealed=sealed, signature=signature)

    async def Renew(  # noqa: N802 - the name is the wire's
        self, request: keyservice_pb2.RenewRequest, context: Any
    ) -> keyservice_pb2.RenewReply:
        with _request_id(context):
            peer = peer_name(context.peer())
            self._limiter.admit_renewal(peer, request.heartbeat, request.signature)
            renewal = await self._in_thread(lambda: self._issuer.renew(request.heartbeat, request.signature, peer=peer))
            return keyservice_pb2.RenewReply(renewal=renewal)

    async def Watch(  # type: ignore[override]  # noqa: N802 - the wire's name; the stubs know iterators alone
        self, request: keyservice_pb2.WatchRequest, context: Any
    ) -> None:
        with _request_id(context):
            self._limiter.admit("watch", peer_name(context.peer()))
            asked = await self._in_thread(
                lambda: self._issuer.watch(request.watch, request.signature, request.link_key)
            )
            async with contextlib.aclosing(self.streams.changes(asked.link_key)) as changes:
                async for sequence, change in changes:
                    notice = self._issuer.notice(change, asked.nonce, sequence)
                    await context.write(keyservice_pb2.WatchReply(notice=notice))

    async def drain(self) -> None:
        """End the watch streams, and wait for the work that is under way."""
        await self.streams.close()
        await asyncio.gather(*(asyncio.wrap_future(work) for work in self._waiting), return_exceptions=True)
        self._threads.shutdown(wait=False)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if len(self._waiting) >= self._limits.waiting:
            raise Overloaded.because("waiting requests", len(self._waiting), f"fewer than {self._limits.waiting}")
        future = self._threads.submit(work)
        self._waiting.add(future)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(self._waiting.discard, done))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._limits.deadline_seconds)
        except TimeoutError:
            raise DeadlineExceeded.because(
                "time for the decision", "no answer", f"{self._limits.deadline_seconds} s"
            ) from None


@contextlib.contextmanager
def _request_id(context: Any) -> Iterator[None]:
    """Bind the caller's content-free request id to this request's log lines."""
    given = dict(context.invocation_metadata() or ()).get(REQUEST_ID_KEY, "")
    known = isinstance(given, str) and _REQUEST_ID.fullmatch(given)
    with structlog.contextvars.bound_contextvars(**({"request_id": given} if known else {})):
        yield
