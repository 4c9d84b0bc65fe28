"""The same surface without asyncio: one background event loop, and thin objects that ask it.

`connect`, `Connection` and `Session` mirror `aconnect`, `AsyncConnection` and `AsyncSession` name by name.
`Session.cancel` may be called from any thread while another iterates.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from stip.chat import Message
from stip.connection import CONNECT_SECONDS, OPEN_RETRIES, AsyncConnection, aconnect, averify
from stip.profile import Profile
from stip.session import TURN_SECONDS, AsyncSession, Chunk, Completion
from stip.verification import Verification
from stip_protocol.attestation.verifier import Step

T = TypeVar("T")
LOOK_SECONDS = 0.2
"""How long Ctrl-C may go unnoticed."""


class _Call(Generic[T]):
    """Work on the loop that can be cancelled before anybody holds its future."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self._task: asyncio.Task[Any] | None = None
        self._cancelled = False

    async def run(self) -> T:
        if self._cancelled:
            self._work.close()
            raise asyncio.CancelledError
        self._task = asyncio.current_task()
        return await self._work

    def cancel(self) -> None:
        """On the loop. Idempotent, and without effect once the work has ended."""
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()


class _Loop:
    """One event loop in one daemon thread, started on first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end. Where the caller is interrupted (Ctrl-C), the work is cancelled: whenever that comes,
        also between handing it over and waiting for it."""
        loop, call = self._started(), _Call(work)
        try:
            future = asyncio.run_coroutine_threadsafe(call.run(), loop)
            # A signal that comes just before this thread begins to wait does not end the wait: look again now and then.
            while not wait([future], timeout=LOOK_SECONDS).done:
                pass
            return future.result()
        except BaseException:
            loop.call_soon_threadsafe(call.cancel)
            raise

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="stip", daemon=True).start()
            return self._loop


_LOOP = _Loop()


def connect(profile: Profile | Path | str, *, timeout: float = CONNECT_SECONDS) -> Connection:
    """A verified connection to the profile's enclave, within `timeout` seconds. Raises as `stip.aconnect`."""
    return Connection(_LOOP.run(aconnect(profile, timeout=timeout)))


def verify(profile: Profile | Path | str, *, timeout: float = CONNECT_SECONDS) -> Verification:
    """The verification document, also where the enclave is refused. Raises as `stip.averify`."""
    return _LOOP.run(averify(profile, timeout=timeout))


class Connection:
    """A connection to one verified enclave. Made by `connect`; a context manager."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    @property
    def profile(self) -> Profile:
        return self._connection.profile

    @property
    def verification(self) -> Verification:
        """The document of the verification this connection rests on."""
        return self._connection.verification

    @property
    def audit_log(self) -> Step:
        """As `AsyncConnection.audit_log`."""
        return self._connection.audit_log

    def verify(self, *, timeout: float = CONNECT_SECONDS) -> Verification:
        """Verify the same enclave again, now."""
        return _LOOP.run(self._connection.verify(timeout=timeout))

    def session(
        self, *, max_positions: int = 0, timeout: float = CONNECT_SECONDS, open_retries: int = OPEN_RETRIES
    ) -> Session:
        """A new session of at most `max_positions` tokens, prompt and answer together (0: the instance's own).

        `open_retries`: see `AsyncConnection.session`.
        """
        opening = self._connection.session(max_positions=max_positions, timeout=timeout, open_retries=open_retries)
        return Session(_LOOP.run(opening))

    def close(self) -> None:
        """End all sessions and the channel; idempotent."""
        _LOOP.run(self._connection.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Session:
    """One user's session. Made by `Connection.session`; a context manager."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    @property
    def last(self) -> Completion | None:
        """How the last turn went; None while one runs and before the first."""
        return self._session.last

    @property
    def request_id(self) -> str:
        """What every part's log calls this session."""
        return self._session.request_id

    @property
    def max_positions(self) -> int:
        """Prompt and generated tokens that fit in."""
        return self._session.max_positions

    @property
    def preset(self) -> str:
        return self._session.preset

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: Iterable[int] | None = None,
        drafts: int = 0,
        timeout: float | None = TURN_SECONDS,
    ) -> Generator[Chunk, None, None]:
        """Continue the session with `prompt` and stream what the model says: see `AsyncSession.generate`."""
        return _iterate(
            self._session.generate(
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop_ids=stop_ids,
                drafts=drafts,
                timeout=timeout,
            )
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: Iterable[int] | None = None,
        drafts: int = 0,
        timeout: float | None = TURN_SECONDS,
    ) -> Generator[Chunk, None, None]:
        """Answer a whole conversation: see `AsyncSession.chat`."""
        return _iterate(
            self._session.chat(
                messages,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop_ids=stop_ids,
                drafts=drafts,
                timeout=timeout,
            )
        )

    def cancel(self) -> None:
        """Stop the running turn. Its stream ends with the finish reason `cancelled`; the session stays."""
        _LOOP.run(self._session.cancel())

    def close(self) -> None:
        """End the session; idempotent."""
        _LOOP.run(self._session.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _iterate(chunks: AsyncGenerator[Chunk, None]) -> Generator[Chunk, None, None]:
    # An interrupted step unwinds in the background: only then may the generator be closed.
    unwound = asyncio.Lock()

    async def following() -> Chunk | None:
        async with unwound:
            return await anext(chunks, None)

    async def closing() -> None:
        async with unwound:
            await chunks.aclose()

    try:
        while (chunk := _LOOP.run(following())) is not None:
            yield chunk
    finally:
        _LOOP.run(closing())
