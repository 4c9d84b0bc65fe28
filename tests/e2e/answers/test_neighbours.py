"""Sessions beside honest ones that cancel, overrun, ask for nonsense or break the link's rules: only they end."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

import stip
from stip import keys
from stip.profile import Profile
from stip_protocol.errors import StipError
from stip_protocol.rpc import MESSAGE_BYTES
from stip_protocol.tensor import FRAME_LIMIT, ITEM_BYTES
from stip_protocol.wire import enclave_pb2, model_pb2
from stip_stack.adversary import RawClient, RawEnclave, RawLink
from stip_stack.trials import Job, Served, concurrently

if TYPE_CHECKING:
    from tests.e2e.conftest import System


@contextlib.asynccontextmanager
async def honest_sessions(served: Served, *, seed: int) -> AsyncIterator[None]:
    """Eight sessions generate all the while; afterwards every answer must be the plain model's."""
    over = asyncio.Event()

    async def rounds(connection: stip.AsyncConnection) -> None:
        number = 0
        while not over.is_set() or not number:
            jobs = served.mixed(12, seed=seed + 1000 * number)
            for job, answer in zip(jobs, await concurrently(connection, jobs, streams=8), strict=True):
                served.require_plain(job, answer)
            number += 1

    async with await stip.aconnect(served.profile) as connection:
        running = asyncio.create_task(rounds(connection))
        try:
            yield
        finally:
            over.set()
            await running


def turn(ids: list[int], *, raw: bytes | None = None, **sampling: object) -> enclave_pb2.ClientFrame:
    packed = struct.pack(f"<{len(ids)}I", *ids) if raw is None else raw
    fields = {"max_tokens": 4, **sampling}
    return enclave_pb2.ClientFrame(turn=enclave_pb2.Turn(ids=packed, sampling=enclave_pb2.Sampling(**fields)))


WRONG_TURNS: dict[str, tuple[Callable[[Served], list[enclave_pb2.ClientFrame]], str]] = {
    "a temperature that is no number": (lambda s: [turn(s.prompt(1, 3), temperature=float("nan"))], "request_invalid"),
    "a negative temperature": (lambda s: [turn(s.prompt(1, 3), temperature=-1.0)], "request_invalid"),
    "a mass above one": (lambda s: [turn(s.prompt(1, 3), temperature=1.0, top_p=1.5)], "request_invalid"),
    "no tokens": (lambda s: [turn(s.prompt(1, 3), max_tokens=0)], "request_invalid"),
    "an id outside of the vocabulary": (lambda s: [turn([3, s.plain.vocabulary])], "request_invalid"),
    "no ids": (lambda s: [turn([])], "request_invalid"),
    "half an id": (lambda s: [turn([], raw=b"\1\0\0")], "frame_invalid"),
    "stop ids cut short": (lambda s: [turn(s.prompt(1, 3), stop_ids=b"\1\0")], "frame_invalid"),
    "a turn while one runs": (lambda s: [turn(s.prompt(1, 3), max_tokens=400)] * 2, "frame_invalid"),
    "more ids than positions": (lambda s: [turn(s.prompt(1, 513))], "position_refused"),
    "a second opening": (lambda s: [enclave_pb2.ClientFrame(open=enclave_pb2.Open())], "frame_invalid"),
    "an empty message": (lambda s: [enclave_pb2.ClientFrame()], "frame_invalid"),
}


