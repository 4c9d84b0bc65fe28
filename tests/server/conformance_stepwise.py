"""The promises to sessions that go step by step, and those to every session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from stip_protocol.errors import Overloaded, PositionRefused, RequestInvalid
from stip_protocol.tensor import ITEM_BYTES
from stip_server.engine import Form, Generation, Hidden, Logits, Slice, Top
from tests.server.conformance import STEPWISE, Bench, Make, Wanted, benched, check

PROMPT = [5, 17, 3, 42, 8, 29, 11, 2, 30, 7, 19, 23]


@check(*Form)
async def the_card_is_whole_and_stays(make: Make, form: Form) -> None:
    async with benched(make, Wanted(slots=3, positions=48)) as bench:
        card = bench.card
        assert (card.max_sessions, card.max_positions) == (3, 48)
        assert card.dtype in ITEM_BYTES
        assert card.max_rows >= 1
        assert card.max_outputs >= 1
        assert (card.vocabulary > 0) or form is Form.HIDDEN
        await bench.says(form, PROMPT[:3], 2)
        assert bench.card == card


@check(*Form)
async def an_open_beyond_the_card_is_refused(make: Make, form: Form) -> None:
    async with benched(make, Wanted(positions=48)) as bench:
        for positions in (0, 49, 2**32 - 1):
            with pytest.raises(PositionRefused):
                bench.open(form, positions)
        for other in set(Form) - set(bench.card.forms):
            with pytest.raises(RequestInvalid):
                bench.open(other, 48)
        session = bench.open(form, 48)
        with pytest.raises(RequestInvalid):
            bench.engine.open(session, max_positions=48, output=form)
        bench.close(session)


@check(*Form)
async def admission_is_bounded_says_when_to_return_and_a_close_makes_room(make: Make, form: Form) -> None:
    async with benched(make, Wanted(slots=2)) as bench:
        first, _ = bench.open(form), bench.open(form)
        for _ in range(3):
            with pytest.raises(Overloaded) as refused:
                bench.open(form)
            assert refused.value.retry_after is not None
            assert 0.1 <= refused.value.retry_after <= 30
        for _ in range(2):
            bench.close(first)
        assert await bench.says(form, PROMPT, 3) == bench.model.greedy(PROMPT, 3)


@check(*Form)
async def a_prompt_in_frames_is_the_prompt(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        answers = [await bench.says(form, PROMPT, 4, frame) for frame in (1, 5, 12)]
        assert answers == [bench.model.greedy(PROMPT, 4)] * 3


@check(*Form)
async def sessions_that_join_and_leave_do_not_disturb_each_other(make: Make, form: Form) -> None:
    jobs = [([(3 * i + 7 * j) % 31 for j in range(1 + 5 * i % 13)], 2 + i % 5) for i in range(12)]
    gate = asyncio.Semaphore(4)

    async def one(bench: Bench, prompt: list[int], count: int) -> list[int]:
        async with gate:
            return await bench.says(form, prompt, count, frame=4)

    async with benched(make, Wanted(slots=4)) as bench:
        answers = await asyncio.gather(*(one(bench, *job) for job in jobs))
        assert answers == [bench.model.greedy(*job) for job in jobs]


@check(*Form)
async def a_close_at_any_time_is_the_last_of_a_session(make: Make, form: Form) -> None:
    async with benched(make, Wanted(slots=1)) as bench:
        for turns in range(12):
            session = bench.open(form)
            if form is Form.IDS:
                bench.feed_ids(session, 0, PROMPT)
                bench.engine.generate(session, Generation(len(PROMPT), 40, frozenset()))
            else:
                bench.feed(session, 0, PROMPT)
            for _ in range(turns):  # every turn of the loop lets the step come to another point
                await asyncio.sleep(0)
            bench.close(session)
            bench.close(session)
            bench.feed(session, len(PROMPT), [1])  # nobody's rows: passed over
        assert await bench.says(form, PROMPT, 3) == bench.model.greedy(PROMPT, 3)


@check(*Form)
async def an_idle_session_is_ended(make: Make, form: Form) -> None:
    async with benched(make, Wanted(idle_seconds=0.2)) as bench:
        silent = bench.open(form)
        assert await bench.ends(silent) == "deadline_exceeded"
        answered = bench.open(form)
        if form is Form.IDS:
            bench.feed_ids(answered, 0, PROMPT)
            bench.engine.generate(answered, Generation(len(PROMPT), 1, frozenset()))
        else:
            bench.feed(answered, 0, PROMPT)
        await bench.event(answered)
        assert await bench.ends(answered) == "deadline_exceeded"


@check(*Form)
async def stopping_ends_the_steps(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        bench.open(form)
        await bench.says(form, PROMPT, 1)


BAD_SLICES: dict[str, tuple[Callable[[Bench], tuple[int, int, int, int, bytes]], str]] = {
    "a gap": (lambda b: (4, 1, 1, 0, b.model.rows([1])), "position_refused"),
    "a repeated row": (lambda b: (2, 1, 1, 0, b.model.rows([1])), "position_refused"),
    "beyond the session": (lambda b: (3, 18, 1, 0, b.model.rows([1] * 18)), "position_refused"),
    "no rows": (lambda b: (3, 0, 0, 0, b""), "frame_invalid"),
    "a byte short": (lambda b: (3, 1, 1, 0, b.model.rows([1])[:-1]), "tensor_invalid"),
    "not finite": (lambda b: (3, 1, 1, 0, b"\xff" * len(b.model.rows([1]))), "tensor_invalid"),
    "more outputs than rows": (lambda b: (3, 1, 2, 0, b.model.rows([1])), "frame_invalid"),
    "more outputs than the card says": (
        lambda b: (3, b.card.max_outputs + 1, b.card.max_outputs + 1, 0, b.model.rows([1] * (b.card.max_outputs + 1))),
        "frame_invalid",
    ),
    "more back than was drafted": (lambda b: (2, 1, 1, 1, b.model.rows([1])), "position_refused"),
}


@check(*STEPWISE)
async def a_bad_slice_ends_its_session_and_no_other(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        for name, (bad, code) in BAD_SLICES.items():
            neighbour = asyncio.create_task(bench.says(form, PROMPT, 6))
            session = bench.open(form, positions=20)
            bench.feed(session, 0, [5, 6, 7])
            await bench.output(session)
            bench.engine.feed([Slice(session, *_slice(bad(bench)))])
            assert await bench.ends(session) == code, name
            assert await neighbour == bench.model.greedy(PROMPT, 6), name


def _slice(fields: tuple[int, int, int, int, bytes]) -> tuple[int, int, int, bytes, int]:
    position, count, outputs, back, rows = fields
    return position, count, outputs, rows, back


@check(*STEPWISE)
async def rows_after_rows_that_are_not_answered_end_the_session(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        session = bench.open(form)
        bench.feed(session, 0, PROMPT)
        bench.feed(session, len(PROMPT), [1])
        assert await bench.ends(session) == "position_refused"


@check(*STEPWISE)
async def a_generation_of_a_session_that_goes_step_by_step_ends_it(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        session = bench.open(form)
        bench.engine.halt(session)
        bench.feed(session, 0, PROMPT)
        assert await bench.pick(session, len(PROMPT) - 1) == bench.model.greedy(PROMPT, 1)[0]
        bench.engine.generate(session, Generation(len(PROMPT), 4, frozenset()))
        assert await bench.ends(session) == "request_invalid"


@check(*STEPWISE, max_outputs=2)
async def every_output_of_a_slice_belongs_to_its_row(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        for outputs in range(1, bench.card.max_outputs + 1):
            session = bench.open(form)
            bench.feed(session, 0, PROMPT, outputs)
            output = await bench.output(session)
            first = len(PROMPT) - outputs
            assert (output.position, output.count) == (first, outputs)
            assert isinstance(output.out, Hidden if form is Form.HIDDEN else Top)
            expected = [bench.model.greedy(PROMPT[: at + 1], 1)[0] for at in range(first, len(PROMPT))]
            assert bench.model.picks(output.out) == expected
            bench.close(session)


async def drafting(bench: Bench, form: Form, prompt: list[int], count: int, right: int) -> list[int]:
    """Greedy ids with three drafts a round trip, of which the first `right` are what the model will say."""
    truth = bench.model.greedy(prompt, count + 4)
    session, ids, length, back = bench.open(form), list[int](), len(prompt), 0
    bench.feed(session, 0, prompt)
    ids.append(await bench.pick(session, length - 1))
    while len(ids) < count:
        drafts = [i if n < right else (i + 1) % 31 for n, i in enumerate(truth[len(ids) : len(ids) + 3])]
        position = len(prompt) + len(ids) - 1
        bench.feed(session, position, [ids[-1], *drafts], outputs=4, back=back)
        output = await bench.output(session)
        assert (output.position, output.count) == (position, 4)
        back = 3
        for draft, picked in zip([*drafts, -1], bench.model.picks(output.out), strict=True):
            ids.append(picked)
            if picked != draft:
                break
            back -= 1
        back = max(back, 0)
    bench.close(session)
    return ids[:count]


@check(*STEPWISE, max_outputs=4)
async def rows_taken_back_leave_no_trace(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        answers = await asyncio.gather(
            *(drafting(bench, form, PROMPT[: 3 + right], 9, right) for right in range(4)),
        )
        assert answers == [bench.model.greedy(PROMPT[: 3 + right], 9) for right in range(4)]


@check(Form.TOP)
async def a_recall_brings_the_row_once_and_only_the_last_one(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        for position, code in ((len(PROMPT) - 1, "position_refused"), (0, "position_refused")):
            session = bench.open(form)
            bench.feed(session, 0, PROMPT)
            top = await bench.output(session)
            bench.engine.recall(session, len(PROMPT) - 1)
            full = await bench.output(session)
            assert isinstance(full.out, Logits)
            assert full.position == len(PROMPT) - 1
            assert bench.model.picks(full.out) == bench.model.picks(top.out)
            bench.engine.recall(session, position)
            assert await bench.ends(session) == code


@check(Form.TOP)
async def a_recall_behind_newer_rows_ends_the_session(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        session = bench.open(form)
        bench.feed(session, 0, PROMPT)
        await bench.output(session)
        bench.feed(session, len(PROMPT), [1], outputs=0)
        bench.engine.recall(session, len(PROMPT) - 1)
        assert await bench.ends(session) == "position_refused"


@check(Form.HIDDEN)
async def a_recall_without_a_top_ends_the_session(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        session = bench.open(form)
        bench.feed(session, 0, PROMPT)
        await bench.output(session)
        bench.engine.recall(session, len(PROMPT) - 1)
        assert await bench.ends(session) == "request_invalid"


@check(Form.TOP, max_outputs=2)
async def each_row_of_the_last_answer_is_recalled_once(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        outputs = bench.card.max_outputs
        session = bench.open(form)
        bench.feed(session, 0, PROMPT, outputs)
        picks = bench.model.picks((await bench.output(session)).out)
        for back in range(1, outputs + 1):
            bench.engine.recall(session, len(PROMPT) - back)
        for back in range(1, outputs + 1):
            full = await bench.output(session)
            assert full.position == len(PROMPT) - back
            assert bench.model.picks(full.out) == [picks[-back]]
        bench.engine.recall(session, len(PROMPT) - 1)
        assert await bench.ends(session) == "position_refused"
