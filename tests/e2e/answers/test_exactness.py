"""Protected answers are the plain model's, whatever is asked and whoever asks beside it."""

from __future__ import annotations

import pytest

import stip
from stip_stack.trials import SAMPLINGS, Job, Served, concurrently


async def test_greedy_ids_are_identical_to_the_plain_model_generating_alone(served: Served) -> None:
    prompt = served.prompt(1, 30)
    plain = served.plain.generate(prompt, Job([]).sampler(), max_tokens=48, stop_ids=frozenset())
    async with await stip.aconnect(served.profile) as connection, await connection.session() as session:
        answer = await Job(prompt, max_tokens=48).run(session)
    served.require_plain(Job(prompt, max_tokens=48), answer)
    assert answer.finish is stip.FinishReason.LENGTH
    if answer.ids != plain:  # only where rounding decides, which require_plain has just shown
        assert served.plain.divergence(prompt, plain, answer.ids) is not None


@pytest.mark.parametrize("kind", SAMPLINGS)
async def test_each_way_to_sample_gives_the_plain_models_ids(served: Served, kind: str) -> None:
    job = Job(served.prompt(2, 17), max_tokens=20, **SAMPLINGS[kind])
    async with await stip.aconnect(served.profile) as connection:
        async with await connection.session() as session:
            first = await job.run(session)
        async with await connection.session() as session:
            again = await job.run(session)
    served.require_plain(job, first)
    assert again == first


async def test_sixteen_sessions_of_different_lengths_join_and_leave_and_stay_exact(served: Served) -> None:
    jobs = served.mixed(32, seed=100)
    async with await stip.aconnect(served.profile) as connection:
        answers = await concurrently(connection, jobs)
    for job, answer in zip(jobs, answers, strict=True):
        served.require_plain(job, answer)


async def test_turns_of_one_session_go_on_from_all_that_was_said(served: Served) -> None:
    said: list[int] = []
    async with await stip.aconnect(served.profile) as connection, await connection.session() as session:
        for turn, kind in enumerate(SAMPLINGS.values()):
            job = Job(served.prompt(40 + turn, 3 + turn * 5), max_tokens=9, before=list(said), **kind)
            answer = await job.run(session)
            served.require_plain(job, answer)
            said += job.ids + answer.ids


async def test_a_cancelled_turn_leaves_its_session_exact(served: Served) -> None:
    first = Job(served.prompt(50, 12), max_tokens=400, until=5)
    async with await stip.aconnect(served.profile) as connection, await connection.session() as session:
        answer = await first.run(session)
        assert answer.finish is stip.FinishReason.CANCELLED
        assert 5 <= len(answer.ids) < 400
        served.require_plain(first, answer)
        second = Job(served.prompt(51, 7), max_tokens=10, before=first.ids + answer.ids)
        served.require_plain(second, await second.run(session))


async def test_a_stop_id_ends_a_turn_and_is_not_part_of_it(served: Served) -> None:
    prompt = served.prompt(60, 20)
    async with await stip.aconnect(served.profile) as connection:
        async with await connection.session() as session:
            free = await Job(prompt, max_tokens=30).run(session)
        stop = free.ids[len(free.ids) // 2]
        job = Job(prompt, max_tokens=30, stop_ids=(stop,))
        async with await connection.session() as session:
            answer = await job.run(session)
            assert answer.finish is stip.FinishReason.STOP
            assert answer.ids == free.ids[: free.ids.index(stop)]
            served.require_plain(job, answer)
            after = Job(served.prompt(61, 4), max_tokens=8, before=prompt + answer.ids)
            served.require_plain(after, await after.run(session))
