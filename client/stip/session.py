"""A session with an enclave: prompts in, a stream of text out, several turns over one KV cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from stip.chat import Message
from stip.sampling import Sampling, require_ids
from stip.stream import FinishReason, Stream, Turn
from stip.tokenizer import Tokenizer
from stip_protocol.errors import Cancelled, ConfigurationError, DeadlineExceeded, PositionRefused, StipError

TURN_SECONDS = 600.0
"""Default time for a whole turn."""
SETTLE_SECONDS = 10.0
"""How long an enclave may take to stop a turn."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One token's share of an answer. `text` is empty while a character is incomplete; `id` is None for a last
    remainder without a token of its own."""

    text: str = field(repr=False)
    id: int | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """How the last turn went. Counts and seconds, no content."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seed: int
    seconds: float
    first_token_seconds: float | None
    """None where no token came."""


@dataclass(frozen=True, slots=True)
class _Request:
    ids: list[int] = field(repr=False)
    sampling: Sampling
    timeout: float | None
    transcript: str | None = field(repr=False)
    """What the enclave will have read when this turn's prompt is in; None where it is not known as text."""
    afresh: bool
    """Needs a new stream: what was said so far is not how this prompt begins."""


class AsyncSession:
    """One user's session. Made by `AsyncConnection.session`; an async context manager.

    One turn at a time: a new turn ends one that still runs. Nothing is ever sent twice: a turn that fails is
    reported, and the caller decides.
    """

    def __init__(self, reopen: Callable[[], Awaitable[Stream]], stream: Stream, tokenizer: Tokenizer) -> None:
        self._reopen = reopen
        self._stream = stream
        self._tokenizer = tokenizer
        self._transcript: str | None = ""
        self._turn: Turn | None = None
        self._last: Completion | None = None
        self._closed = False

    @property
    def last(self) -> Completion | None:
        """How the last turn went; None while one runs and before the first."""
        return self._last

    @property
    def request_id(self) -> str:
        """What every part's log calls this session."""
        return self._stream.request_id

    @property
    def max_positions(self) -> int:
        """Prompt and generated tokens that fit in."""
        return self._stream.opened.max_positions

    @property
    def preset(self) -> str:
        return self._stream.opened.preset

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
    ) -> AsyncGenerator[Chunk, None]:
        """Continue the session with `prompt` and stream what the model says.

        A `str` is tokenized here, with the model's special tokens around it in the first turn; ids are sent as
        they are. `stop_ids` None takes the instance's own, `()` none. `timeout` is seconds for the whole turn.
        `drafts`: tokens guessed ahead a round trip; off by default, because the operator sees how many were right,
        and so how repetitive the text is (`stip.sampling.Sampling`).

        Raises `RequestInvalid`, `PositionRefused` at once; while iterating `DeadlineExceeded` (the turn is
        cancelled, the session stays), `ChannelChanged`, or what the enclave reports (the session is over).
        """
        sampling = self._sampling(max_tokens, temperature, top_k, top_p, seed, stop_ids, drafts)
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt, special=self._stream.position == 0)
        else:
            ids = list(prompt)
        self._require(ids, self._stream.position)
        return self._run(_Request(ids, sampling, timeout, None, afresh=False))

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
    ) -> AsyncGenerator[Chunk, None]:
        """Answer a whole conversation, rendered by the instance's chat template on this machine.

        Where the conversation begins with what this session already holds, only the rest is sent; otherwise,
        and after a turn that failed, the session starts afresh. Raises as `generate`, and `ConfigurationError`
        where there is no template.
        """
        if self._tokenizer.template is None:
            raise ConfigurationError("chat template: this instance's tokenizer has none; use generate")
        sampling = self._sampling(max_tokens, temperature, top_k, top_p, seed, stop_ids, drafts)
        text = self._tokenizer.template.render(messages)
        known = self._transcript
        afresh = known is None or not (text.startswith(known) and len(text) > len(known))
        ids = self._tokenizer.encode(text if afresh else text[len(known or "") :], special=False)
        self._require(ids, 0 if afresh else self._stream.position)
        return self._run(_Request(ids, sampling, timeout, text, afresh=afresh))

    async def cancel(self) -> None:
        """Stop the running turn. Its stream ends with the finish reason `cancelled`; the session stays."""
        await self._stream.cancel()

    async def close(self) -> None:
        """End the session; idempotent."""
        self._closed = True
        await self._stream.close()

    async def refuse(self, refusal: StipError) -> None:
        """End the session because its enclave is refused by now: no further prompt leaves, `refusal` is raised."""
        await self._stream.close(refusal)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, request: _Request) -> AsyncGenerator[Chunk, None]:
        started = time.monotonic()
        await self._stream.settle(timeout=SETTLE_SECONDS)
        self._last, self._transcript = None, None
        if self._closed:
            raise Cancelled("session: closed")
        if request.afresh and (self._stream.position > 0 or self._stream.failure is not None):
            await self._stream.close()
            self._stream = await self._reopen()
        stream = self._stream
        turn = self._turn = await stream.turn(request.ids, request.sampling)
        detokenizer = self._tokenizer.detokenizer()
        text, count, first = "", 0, None
        deadline = None if request.timeout is None else started + request.timeout
        try:
            while isinstance(item := await _within(turn, deadline), int):
                first = time.monotonic() - started if first is None else first
                piece = detokenizer.push(item)
                text += piece
                count += 1
                yield Chunk(piece, item)
            if rest := detokenizer.flush():
                text += rest
                yield Chunk(rest, None)
            if request.transcript is not None and self._turn is turn:
                self._transcript = request.transcript + text
        finally:
            # Also where the consumer stopped early or was cancelled: the enclave must not go on for nobody.
            await stream.cancel(turn)
            if self._turn is turn and stream.failure is None:
                self._last = Completion(
                    turn.finish or FinishReason.CANCELLED,
                    len(request.ids),
                    count,
                    request.sampling.seed or 0,
                    time.monotonic() - started,
                    first,
                )

    def _sampling(
        self,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int | None,
        stop_ids: Iterable[int] | None,
        drafts: int,
    ) -> Sampling:
        stops = self._tokenizer.manifest.stop_ids if stop_ids is None else tuple(stop_ids)
        if stops:
            require_ids(stops, vocabulary=self._stream.opened.vocabulary, what="stop_ids")
        return Sampling(max_tokens, temperature, top_k, top_p, seed, stops, drafts)

    def _require(self, ids: list[int], position: int) -> None:
        require_ids(ids, vocabulary=self._stream.opened.vocabulary, what="prompt")
        if position + len(ids) > self.max_positions:
            raise PositionRefused.because(
                "prompt", f"{len(ids)} ids at position {position}", f"at most {self.max_positions} positions"
            )


async def _within(turn: Turn, deadline: float | None) -> int | FinishReason:
    """The turn's next item before `deadline` (monotonic seconds)."""
    left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
    try:
        return await asyncio.wait_for(turn.next(), left)
    except TimeoutError:
        raise DeadlineExceeded("turn: not finished in its time; it is cancelled and the session stays") from None
