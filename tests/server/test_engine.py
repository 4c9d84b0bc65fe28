"""The transformers engine, called directly."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
import torch

from stip_protocol.errors import (
    CheckpointInvalid,
    DeadlineExceeded,
    FrameInvalid,
    Overloaded,
    PositionRefused,
    RequestInvalid,
    TensorInvalid,
)
from stip_server.config import TransformersSettings
from stip_server.engine import Form, Logits, Top
from stip_server.engines.transformers import TransformersEngine, card_for, split


def tensor(data: bytes, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


@pytest.mark.parametrize("form", [Form.HIDDEN, Form.TOP])
async def test_sixteen_ragged_sessions_that_join_and_leave_give_the_plain_models_tokens(
    plain: Any, run_direct: Any, form: Form
) -> None:
    jobs = [(plain.prompt(1 + 5 * i % 61, seed=i), 3 + 7 * i % 29) for i in range(24)]
    gate = asyncio.Semaphore(16)

    async def one(direct: Any, name: int) -> list[int]:
        async with gate:
            return await direct.generate(name, *jobs[name], form, frame=13)

    async with run_direct(plain, prefill_chunk=8) as direct:
        answers = await asyncio.gather(*(one(direct, i) for i in range(len(jobs))))
        assert max(step.sessions for step in direct.steps) > 1
    assert answers == [plain.greedy(*job) for job in jobs]


async def test_neighbours_that_cancel_send_nan_overrun_or_overflow_change_nothing(plain: Any, run_direct: Any) -> None:
    jobs = [(plain.prompt(9 + 4 * i, seed=i), 24) for i in range(5)]
    nan = torch.full((3, 48), float("nan")).numpy().tobytes()
    huge = torch.full((3, 48), 1e38).numpy().tobytes()

    async def nuisance(direct: Any, name: int) -> str:
        session = direct.open(name, positions=20)
        direct.feed(session, plain.prompt(5, seed=name))
        await direct.next(session)
        match name % 4:
            case 0:
                direct.feed(session, plain.prompt(8, seed=name))
                direct.engine.close(session)
                return "cancelled"
            case 1:
                direct.raw(session, nan, 3)
            case 2:
                direct.feed(session, plain.prompt(16, seed=name))
            case 3:
                # GPT-2 overflows on these and is ended; Llama's first norm takes them to zero and answers.
                direct.raw(session, huge, 3)
                with contextlib.suppress(TensorInvalid):
                    await direct.next(session)
                direct.engine.close(session)
                return "overflowed"
        with pytest.raises(RequestInvalid) as refused:
            await direct.next(session)
        return refused.value.code

    async def nuisances(direct: Any, first: int) -> list[str]:
        return [await nuisance(direct, 100 * first + i) for i in range(8)]

    async with run_direct(plain, prefill_chunk=4) as direct:
        *answers, one, two = await asyncio.gather(
            *(direct.generate(i, *job) for i, job in enumerate(jobs)), nuisances(direct, 1), nuisances(direct, 2)
        )
    assert answers == [plain.greedy(*job) for job in jobs]
    assert one == two == ["cancelled", "tensor_invalid", "position_refused", "overflowed"] * 2


async def test_a_slot_left_by_an_overflow_is_clean_for_the_next_session(make_plain: Any, run_direct: Any) -> None:
    plain = make_plain("gpt2")
    prompt = plain.prompt(6, seed=1)
    async with run_direct(plain, slots=2) as direct:
        for name in range(4):
            session = direct.open(name)
            rows = torch.full((40, 48), 3e38).numpy().tobytes()
            direct.raw(session, rows, 40)
            with pytest.raises(TensorInvalid, match="hidden state"):
                await direct.next(session)
        together = await asyncio.gather(*(direct.generate(10 + i, prompt, 8) for i in range(2)))
    assert together == [plain.greedy(prompt, 8)] * 2


@pytest.mark.parametrize("chunk", [1, 5, 64])
async def test_a_prompt_in_chunks_and_frames_gives_the_hidden_state_of_one_pass(
    make_plain: Any, run_direct: Any, chunk: int
) -> None:
    for family in ("gpt2", "llama"):
        plain = make_plain(family, torch.float64)
        ids = plain.prompt(47, seed=3)
        async with run_direct(plain, prefill_chunk=chunk) as direct:
            for name, frame in enumerate((47, 10, 1)):
                session = direct.open(name)
                for start in range(0, 47, frame):
                    direct.feed(session, ids[start : start + frame], last=start + frame >= 47)
                output = await direct.next(session)
                assert output.position == 46
                hidden = tensor(output.out.rows, torch.float64)
                torch.testing.assert_close(hidden, plain.hidden(ids), rtol=0, atol=1e-10)


async def test_a_prompt_does_not_stall_a_running_session(llama: Any, run_direct: Any) -> None:
    async with run_direct(llama, prefill_chunk=4) as direct:
        running = direct.open(1)
        direct.feed(running, llama.prompt(1, seed=1))
        ids = [llama.pick((await direct.next(running)).out)]
        slow = direct.open(2)
        direct.feed(slow, llama.prompt(80, seed=2))
        before = len(direct.steps)
        for _ in range(5):
            direct.feed(running, ids[-1:])
            ids.append(llama.pick((await direct.next(running)).out))
        chunks = sum(step.rows > 1 for step in direct.steps[before:])
        assert chunks <= 6
        await direct.next(slow)
    assert ids == llama.greedy(llama.prompt(1, seed=1), 6)


async def test_the_top_and_the_recalled_row_are_the_plain_logits(plain: Any, run_direct: Any) -> None:
    prompts = [plain.prompt(5 + i, seed=i) for i in range(3)]
    async with run_direct(plain) as direct:
        sessions = [direct.open(i, Form.TOP) for i in range(3)]
        for session, prompt in zip(sessions, prompts, strict=True):
            direct.feed(session, prompt)
        for session, prompt in zip(sessions, prompts, strict=True):
            output = await direct.next(session)
            top = output.out
            assert isinstance(top, Top)
            logits = plain.logits(prompt)
            values, indices = torch.topk(logits, 64)
            assert top.count == 64
            assert tensor(top.indices, torch.uint32).tolist() == indices.tolist()
            torch.testing.assert_close(tensor(top.values), values, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(tensor(top.log_sum_exp)[0], logits.logsumexp(0), rtol=1e-5, atol=1e-4)
            direct.engine.recall(session, output.position)
            recalled = await direct.next(session)
            assert isinstance(recalled.out, Logits)
            assert recalled.position == output.position
            row = tensor(recalled.out.rows)
            torch.testing.assert_close(row, logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(row[indices], tensor(top.values))


async def test_a_recall_ends_the_session_once_something_newer_was_fed_or_without_a_top(
    llama: Any, run_direct: Any
) -> None:
    async with run_direct(llama) as direct:
        stale, hidden, early = direct.open(1, Form.TOP), direct.open(2, Form.HIDDEN), direct.open(3, Form.TOP)
        for session in (stale, hidden):
            direct.feed(session, [1, 2, 3])
            await direct.next(session)
        direct.feed(stale, [4], last=False)
        direct.engine.recall(stale, 2)
        direct.engine.recall(hidden, 2)
        direct.engine.recall(early, 0)
        for session, error in ((stale, PositionRefused), (hidden, RequestInvalid), (early, PositionRefused)):
            with pytest.raises(error):
                await direct.next(session)


async def test_a_recall_without_an_output_or_a_second_one_ends_the_session(llama: Any, run_direct: Any) -> None:
    async with run_direct(llama) as direct:
        silent, eager = direct.open(1, Form.TOP), direct.open(2, Form.TOP)
        direct.feed(silent, [1, 2, 3], last=False)
        direct.feed(eager, [1, 2, 3])
        await direct.next(eager)
        assert sum(step.rows for step in direct.steps) == 6
        direct.engine.recall(silent, 2)
        with pytest.raises(PositionRefused):
            await direct.next(silent)
        direct.engine.recall(eager, 2)
        assert isinstance((await direct.next(eager)).out, Logits)
        direct.engine.recall(eager, 2)
        with pytest.raises(PositionRefused):
            await direct.next(eager)


async def test_a_flood_of_recalls_costs_one_row(llama: Any, run_direct: Any) -> None:
    async with run_direct(llama) as direct:
        session = direct.open(1, Form.TOP)
        direct.feed(session, [1, 2, 3])
        await direct.next(session)
        for _ in range(1000):
            direct.engine.recall(session, 2)
        with pytest.raises(PositionRefused):
            await direct.next(session)
        assert await direct.generate(2, [4, 5], 3) == llama.greedy([4, 5], 3)


async def test_sessions_that_stay_away_hold_one_row_each_and_it_is_the_right_one(llama: Any, run_direct: Any) -> None:
    async with run_direct(llama, slots=8) as direct:
        sessions = [direct.open(name, Form.TOP) for name in range(8)]
        fed: dict[Any, list[int]] = {session: [] for session in sessions}
        for going_on in range(8, 0, -1):  # one less with every step
            for session in sessions[:going_on]:
                fed[session].append(going_on + session[1][-1])
                direct.feed(session, fed[session][-1:])
            for session in sessions[:going_on]:
                await direct.next(session)
        # The last step had one session; those of the step before had two in a batch of two.
        kept = [row for rows in direct.engine._rows.values() for row in rows.values()]
        assert (len(kept), sum(row.batch.shape[0] for row in kept)) == (len(sessions), len(sessions))
        for session in sessions:
            direct.engine.recall(session, len(fed[session]) - 1)
            row = tensor((await direct.next(session)).out.rows)
            torch.testing.assert_close(row, llama.logits(fed[session]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "count", "position", "error"),
    [
        pytest.param(192, 1, 4, PositionRefused, id="a gap"),
        pytest.param(192, 1, 2, PositionRefused, id="a repeated row"),
        pytest.param(192 * 94, 94, 3, PositionRefused, id="more rows than positions"),
        pytest.param(191, 1, 3, TensorInvalid, id="a byte short"),
        pytest.param(384, 1, 3, TensorInvalid, id="another width"),
        pytest.param(0, 0, 3, FrameInvalid, id="no rows"),
    ],
)
async def test_a_bad_slice_ends_its_session_and_no_other(
    llama: Any, run_direct: Any, rows: int, count: int, position: int, error: type[RequestInvalid]
) -> None:
    async with run_direct(llama) as direct:
        neighbour = asyncio.create_task(direct.generate(9, [1, 2, 3], 12))
        session = direct.open(1)
        direct.feed(session, [5, 6, 7])
        await direct.next(session)
        direct.raw(session, bytes(rows), count, position=position)
        with pytest.raises(error) as refused:
            await direct.next(session)
        assert refused.value.field is not None
        assert await neighbour == llama.greedy([1, 2, 3], 12)


async def test_rows_after_an_unanswered_last_end_the_session(llama: Any, run_direct: Any) -> None:
    async with run_direct(llama) as direct:
        session = direct.open(1)
        direct.feed(session, [5, 6, 7])
        direct.feed(session, [8])
        with pytest.raises(PositionRefused, match="owed"):
            await direct.next(session)


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001])
async def test_no_row_that_is_not_finite_enters(llama: Any, run_direct: Any, bits: int) -> None:
    async with run_direct(llama) as direct:
        session = direct.open(1)
        rows = bytearray(192)
        rows[100:104] = bits.to_bytes(4, "little")
        direct.raw(session, bytes(rows), 1)
        with pytest.raises(TensorInvalid, match="finite"):
            await direct.next(session)


async def test_admission_is_bounded_and_a_closed_session_makes_room(llama: Any, run_direct: Any) -> None:
    async with run_direct(llama, slots=2, max_positions=50) as direct:
        first = direct.open(1, positions=50)
        direct.open(2, positions=50)
        with pytest.raises(Overloaded):
            direct.open(3, positions=50)
        direct.engine.close(first)
        direct.engine.close(first)
        with pytest.raises(RequestInvalid, match="open"):
            direct.open(2, positions=50)
        for positions in (0, 51):
            with pytest.raises(PositionRefused):
                direct.open(3, positions=positions)
        direct.open(3, positions=50)


async def test_a_form_that_the_card_does_not_offer_is_refused(llama: Any) -> None:
    base, _ = split(llama.model)
    settings = TransformersSettings()
    card = card_for(base, None, settings)
    assert card.forms == (Form.HIDDEN,)
    assert card.vocabulary == 0
    engine = TransformersEngine(base, None, card, settings)
    with pytest.raises(RequestInvalid, match="output"):
        engine.open((1, b"x"), max_positions=1, output=Form.TOP)
    await engine.stop()


async def test_closing_while_a_step_runs_frees_the_slot_and_nothing_follows(llama: Any, run_direct: Any) -> None:
    async with run_direct(llama, slots=1, prefill_chunk=2) as direct:
        for name in range(20):
            session = direct.open(name)
            direct.feed(session, llama.prompt(40, seed=name))
            # Every turn of the loop lets the step come to another point before the session goes.
            for _ in range(name):
                await asyncio.sleep(0)
            direct.engine.close(session)
            assert direct._boxes[session].empty()
        assert await direct.generate(99, [3, 1, 4], 10) == llama.greedy([3, 1, 4], 10)


async def test_sessions_that_close_while_a_step_waits_for_others_take_nobody_along(llama: Any, run_direct: Any) -> None:
    async with run_direct(llama, gather_window_ms=20) as direct:
        staying, leaving = direct.open(1), direct.open(2)
        for session in (staying, leaving):
            direct.feed(session, [1, 2, 3])
            ids = [llama.pick((await direct.next(session)).out)]
        waiting = direct.open(3)
        direct.feed(waiting, [5])  # its step waits for the two others
        await asyncio.sleep(0)
        direct.engine.close(waiting)
        direct.engine.close(leaving)
        await asyncio.sleep(0.05)  # the window has passed
        direct.feed(staying, ids)
        ids.append(llama.pick((await direct.next(staying)).out))
        assert ids == llama.greedy([1, 2, 3], 2)


async def test_an_idle_session_is_ended_and_a_busy_one_is_not(llama: Any, run_direct: Any) -> None:
    async with run_direct(llama, idle_seconds=0.3) as direct:
        idle = direct.open(1)
        gone = asyncio.create_task(direct.next(idle))
        busy = direct.open(2)
        ids, position = [1, 2, 3], 0
        while not gone.done():
            direct.raw(busy, llama.rows(ids), len(ids), position=position % 80)
            position = (await direct.next(busy)).position + 1
            ids = [7]
            await asyncio.sleep(0.02)
            if position >= 80:
                direct.engine.close(busy)
                busy, position = direct.open(2), 0
        with pytest.raises(DeadlineExceeded, match="idle"):
            await gone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_half_precision_stays_as_close_to_fp32_as_the_plain_model(
    make_plain: Any, run_direct: Any, dtype: torch.dtype
) -> None:
    exact, plain = make_plain("llama"), make_plain("llama", dtype)
    prompts = [plain.prompt(20 + i, seed=i) for i in range(6)]
    async with run_direct(plain, prefill_chunk=8) as direct:
        sessions = [direct.open(i) for i in range(len(prompts))]
        for session, prompt in zip(sessions, prompts, strict=True):
            direct.feed(session, prompt)
        rows = [tensor((await direct.next(session)).out.rows, dtype).float() for session in sessions]
    ours = sum((row - exact.hidden(prompt)).norm() for row, prompt in zip(rows, prompts, strict=True))
    theirs = sum((plain.hidden(prompt).float() - exact.hidden(prompt)).norm() for prompt in prompts)
    assert ours <= 1.25 * theirs


async def test_the_account_of_an_output_covers_every_step_since_the_one_before(llama: Any, run_direct: Any) -> None:
    async with run_direct(llama, prefill_chunk=4) as direct:
        session = direct.open(1)
        direct.feed(session, llama.prompt(16, seed=1))
        output = await direct.next(session)
        assert output.compute == pytest.approx(sum(step.compute for step in direct.steps))
        assert [step.rows for step in direct.steps] == [4, 4, 4, 4]
        assert output.queue >= 0
        direct.feed(session, [1])
        assert (await direct.next(session)).compute == direct.steps[-1].compute


async def test_the_callers_model_is_left_as_it_was(make_plain: Any, run_direct: Any) -> None:
    plain = make_plain("gpt2")
    before = (plain.model.config._attn_implementation, plain.model.config.to_dict())
    async with run_direct(plain) as direct:
        await direct.generate(1, [1, 2, 3], 3)
        mine = next(direct.engine._runner._model.parameters())
        assert mine.data_ptr() == next(plain.model.base_model.parameters()).data_ptr()
    assert (plain.model.config._attn_implementation, plain.model.config.to_dict()) == before


def test_a_model_whose_answers_would_depend_on_neighbours_is_refused(make_plain: Any) -> None:
    plain = make_plain("llama")
    plain.model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    base, head = split(plain.model)
    settings = TransformersSettings()
    with pytest.raises(CheckpointInvalid, match="rope_type"):
        TransformersEngine(base, head, card_for(base, head, settings), settings)
