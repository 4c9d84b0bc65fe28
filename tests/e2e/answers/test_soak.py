"""A longer, seeded run of what test_exactness shows in short: `make test-long`."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

import stip
from stip_stack.trials import Served, concurrently

SEED = 20_000
SESSIONS = 256


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_hundreds_of_sessions_that_join_cancel_and_leave_at_random_stay_exact(served: Served) -> None:
    generator = random.Random(SEED)
    jobs = [
        replace(job, until=generator.randint(1, job.max_tokens)) if generator.random() < 0.3 else job
        for job in served.mixed(SESSIONS, seed=SEED)
    ]
    async with await stip.aconnect(served.profile) as connection:
        answers = await concurrently(connection, jobs)
    for job, answer in zip(jobs, answers, strict=True):
        served.require_plain(job, answer)
