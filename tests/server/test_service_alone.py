"""The service where the engine decodes alone, where a slice has several outputs, and what a refusal says."""

from __future__ import annotations

import asyncio
import math
import os
from typing import Any

import numpy as np
import pytest

from stip_protocol.errors import Overloaded, RequestInvalid
from stip_protocol.fields import STOP_IDS
from stip_protocol.rpc import from_rpc
from stip_protocol.tensor import FRAME_LIMIT
from stip_protocol.wire import model_pb2 as wire
from stip_server.engine import Card, Form, Hidden, Ids, Output
from stip_server.messages import card_message, closed, fed_frames, form_of, generation_of

PROMPT = [5, 17, 3, 42, 8]
CARD = Card("0" * 32, 0, b"", "throughput", "float32", 48, 211, 96, 16, (Form.IDS,), max_outputs=8)


def handle() -> bytes:
    return os.urandom(16)


async def opened(enclave: Any, **changes: Any) -> bytes:
    session = handle()
    await enclave.open(session, **changes)
    assert isinstance(await enclave.next(session), wire.Opened)
    return session


async def test_sixteen_sessions_decode_alone_and_share_the_frames_of_their_steps(plain: Any, run_service: Any) -> None:
    prompts = [plain.prompt(1 + 3 * i, seed=i) for i in range(16)]
    async with run_service(plain, form=Form.IDS, prefill_chunk=8) as service:
        enclave = await service.link()
        sessions = [await opened(enclave) for _ in prompts]
        for session, prompt in zip(sessions, prompts, strict=True):
            await enclave.feed_ids(session, 0, prompt)
            await enclave.send(generate=wire.Generate(session=session, position=len(prompt), max_ids=24))
        answers = await asyncio.gather(
            *(enclave.decoded(session, len(prompt)) for session, prompt in zip(sessions, prompts, strict=True))
        )
        assert answers == [plain.greedy(prompt, 24) for prompt in prompts]
        # Fewer steps than ids: so sessions were stepped together.
        assert service.metric("stip_step_sessions_count") < 16 * 24
        assert service.metric("stip_rows_total") == sum(map(len, prompts))


async def test_a_stop_a_halt_and_ids_taken_back_travel(llama: Any, run_service: Any) -> None:
    truth = llama.greedy(PROMPT, 12)
    end = truth.index(truth[4])
    async with run_service(llama, form=Form.IDS) as service:
        enclave = await service.link()
        session = await opened(enclave)
        await enclave.send(halt=wire.Halt(session=session))  # none runs: nothing follows
        await enclave.feed_ids(session, 0, PROMPT)
        stop = np.array([truth[4]], "<u4").tobytes()
        await enclave.send(generate=wire.Generate(session=session, position=5, max_ids=40, stop_ids=stop))
        assert await enclave.decoded(session, 5) == truth[:end]
        await enclave.send(generate=wire.Generate(session=session, position=5 + end, max_ids=60))
        await enclave.send(halt=wire.Halt(session=session))
        more = await enclave.decoded(session, 5 + end)
        assert more == llama.greedy(PROMPT, 70)[end : end + len(more)]
        length = 5 + end + len(more)
        await enclave.feed_ids(session, length - len(more), [9], back=len(more))
        await enclave.send(generate=wire.Generate(session=session, position=length - len(more) + 1, max_ids=3))
        assert await enclave.decoded(session, length - len(more) + 1) == llama.greedy([*PROMPT, *truth[:end], 9], 3)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"position": 4}, "position_refused"),
        ({"max_ids": 0}, "position_refused"),
        ({"max_ids": 92}, "position_refused"),
        ({"temperature": math.nan}, "request_invalid"),
        ({"stop_ids": b"abc"}, "request_invalid"),
    ],
)
async def test_a_generation_that_cannot_be_is_closed_by_code(
    llama: Any, run_service: Any, changes: dict[str, Any], code: str
) -> None:
    async with run_service(llama, form=Form.IDS) as service:
        enclave = await service.link()
        session = await opened(enclave)
        await enclave.feed_ids(session, 0, PROMPT)
        fields = {"position": 5, "max_ids": 4, **changes}
        await enclave.send(generate=wire.Generate(session=session, **fields))
        assert (await enclave.next(session)).code == code


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"stop_ids": (211).to_bytes(4, "little")},
        {"stop_ids": bytes(4 * (STOP_IDS + 1))},
    ],
)
def test_a_generation_is_checked_before_the_engine_sees_it(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid, match="allowed:"):
        generation_of(wire.Generate(session=handle(), position=5, max_ids=4, **changes), CARD)


async def test_messages_about_sessions_of_nobody_are_refused(llama: Any, run_service: Any) -> None:
    async with run_service(llama, form=Form.IDS) as service:
        enclave = await service.link()
        for body in ({"halt": wire.Halt(session=(one := handle()))}, {"generate": wire.Generate(session=one)}):
            await enclave.send(**body)
        assert (await enclave.next(one)).code == "session_unknown"
        await enclave.send(halt=wire.Halt(session=b"short"))
        assert from_rpc(await enclave.ended()).code == "frame_invalid"