async def test_clients_that_cancel_overrun_or_ask_for_nonsense_leave_the_others_exact(served: Served) -> None:
    async with (
        honest_sessions(served, seed=200),
        await stip.aconnect(served.profile) as connection,
        RawClient.connect(Profile.load(served.profile)) as raw,
    ):
        for case, (frames, code) in WRONG_TURNS.items():
            refusal = await raw.talk(raw.open(), *frames(served))
            assert refusal.code == code, case
        assert (await raw.talk(raw.open(max_positions=513))).code == "position_refused"
        for number in range(6):
            async with await connection.session() as session:
                job = Job(served.prompt(300 + number, 20), max_tokens=300, until=3 + number)
                answer = await job.run(session)
                assert answer.finish is stip.FinishReason.CANCELLED
                served.require_plain(job, answer)
        for number in range(4):
            async with await connection.session(max_positions=16) as session:
                job = Job(served.prompt(310 + number, 10), max_tokens=6)
                answer = await Job(job.ids, max_tokens=50).run(session)
                assert answer.finish is stip.FinishReason.LENGTH  # the positions are used up
                served.require_plain(job, answer)
        gone = await connection.session()
        stream = gone.generate(served.prompt(320, 30), max_tokens=400, stop_ids=())
        await anext(stream)
        await gone.close()  # in the middle of an answer
        with pytest.raises(StipError):
            async for _ in stream:
                pass


class Bench:
    """A raw link to one instance, and rows for it."""

    def __init__(self, served: Served, link: RawLink) -> None:
        self.link = link
        self._manifest = served.published.manifest

    def rows(self, count: int, *, value: float | None = None) -> bytes:
        """Random rows, or rows of one value."""
        shape = (count, self._manifest.width)
        drawn = np.random.default_rng(count).normal(size=shape) if value is None else np.full(shape, value)
        return drawn.astype("<f4").tobytes()

    @property
    def row_bytes(self) -> int:
        return self._manifest.width * ITEM_BYTES[self._manifest.dtype]

    async def closing(self, session: bytes) -> str:
        """The code that a session is closed with, past outputs of others."""
        while True:
            down = await self.link.read()
            if down.HasField("closed"):
                assert down.closed.session == session
                return down.closed.code

    async def output(self, session: bytes, position: int) -> None:
        """The next message must be this session's output."""
        down = await self.link.read()
        assert [(part.session, part.position) for part in down.fed.slices] == [(session, position)]


async def nan_rows(bench: Bench, other: Bench) -> None:
    """NaN and infinities close the session they are for; the neighbour in the same frame is answered."""
    for value in (float("nan"), float("inf")):
        good, bad = await bench.link.open(), await bench.link.open()
        await bench.link.feed((good, 0, 2), (bad, 0, 1), rows=bench.rows(2) + bench.rows(1, value=value))
        answers = [await bench.link.read(), await bench.link.read()]
        closed = next(each.closed for each in answers if each.HasField("closed"))
        fed = next(each.fed for each in answers if each.HasField("fed"))
        assert (closed.session, closed.code) == (bad, "tensor_invalid")
        assert [(part.session, part.position) for part in fed.slices] == [(good, 1)]


async def wrong_positions(bench: Bench, other: Bench) -> None:
    """A gap, a repetition and a recall of something else close their sessions."""
    for position in (1, 7, 2**32 - 1):
        session = await bench.link.open()
        await bench.link.feed((session, position, 1), rows=bench.rows(1))
        assert await bench.closing(session) == "position_refused"
    session = await bench.link.open()
    await bench.link.feed((session, 0, 3), rows=bench.rows(3))
    await bench.output(session, 2)
    await bench.link.feed((session, 2, 1), rows=bench.rows(1))
    assert await bench.closing(session) == "position_refused"


async def overruns(bench: Bench, other: Bench) -> None:
    """Rows beyond the positions a session opened with, and rows while an answer is due."""
    session = await bench.link.open(max_positions=4)
    await bench.link.feed((session, 0, 5), rows=bench.rows(5))
    assert await bench.closing(session) == "position_refused"
    session = await bench.link.open()
    for _ in range(2):
        await bench.link.feed((session, 0, 1), rows=bench.rows(1))
    assert await bench.closing(session) in ("position_refused", "frame_invalid")


async def foreign_sessions(bench: Bench, other: Bench) -> None:
    """Another link's handle is unknown here, and its owner notices nothing."""
    theirs = await other.link.open()
    await bench.link.feed((theirs, 0, 1), rows=bench.rows(1))
    assert await bench.closing(theirs) == "session_unknown"
    for up in (
        model_pb2.Up(recall=model_pb2.Recall(session=theirs, position=0)),
        model_pb2.Up(close=model_pb2.Close(session=theirs)),
    ):
        await bench.link.send(up)
    await other.link.feed((theirs, 0, 2), rows=other.rows(2))
    await other.output(theirs, 1)
    # Opening under a handle of theirs makes a session of one's own, not theirs.
    await bench.link.open(theirs)
    await other.link.feed((theirs, 2, 1), rows=other.rows(1))
    await other.output(theirs, 2)


