"""The gRPC service over real sockets with mutual TLS."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
import torch

from stip_protocol.rpc import from_rpc
from stip_protocol.wire import model_pb2 as wire
from stip_server.engine import Form

ROW = 48 * 4


def handle() -> bytes:
    return os.urandom(16)


def feed(*pieces: tuple[bytes, int, int], rows: bytes) -> wire.Feed:
    return wire.Feed(slices=[wire.Slice(session=s, position=p, count=c, outputs=1) for s, p, c in pieces], rows=rows)


@pytest.mark.parametrize("form", [Form.HIDDEN, Form.TOP])
async def test_sixteen_sessions_on_two_links_give_the_plain_models_tokens(
    plain: Any, run_service: Any, form: Form
) -> None:
    jobs = [(plain.prompt(1 + 3 * i, seed=i), 5 + i) for i in range(16)]
    async with run_service(plain, form=form, prefill_chunk=8) as service:
        links = [await service.link(), await service.link()]
        answers = await asyncio.gather(*(links[i % 2].generate(*job) for i, job in enumerate(jobs)))
        assert answers == [plain.greedy(*job) for job in jobs]
        assert service.metric("stip_rows_total") == sum(len(prompt) + count - 1 for prompt, count in jobs)
        assert service.metric("stip_links") == 2
        assert service.metric("stip_step_sessions_sum") == service.metric(
            "stip_stage_seconds_count", stage="queue"
        ) or (service.metric("stip_step_sessions_sum") > 0)
        assert service.metric("stip_stage_seconds_count", stage="compute") == service.metric("stip_step_sessions_count")
        assert service.metric("stip_stage_seconds_count", stage="queue") == sum(count for _, count in jobs)


async def test_one_frame_carries_the_rows_and_the_replies_of_many_sessions(llama: Any, run_service: Any) -> None:
    async with run_service(llama) as service:
        enclave = await service.link()
        handles = [handle() for _ in range(4)]
        for each in handles:
            await enclave.open(each)
        frame = feed(*((each, 0, 1) for each in handles), rows=llama.rows([5, 6, 7, 8]))
        await enclave.send(feed=frame)
        replies = []
        for each in handles:
            assert isinstance(await enclave.next(each), wire.Opened)
            replies.append(await enclave.next(each))
        assert [llama.pick(out) for _, out, _ in replies] == [llama.greedy([i], 1)[0] for i in (5, 6, 7, 8)]
        assert {len(fed.slices) for _, _, fed in replies} == {4}
        assert all(fed.compute_us > 0 for _, _, fed in replies)
        assert enclave.load == 4


async def test_the_card_says_what_is_served_and_another_instance_is_refused(llama: Any, run_service: Any) -> None:
    async with run_service(llama, form=Form.TOP, slots=3) as service:
        stub = service.stub()
        card = await stub.Describe(service.reference())
        assert (card.version, card.dtype, card.width, card.vocabulary) == (1, "float32", 48, 211)
        assert (card.max_positions, card.max_sessions, list(card.replicas)) == (96, 3, ["replica-1"])
        assert list(card.outputs) == [wire.OUTPUT_TOP]
        assert card.max_rows == (1 << 20) // ROW
        for instance, epoch in (("1" * 32, 0), (card.instance, 1)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Describe(wire.InstanceRef(instance=instance, epoch=epoch))
            assert from_rpc(refused.value).code == "instance_refused"


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ({"stip-instance": "1" * 32}, "instance_refused"),
        ({"stip-epoch": "1"}, "instance_refused"),
        ({"stip-epoch": "-1"}, "frame_invalid"),
        ({"stip-epoch": "9" * 5000}, "frame_invalid"),
        ({"stip-replica": "replica-2"}, "replica_lost"),
    ],
)
async def test_a_link_to_another_instance_epoch_or_replica_is_refused(
    llama: Any, run_service: Any, metadata: dict[str, str], code: str
) -> None:
    async with run_service(llama) as service:
        enclave = await service.link(**metadata)
        assert from_rpc(await enclave.ended()).code == code
        assert service.metric("stip_refusals_total", code=code) == 1
        assert service.metric("stip_links") == 0


async def test_a_peer_without_a_certificate_of_the_operator_gets_nothing(llama: Any, run_service: Any) -> None:
    async with run_service(llama) as service:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.stub(identity=False).Describe(service.reference(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


BAD_FRAMES = {
    "a byte short": (feed((b"s" * 16, 0, 2), rows=bytes(2 * ROW - 1)), "tensor_invalid"),
    "another width": (feed((b"s" * 16, 0, 1), rows=bytes(2 * ROW)), "tensor_invalid"),
    "no slices": (feed(rows=b""), "frame_invalid"),
    "rows without slices": (feed(rows=bytes(ROW)), "frame_invalid"),
    "a slice of no rows": (feed((b"s" * 16, 0, 0), rows=b""), "frame_invalid"),
    "a short handle": (feed((b"s" * 15, 0, 1), rows=bytes(ROW)), "frame_invalid"),
    "counts beyond the limit": (feed((b"s" * 16, 0, 2**32 - 1), rows=bytes(ROW)), "frame_invalid"),
    "counts that wrap around": (
        feed((b"s" * 16, 0, 2**32 - 1), (b"s" * 16, 0, 2), rows=bytes(ROW)),
        "frame_invalid",
    ),
    "too many slices": (feed(*(((b"s" * 16), 0, 1) for _ in range(6000)), rows=b""), "frame_invalid"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_a_malformed_frame_ends_its_link_and_no_other(llama: Any, run_service: Any, name: str) -> None:
    frame, code = BAD_FRAMES[name]
    async with run_service(llama) as service:
        good, bad = await service.link(), await service.link()
        neighbour = asyncio.create_task(good.generate([1, 2, 3], 15))
        await bad.open(b"s" * 16)
        await bad.next(b"s" * 16)
        await bad.send(feed=frame)
        assert from_rpc(await bad.ended()).code == code
        assert await neighbour == llama.greedy([1, 2, 3], 15)
        assert service.metric("stip_links") == 1
        await service.quiet()


async def test_a_message_beyond_the_size_limit_never_reaches_the_engine(llama: Any, run_service: Any) -> None:
    async with run_service(llama) as service:
        metadata = (("stip-instance", service.card.instance), ("stip-epoch", "0"))
        call = service.unlimited_stub().Link(metadata=metadata)
        await call.write(wire.Up(feed=feed((handle(), 0, 8000), rows=bytes(8000 * ROW))))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert service.metric("stip_rows_total") == 0


async def test_an_empty_message_is_refused(llama: Any, run_service: Any) -> None:
    async with run_service(llama) as service:
        enclave = await service.link()
        await enclave.call.write(wire.Up())
        assert from_rpc(await enclave.ended()).code == "frame_invalid"


async def test_a_bad_slice_closes_its_session_and_spares_the_others_of_the_frame(llama: Any, run_service: Any) -> None:
    async with run_service(llama) as service:
        enclave = await service.link()
        good, gap, nan, unknown = (handle() for _ in range(4))
        for each in (good, gap, nan):
            await enclave.open(each)
            assert isinstance(await enclave.next(each), wire.Opened)
        rows = [llama.rows([4]), llama.rows([4]), torch.full((1, 48), float("nan")).numpy().tobytes(), llama.rows([4])]
        frame = feed((good, 0, 1), (gap, 7, 1), (nan, 0, 1), (unknown, 0, 1), rows=b"".join(rows))
        await enclave.send(feed=frame)
        _, out, _ = await enclave.next(good)
        assert llama.pick(out) == llama.greedy([4], 1)[0]
        codes = [(await enclave.next(each)).code for each in (gap, nan, unknown)]
        assert codes == ["position_refused", "tensor_invalid", "session_unknown"]
        # Rows that were on the way when their session ended are passed over: nothing more comes for it.
        await enclave.send(feed=feed((gap, 0, 1), (good, 1, 1), rows=llama.rows([4, 9])))
        _, out, _ = await enclave.next(good)
        assert llama.pick(out) == int(llama.logits([4, 9]).argmax())
        assert enclave.box(gap).empty()
        for code in set(codes):
            assert service.metric("stip_refusals_total", code=code) == 1


async def test_a_session_of_another_link_is_unknown_and_stays_untouched(llama: Any, run_service: Any) -> None:
    async with run_service(llama) as service:
        owner, thief = await service.link(), await service.link()
        session = handle()
        await owner.open(session)
        await owner.feed(session, 0, [1, 2, 3])
        assert isinstance(await owner.next(session), wire.Opened)
        _, out, _ = await owner.next(session)
        await thief.feed(session, 3, [9])
        assert (await thief.next(session)).code == "session_unknown"
        await thief.send(recall=wire.Recall(session=session, position=2))
        await thief.send(close=wire.Close(session=session))
        picked = llama.pick(out)
        await owner.feed(session, 3, [picked])
        _, out, _ = await owner.next(session)
        assert [picked, llama.pick(out)] == llama.greedy([1, 2, 3], 2)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"max_positions": 0}, "position_refused"),
        ({"max_positions": 97}, "position_refused"),
        ({"output": wire.OUTPUT_TOP}, "request_invalid"),
        ({"output": wire.OUTPUT_IDS}, "request_invalid"),
        ({"output": wire.OUTPUT_UNSPECIFIED}, "request_invalid"),
        ({"space": wire.SPACE_VISION}, "request_invalid"),
        ({"mode": wire.MODE_EMBED}, "request_invalid"),
        ({"request_id": "a\nforged log line"}, "request_invalid"),
    ],
)
async def test_an_open_that_asks_for_what_is_not_served_is_closed(
    llama: Any, run_service: Any, changes: dict[str, Any], code: str
) -> None:
    async with run_service(llama) as service:
        enclave = await service.link()
        session = handle()
        await enclave.open(session, **changes)
        await enclave.feed(session, 0, [1])
        closed = await enclave.next(session)
        assert (closed.code, "allowed:" in closed.message) == (code, True)
        assert await enclave.generate([1], 2) == llama.greedy([1], 2)
        assert enclave.box(session).empty()


async def test_an_open_handle_cannot_be_opened_again(llama: Any, run_service: Any) -> None:
    async with run_service(llama) as service:
        enclave = await service.link()
        session = handle()
        await enclave.open(session)
        await enclave.open(session)
        assert isinstance(await enclave.next(session), wire.Opened)
        assert (await enclave.next(session)).code == "request_invalid"
        assert service.service.sessions == 0


async def test_more_sessions_than_slots_are_overloaded_until_one_closes(llama: Any, run_service: Any) -> None:
    async with run_service(llama, slots=2) as service:
        enclave = await service.link()
        first, second, third = handle(), handle(), handle()
        for each in (first, second, third):
            await enclave.open(each)
        assert (await enclave.next(third)).code == "overloaded"
        for _ in range(2):
            await enclave.send(close=wire.Close(session=first))
        await enclave.send(close=wire.Close(session=handle()))
        assert await enclave.generate([1, 2], 4) == llama.greedy([1, 2], 4)


async def test_an_idle_session_is_closed_by_code(llama: Any, run_service: Any) -> None:
    async with run_service(llama, idle_seconds=0.1) as service:
        enclave = await service.link()
        session = handle()
        await enclave.open(session)
        assert isinstance(await enclave.next(session), wire.Opened)
        assert (await enclave.next(session)).code == "deadline_exceeded"
        assert service.metric("stip_sessions") == 0


@pytest.mark.parametrize("half_close", [True, False])
async def test_the_end_of_a_link_frees_its_sessions(llama: Any, run_service: Any, half_close: bool) -> None:
    async with run_service(llama, slots=1) as service:
        leaver, stayer = await service.link(), await service.link()
        session = handle()
        await leaver.open(session)
        await leaver.next(session)
        await leaver.feed(session, 0, llama.prompt(80, seed=1))
        if half_close:
            await leaver.call.done_writing()
            await leaver._reader
        else:
            await leaver.leave()
        await service.quiet()
        assert await stayer.generate([1, 2], 4) == llama.greedy([1, 2], 4)


async def test_a_recall_brings_the_full_row_behind_the_top(llama: Any, run_service: Any) -> None:
    async with run_service(llama, form=Form.TOP) as service:
        enclave = await service.link()
        session = handle()
        await enclave.open(session)
        await enclave.feed(session, 0, [1, 2, 3])
        assert isinstance(await enclave.next(session), wire.Opened)
        position, top, _ = await enclave.next(session)
        await enclave.send(recall=wire.Recall(session=session, position=position))
        at, logits, _ = await enclave.next(session)
        row = torch.frombuffer(bytearray(logits.rows), dtype=torch.float32)
        torch.testing.assert_close(row, llama.logits([1, 2, 3]), rtol=1e-4, atol=1e-4)
        assert at == position
        assert int(row.argmax()) == llama.pick(top)
        await enclave.send(recall=wire.Recall(session=session, position=position + 1))
        assert (await enclave.next(session)).code == "position_refused"


async def test_a_draining_server_finishes_what_runs_and_takes_nothing_new(llama: Any, run_service: Any) -> None:
    async with run_service(llama) as service:
        enclave = await service.link()
        session = handle()
        await enclave.open(session)
        await enclave.feed(session, 0, [1, 2, 3])
        assert isinstance(await enclave.next(session), wire.Opened)
        draining = asyncio.create_task(service.service.drain())
        await enclave.drained.wait()
        late = handle()
        await enclave.open(late)
        assert (await enclave.next(late)).code == "draining"
        other = await service.link()
        assert from_rpc(await other.ended()).code == "draining"
        _, out, _ = await enclave.next(session)
        ids = [llama.pick(out)]
        await enclave.feed(session, 3, ids)
        _, out, _ = await enclave.next(session)
        ids.append(llama.pick(out))
        assert ids == llama.greedy([1, 2, 3], 2)
        assert not draining.done()
        await enclave.send(close=wire.Close(session=session))
        await draining
        await enclave._reader


async def test_logs_name_the_request_and_never_the_handle_or_a_value(llama: Any, run_service: Any) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        async with run_service(llama) as service:
            enclave = await service.link()
            session, request = handle(), "ab" * 16
            await enclave.open(session, request_id=request)
            await enclave.feed(session, 5, [1, 2, 3])
            await enclave.next(session)
            assert (await enclave.next(session)).code == "position_refused"
    assert [(entry["event"], entry["request_id"]) for entry in logs] == [
        ("session opened", request),
        ("session ended", request),
    ]
    assert session.hex() not in str(logs)
    assert str(session) not in str(logs)
