"""The enclave's gRPC service: evidence for a nonce, and sessions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import structlog

from stip_enclave.accounts import Accounts
from stip_enclave.config import Limits
from stip_enclave.guards import Rate
from stip_enclave.identity import EnclaveIdentity
from stip_enclave.meters import Meters
from stip_enclave.session import Session as UserSession
from stip_enclave.session import failure
from stip_enclave.turns import TurnRequest
from stip_protocol import rpc
from stip_protocol.attestation import freshness
from stip_protocol.attestation.evidence import EvidenceProvider
from stip_protocol.errors import DeadlineExceeded, Draining, FrameInvalid, Overloaded, StipError
from stip_protocol.fields import REQUEST_ID
from stip_protocol.runtime.logs import fault
from stip_protocol.telemetry import SESSIONS, Telemetry
from stip_protocol.wire import enclave_pb2, enclave_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Requests = AsyncIterator[enclave_pb2.ClientFrame]
RETRY_SECONDS = 1.0
"""What a client is told to wait where all places are taken: they come free one by one."""


class EnclaveService(enclave_pb2_grpc.EnclaveServicer):
    """`stip.enclave.v1.Enclave`."""

    def __init__(
        self,
        identity: EnclaveIdentity,
        provider: EvidenceProvider,
        accounts: Accounts,
        limits: Limits,
        telemetry: Telemetry,
    ) -> None:
        self._identity, self._provider = identity, provider
        self._accounts, self._limits = accounts, limits
        self._telemetry, self._meters = telemetry, Meters.of(telemetry)
        self._attests = Rate("attestations", limits.attests_per_second)
        self._attest_time = telemetry.stage("attest")
        self._streams = 0
        self._users: Counter[bytes] = Counter()
        self._sessions: set[UserSession] = set()
        self._draining = False
        self._quiet = asyncio.Event()
        self._quiet.set()
        telemetry.gauge(SESSIONS).set_function(lambda: len(self._sessions))

    async def Attest(  # noqa: N802 - the name is the wire's
        self, request: enclave_pb2.AttestRequest, context: Context
    ) -> enclave_pb2.AttestReply:
        """Evidence over claims that are written here: the caller's nonce and this enclave's own TLS key."""
        self._attests.take()
        began = time.perf_counter()
        answer = await asyncio.to_thread(
            freshness.answer, self._provider, request.nonce, self._identity.tls.spki_sha256
        )
        self._attest_time.observe(time.perf_counter() - began)
        return enclave_pb2.AttestReply(
            claims=answer.claims, quote=answer.evidence.quote, collateral=answer.evidence.collateral
        )

    async def Session(  # noqa: N802 - the name is the wire's
        self, requests: Requests, context: Context
    ) -> AsyncIterator[enclave_pb2.EnclaveFrame]:
        """One session. Its errors end it, and it alone, as a `Failed` frame."""
        request_id = _request_id(context)
        structlog.contextvars.bind_contextvars(request_id=request_id)
        if self._draining:
            raise Draining("the enclave takes no new sessions")
        if self._streams >= self._limits.sessions:
            raise _full("sessions", self._limits.sessions)
        self._streams += 1
        self._quiet.clear()
        user: bytes | None = None
        session: UserSession | None = None
        reading: asyncio.Task[None] | None = None
        try:
            opening = await self._opening(requests)
            signer = self._identity.delegation(opening.delegation, opening.instance).user
            allowed = self._limits.sessions_per_user
            if self._users[signer] >= allowed:
                raise _full("sessions of one user", allowed)
            user = signer
            self._users[user] += 1
            session, opened = await self._open(opening, request_id)
            yield opened
            reading = asyncio.create_task(self._read(requests, session))
            while (frame := await session.frames.get()) is not None:
                session.taken()
                yield frame
                if frame.HasField("failed"):
                    break
        except StipError as error:
            self._telemetry.refused(error.code)
            structlog.get_logger().warning("session refused", code=error.code, detail=error.message)
            yield failure(error)
        finally:
            self._streams -= 1
            if user is not None:
                self._users.subtract([user])
                self._users += Counter()  # forgets users without sessions
            if reading is not None:
                reading.cancel()
            if session is not None:
                session.close()
                self._sessions.discard(session)
                structlog.get_logger().info("session closed")
            if not self._streams:
                self._quiet.set()

    async def drain(self) -> None:
        """No new sessions; running turns finish, then their sessions end."""
        self._draining = True
        for session in list(self._sessions):
            session.drain()
        try:
            await self._quiet.wait()
        finally:
            for session in list(self._sessions):
                session.failed(Draining("the enclave is stopping"))

    async def _opening(self, requests: Requests) -> enclave_pb2.Open:
        try:
            async with asyncio.timeout(self._limits.open_seconds):
                frame = await anext(aiter(requests), None)
        except TimeoutError:
            raise DeadlineExceeded.because("open", "nothing", f"a message in {self._limits.open_seconds:g} s") from None
        if frame is None or not frame.HasField("open"):
            raise FrameInvalid("first message: must be open", field="body")
        return frame.open

    async def _open(self, opening: enclave_pb2.Open, request_id: str) -> tuple[UserSession, enclave_pb2.EnclaveFrame]:
        account, instance = await self._accounts.get(opening.delegation, opening.instance)
        session = UserSession(instance, account, self._limits, self._meters)
        await session.start(request_id, opening.max_positions)
        self._sessions.add(session)
        if self._draining:
            session.drain()
        structlog.get_logger().info("session opened", instance=opening.instance, epoch=instance.manifest.epoch)
        opened = enclave_pb2.Opened(
            session=bytes.fromhex(request_id),
            preset=instance.manifest.preset,
            vocabulary=instance.manifest.vocabulary,
            max_positions=session.max_positions,
            simulated=self._provider.simulated,
            manifest_digest=instance.digest,
            epoch=instance.manifest.epoch,
            audit_head=self._accounts.audit_head,
        )
        return session, enclave_pb2.EnclaveFrame(opened=opened)

    async def _read(self, requests: Requests, session: UserSession) -> None:
        """The client's frames after the first."""
        try:
            async for frame in requests:
                kind = frame.WhichOneof("body")
                if kind == "turn":
                    session.begin(TurnRequest.read(frame.turn, self._limits))
                elif kind == "cancel":
                    session.cancel()
                else:
                    raise FrameInvalid.because("message", kind, "turn or cancel")
                if session.ended:
                    return
            session.leave()
        except StipError as error:
            session.failed(error)
        except Exception as error:  # noqa: BLE001 - a defect of ours must end the session, not leave it waiting
            structlog.get_logger().error("session failed", fault=fault(error))
            session.failed(StipError("internal error; see the log of the enclave"))


def _full(what: str, limit: int) -> Overloaded:
    """One more than `limit` was asked for."""
    error = Overloaded.because(what, limit + 1, f"at most {limit}")
    error.retry_after = RETRY_SECONDS
    return error


def _request_id(context: Context) -> str:
    """The client's content-free id for this session, or a fresh one where it sent none that is well-formed."""
    for key, value in context.invocation_metadata() or ():
        if key == rpc.REQUEST_ID_KEY and isinstance(value, str) and REQUEST_ID.fullmatch(value):
            return value
    return secrets.token_hex(16)