async def foreign_leases(bench: Bench, other: Bench) -> None:
    """A lease made out to another link's key opens nothing."""
    for lease, code in (
        (other.link.bundle.lease, "lease_foreign"),
        (b"", "lease_malformed"),
        (b"\xff" * 99, "lease_malformed"),
    ):
        with pytest.raises(StipError) as refused:
            await bench.link.open(lease=lease)
        assert refused.value.code == code


async def spent_leases(bench: Bench, other: Bench) -> None:
    """More rows than the lease admits."""
    session = await bench.link.open()
    at, count = 0, 48
    with contextlib.suppress(StopAsyncIteration):
        while True:
            await bench.link.feed((session, at, count), rows=bench.rows(count))
            down = await bench.link.read()
            if down.HasField("closed"):
                assert down.closed.code == "lease_spent"
                return
            at += count


PER_SESSION = (nan_rows, wrong_positions, overruns, foreign_sessions, foreign_leases, spent_leases)


def oversize(bench: Bench, session: bytes, *, beyond: int) -> model_pb2.Up:
    count = beyond // bench.row_bytes + 1
    return feed((session, 0, count), rows=bytes(count * bench.row_bytes))


def feed(*slices: tuple[bytes, int, int], rows: bytes) -> model_pb2.Up:
    parts = [model_pb2.Slice(session=s, position=at, count=count, outputs=1) for s, at, count in slices]
    return model_pb2.Up(feed=model_pb2.Feed(slices=parts, rows=rows))


MALFORMED: dict[str, tuple[Callable[[Bench, bytes], model_pb2.Up], set[str]]] = {
    "rows that are missing": (lambda b, s: feed((s, 0, 2), rows=b.rows(1)), {"tensor_invalid"}),
    "rows of half a width": (lambda b, s: feed((s, 0, 1), rows=b.rows(1)[: b.row_bytes // 2]), {"tensor_invalid"}),
    "a count that no frame holds": (lambda b, s: feed((s, 0, 2**32 - 1), rows=b.rows(1)), {"frame_invalid"}),
    "no slices": (lambda b, s: feed(rows=b""), {"frame_invalid"}),
    "too many slices": (lambda b, s: feed(*[(s, 0, 1)] * 600, rows=b.rows(600)), {"frame_invalid"}),
    "more rows than a frame may carry": (lambda b, s: oversize(b, s, beyond=FRAME_LIMIT), {"frame_invalid"}),
    # gRPC's own limit comes before ours, and has no code.
    "a message beyond every limit": (lambda b, s: oversize(b, s, beyond=4 * MESSAGE_BYTES), {"unavailable"}),
    "a handle of another length": (lambda b, s: model_pb2.Up(open=model_pb2.Open(session=b"short")), {"frame_invalid"}),
    "an empty message": (lambda b, s: model_pb2.Up(), {"frame_invalid"}),
}


async def test_an_enclave_that_breaks_the_links_rules_leaves_other_enclaves_exact(
    answers: System, served: Served
) -> None:
    stack = answers.stack
    key = keys.load(Profile.load(served.profile).user_key)
    async with honest_sessions(served, seed=400):
        for misbehave in PER_SESSION:
            bad, other = RawEnclave(stack, served.published), RawEnclave(stack, served.published)
            async with bad.link(key) as link, other.link(key) as second:
                await misbehave(Bench(served, link), Bench(served, second))
        for case, (frame, codes) in MALFORMED.items():
            async with RawEnclave(stack, served.published).link(key, rows=8000) as link:
                session = await link.open()
                await link.send(frame(Bench(served, link), session))
                with pytest.raises(StipError) as refused:
                    await link.read()
                assert refused.value.code in codes, case
