"""Connections: verified before they are returned, and again on every new transport below them."""

from __future__ import annotations

import asyncio
import random
import sys
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from stip import keys
from stip.channel import PinnedChannel, fetch_certificate, request_id
from stip.profile import Profile, Trust
from stip.session import AsyncSession
from stip.stream import Stream
from stip.tokenizer import Tokenizer
from stip.verification import SIMULATION_WARNING, Examination, Verification
from stip_protocol.attestation.freshness import new_nonce
from stip_protocol.attestation.verifier import Status, Step
from stip_protocol.documents import Signed
from stip_protocol.errors import (
    Action,
    AttestationError,
    Cancelled,
    DeadlineExceeded,
    IntegrityError,
    ManifestMismatch,
    RequestInvalid,
    SimulatedEvidenceRefused,
    StipError,
)
from stip_protocol.release import Delegation

T = TypeVar("T")
OPEN_RETRIES = 2
"""Further attempts to connect or to open a session, as clients of HTTP services expect them (the SDKs of the OpenAI
API retry twice)."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 8.0
"""Seconds before the second attempt, where the enclave does not say; four times more before each further one, up to
the longest."""
SPREAD = 0.1
"""The share that is added to a pause at random, so that those who were refused together do not come back together."""
CONNECT_SECONDS = 30.0
AUDIT_LOG = "audit log"
RENEW_BEFORE = 0.25
"""The share of a delegation's life before its end at which a new one is signed, after a new verification."""


async def aconnect(profile: Profile | Path | str, *, timeout: float = CONNECT_SECONDS) -> AsyncConnection:
    """A verified connection to the profile's enclave, within `timeout` seconds.

    Nothing that belongs to the user leaves before the enclave is verified. Raises `AttestationError` subclasses,
    `IntegrityError` subclasses (tokenizer files), `ConfigurationError` subclasses, `Unavailable` subclasses.
    """
    connection = AsyncConnection(_loaded(profile))
    try:
        await connection.open(timeout=timeout)
    except BaseException:
        await connection.close()
        raise
    return connection


async def averify(profile: Profile | Path | str, *, timeout: float = CONNECT_SECONDS) -> Verification:
    """Connect only to verify: the document, also where the enclave is refused.

    Raises `ConfigurationError` subclasses and `Unavailable` subclasses; there is nothing to verify then.
    """
    connection = AsyncConnection(_loaded(profile))
    try:
        await connection.open(timeout=timeout)
    except (AttestationError, IntegrityError):
        if connection.examined is None:
            raise
    finally:
        await connection.close()
    assert connection.examined is not None
    return connection.examined


@dataclass(frozen=True, slots=True)
class _Enclave:
    """One verified channel and the delegation that was signed for the enclave at its end."""

    channel: PinnedChannel
    certificate: bytes
    verification: Verification
    delegation: bytes = field(repr=False)
    renew_at: int