async def test_rows_to_a_session_of_ids_and_ids_to_one_of_rows_end_it_alone(llama: Any, run_service: Any) -> None:
    async with run_service(llama, form=Form.IDS) as service:
        enclave = await service.link()
        wrong, right = await opened(enclave), await opened(enclave)
        await enclave.feed(wrong, 0, PROMPT)
        assert (await enclave.next(wrong)).code == "frame_invalid"
        await enclave.feed_ids(right, 0, PROMPT)
        await enclave.send(generate=wire.Generate(session=right, position=5, max_ids=2))
        assert await enclave.decoded(right, 5) == llama.greedy(PROMPT, 2)
    async with run_service(llama) as service:
        enclave = await service.link()
        session = await opened(enclave)
        await enclave.feed_ids(session, 0, PROMPT)
        assert (await enclave.next(session)).code == "frame_invalid"


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (wire.Feed(slices=[wire.Slice(session=b"s" * 16, count=1)], ids=bytes(4), rows=bytes(192)), "frame_invalid"),
        (wire.Feed(slices=[wire.Slice(session=b"s" * 16, count=2)], ids=bytes(7)), "tensor_invalid"),
        (wire.Feed(slices=[wire.Slice(session=b"s" * 16, count=(1 << 18) + 1)], ids=bytes(8)), "frame_invalid"),
    ],
)
async def test_a_malformed_frame_of_ids_ends_its_link(
    llama: Any, run_service: Any, frame: wire.Feed, code: str
) -> None:
    async with run_service(llama, form=Form.IDS) as service:
        enclave = await service.link()
        await enclave.open(b"s" * 16)
        await enclave.next(b"s" * 16)
        await enclave.send(feed=frame)
        assert from_rpc(await enclave.ended()).code == code


@pytest.mark.parametrize("form", [Form.HIDDEN, Form.TOP])
async def test_drafts_of_several_sessions_come_back_in_one_frame(llama: Any, run_service: Any, form: Form) -> None:
    async with run_service(llama, form=form) as service:
        enclave = await service.link()
        sessions = [await opened(enclave) for _ in range(3)]
        counts = [1, 3, 2]
        pieces = [wire.Slice(session=s, position=0, count=c, outputs=c) for s, c in zip(sessions, counts, strict=True)]
        ids = [[i + 10 * n for i in range(c)] for n, c in enumerate(counts)]
        await enclave.send(feed=wire.Feed(slices=pieces, rows=llama.rows(one for each in ids for one in each)))
        for session, drafted in zip(sessions, ids, strict=True):
            position, out, fed = await enclave.next(session)
            assert position == 0
            assert llama.picks(out) == [llama.greedy(drafted[: n + 1], 1)[0] for n in range(len(drafted))]
            assert sum(piece.count for piece in fed.slices) == 6
        # Of the second, two were wrong: they are taken back, and what follows knows nothing of them.
        piece = wire.Slice(session=sessions[1], position=1, count=1, outputs=1, back=2)
        await enclave.send(feed=wire.Feed(slices=[piece], rows=llama.rows([77])))
        position, out, _ = await enclave.next(sessions[1])
        assert (position, llama.picks(out)) == (1, llama.greedy([ids[1][0], 77], 1))


async def test_an_overload_says_when_to_try_again(llama: Any, run_service: Any) -> None:
    async with run_service(llama, slots=1) as service:
        enclave = await service.link()
        await opened(enclave, account=b"a" * 16)
        refused = handle()
        await enclave.open(refused, account=b"b" * 16)
        message = await enclave.next(refused)
        assert message.code == "overloaded"
        assert 100 <= message.retry_after_ms <= 30_000


async def test_the_account_that_held_everything_waits_while_another_asks(llama: Any, run_service: Any) -> None:
    async with run_service(llama, slots=2) as service:
        enclave = await service.link()
        greedy = [await opened(enclave, account=b"a" * 16) for _ in range(2)]
        for account, code in ((b"b", "overloaded"), (b"a", "overloaded")):
            refused = handle()
            await enclave.open(refused, account=account * 16)
            assert (await enclave.next(refused)).code == code
        await enclave.send(close=wire.Close(session=greedy[0]))
        refused = handle()
        await enclave.open(refused, account=b"a" * 16)
        assert (await enclave.next(refused)).code == "overloaded"
        await opened(enclave, account=b"b" * 16)


def test_an_account_has_one_size() -> None:
    for account in (b"", b"a" * 16):
        assert form_of(wire.Open(output=wire.OUTPUT_IDS, account=account)) is Form.IDS
    with pytest.raises(RequestInvalid, match="account: got 15 bytes"):
        form_of(wire.Open(output=wire.OUTPUT_IDS, account=b"a" * 15))


def test_the_card_says_how_many_outputs_a_slice_may_have() -> None:
    message = card_message(CARD, "replica")
    assert (message.max_outputs, list(message.outputs)) == (8, [wire.OUTPUT_IDS])


def test_a_frame_holds_one_form_and_no_more_than_fits() -> None:
    row = bytes(FRAME_LIMIT // 4)
    outputs = [Output((1, handle()), 0, Hidden(row)) for _ in range(9)]
    ids = [Ids((1, handle()), 7, bytes(4 * n), done=n == 0) for n in range(3)]
    frames = [down.fed for down in fed_frames([*outputs, *ids])]
    assert [len(fed.slices) for fed in frames] == [4, 4, 1, 3]
    assert [fed.WhichOneof("out") for fed in frames] == ["hidden", "hidden", "hidden", "ids"]
    assert [(piece.count, piece.done) for piece in frames[-1].slices] == [(0, True), (1, False), (2, False)]


def test_the_end_of_a_session_says_when_to_try_again_only_where_it_is_known() -> None:
    assert closed(handle(), Overloaded("full", retry_after=1.25)).closed.retry_after_ms == 1250
    assert closed(handle(), Overloaded("full")).closed.retry_after_ms == 0