class AsyncConnection:
    """A connection to one verified enclave. Made by `aconnect`; an async context manager."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.examined: Verification | None = None
        """The document of the latest verification, whatever it came to."""
        self._trust: Trust = profile.trust()
        self._key = keys.load(profile.user_key)
        self._developer = profile.developer()
        self._memory = profile.memory()
        self._audit_log = Step(AUDIT_LOG, Status.SKIPPED)
        self._tokenizer: Tokenizer | None = None
        self._channel: PinnedChannel | None = None
        self._enclave: _Enclave | None = None
        self._sessions: weakref.WeakSet[AsyncSession] = weakref.WeakSet()
        self._verifying = asyncio.Lock()

    @property
    def profile(self) -> Profile:
        return self._profile

    @property
    def verification(self) -> Verification:
        """The document of the verification this connection rests on."""
        return self._current().verification

    @property
    def audit_log(self) -> Step:
        """Whether the key service's audit log, as the latest session brought its head, is the one shown before; skipped
        where the profile names no `service_key`, and before the first session."""
        return self._audit_log

    @property
    def tokenizer(self) -> Tokenizer:
        """The instance's tokenizer, from files that the developer signed."""
        if self._tokenizer is None:
            raise Cancelled("connection: not open")
        return self._tokenizer

    async def open(self, *, timeout: float) -> None:
        """Verify, then be usable. Called by `aconnect`."""
        deadline = time.monotonic() + timeout
        await _retried(lambda: self._verify(deadline), deadline, OPEN_RETRIES)
        if self.verification.simulated:
            _warn()

    async def verify(self, *, timeout: float = CONNECT_SECONDS) -> Verification:
        """Verify the same enclave again, now. Raises as `aconnect`; a refusal ends the connection and its sessions."""
        await self._verify(time.monotonic() + timeout)
        return self.verification

    async def session(
        self, *, max_positions: int = 0, timeout: float = CONNECT_SECONDS, open_retries: int = OPEN_RETRIES
    ) -> AsyncSession:
        """A new session of at most `max_positions` tokens, prompt and answer together (0: the instance's own).

        Where the enclave is busy or away, opening is tried `open_retries` times more: after the time that it names,
        else after a growing pause, and only within `timeout`. An error that is raised has `retry_after` where the
        enclave named one. Opening carries nothing of a prompt; a turn is never tried again by itself, because it
        may have begun.

        Where the transport was interrupted since the last verification, the enclave is verified again first.
        Raises `RequestInvalid`, `ChannelChanged` where another certificate answers by now, `AuditLogForked` where the
        key service shows another audit log than before (with `service_key` in the profile), and what the enclave
        reports.
        """
        if open_retries < 0:
            raise RequestInvalid.because("open_retries", open_retries, "0 or more")

        async def reopen() -> Stream:
            deadline = time.monotonic() + timeout
            return await _retried(lambda: self._open_stream(max_positions, deadline), deadline, open_retries)

        session = AsyncSession(reopen, await reopen(), self.tokenizer)
        self._sessions.add(session)
        return session

    async def close(self) -> None:
        """End all sessions and the channel; idempotent."""
        for session in list(self._sessions):
            await session.close()
        self._sessions.clear()
        channel, self._channel, self._enclave = self._channel, None, None
        if channel is not None:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _current(self) -> _Enclave:
        if self._enclave is not None:
            return self._enclave
        if self.examined is not None and self.examined.refusal is not None:
            raise self.examined.refusal
        raise Cancelled("connection: closed")

    async def _open_stream(self, max_positions: int, deadline: float) -> Stream:
        enclave = self._current()
        if not enclave.channel.continuous or time.time() >= enclave.renew_at:
            await self._verify(deadline)
            enclave = self._current()
        stream = await Stream.open(
            enclave.channel.stub,
            request_id=request_id(),
            delegation=enclave.delegation,
            instance=self.profile.instance,
            max_positions=max_positions,
            timeout=_left(deadline),
            explain=enclave.channel.explain,
        )
        try:
            self._require_opened(stream)
            self._audit_log = await self._examined(stream.opened.audit_head)
        except StipError:
            await stream.close()
            raise
        return stream

    def _require_opened(self, stream: Stream) -> None:
        """What the enclave says of the session must be what was verified."""
        opened, manifest = stream.opened, self.tokenizer.manifest
        if opened.simulated and not self.verification.simulated:
            raise SimulatedEvidenceRefused.because("session", "simulated", "what the evidence said")
        if opened.vocabulary != manifest.vocabulary:
            raise ManifestMismatch.because("session vocabulary", opened.vocabulary, manifest.vocabulary)

    async def _examined(self, head: bytes) -> Step:
        """Hold the head that a session brought against all before. Raises as `HeadMemory.check`."""
        memory, expected = self._memory, "signed by the key service, of the log that was shown before"
        if memory is None:
            return Step(AUDIT_LOG, Status.SKIPPED, expected, "no service_key in the profile")
        if not head:
            return Step(AUDIT_LOG, Status.SKIPPED, expected, "no head: the enclave is of an older version")
        found = await asyncio.to_thread(memory.check, head)
        return Step(AUDIT_LOG, Status.PASSED, expected, f"entry {found.sequence}, one log")

    async def _verify(self, deadline: float) -> None:
        async with self._verifying:
            held, self._enclave = self._enclave, None
            examination = Examination(self.profile, self._trust, clock=time.time)
            try:
                self._enclave = await self._examine(examination, held, deadline)
            except (AttestationError, IntegrityError) as refusal:
                self.examined = examination.finish(refusal)
                for session in list(self._sessions):
                    await session.refuse(refusal)
                raise
            except StipError:
                # Nobody was refused: the enclave could not be asked. What was verified keeps its pin.
                self._enclave = held
                raise
            self.examined = self._enclave.verification

    async def _examine(self, examination: Examination, held: _Enclave | None, deadline: float) -> _Enclave:
        profile = self.profile
        self._tokenizer = examination.manifest(self._developer)
        der = await fetch_certificate(profile.enclave, profile.server_name, timeout=_left(deadline))
        certificate = examination.certificate(der, pinned=held.certificate if held else None)
        if held is None:
            if self._channel is not None:
                await self._channel.close()
            self._channel = PinnedChannel(profile.enclave, profile.server_name, der)
        channel = held.channel if held else self._channel
        assert channel is not None
        nonce = new_nonce()
        with examination.channel():
            reply = await channel.attest(nonce, timeout=_left(deadline))
        examination.answer(certificate, nonce, reply.claims, reply.quote, reply.collateral)
        verification = examination.finish(None)
        delegation = Delegation(
            user=self._key.public,
            enclave_key=certificate.spki_sha256,
            measurement=verification.measurement or b"",
            instance=profile.instance,
            nonce=new_nonce(),
            expires=verification.at + profile.delegation_seconds,
        )
        return _Enclave(
            channel=channel,
            certificate=der,
            verification=verification,
            delegation=Signed.sign(delegation, self._key.private).to_bytes(),
            renew_at=delegation.expires - int(profile.delegation_seconds * RENEW_BEFORE),
        )


def _loaded(profile: Profile | Path | str) -> Profile:
    return profile if isinstance(profile, Profile) else Profile.load(profile)


def _left(deadline: float) -> float:
    """Seconds until `deadline` (monotonic). Raises `DeadlineExceeded` where there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("connection: not verified in its time")
    return left


async def _retried(attempt: Callable[[], Awaitable[T]], deadline: float, retries: int) -> T:
    """`attempt`, and `retries` times more where its error says retry. For what carries nothing of a prompt, and only
    that. What there is no time left to wait for is raised at once.
    """
    for tried in range(retries):
        try:
            return await attempt()
        except StipError as error:
            final = isinstance(error, DeadlineExceeded | Cancelled) or error.action is not Action.RETRY
            pause = _pause(tried, error.retry_after)
            if final or time.monotonic() + pause >= deadline:
                raise
        await asyncio.sleep(pause)
    return await attempt()


def _pause(tried: int, retry_after: float | None) -> float:
    """Seconds before the next attempt."""
    pause = min(FIRST_PAUSE * 4 ** min(tried, 8), LONGEST_PAUSE) if retry_after is None else retry_after
    return pause * (1 + SPREAD * random.random())  # noqa: S311 - not a secret


def _warn() -> None:
    sys.stderr.write(f"stip: {SIMULATION_WARNING}\n")
    sys.stderr.flush()
