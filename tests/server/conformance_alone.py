"""The promises to sessions that an engine decodes alone: ids in, ids out."""

from __future__ import annotations

import asyncio

import numpy as np

from stip_server.engine import Form, Generation, Ids, Slice
from tests.server.conformance import Bench, Make, benched, check
from tests.server.conformance_stepwise import PROMPT

NEVER = frozenset[int]()


@check(Form.IDS)
async def a_stop_id_ends_a_generation_and_is_no_part_of_it(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        truth = bench.model.greedy(PROMPT, 8)
        stop = truth[5]
        end = truth.index(stop)
        session = bench.open(form)
        bench.feed_ids(session, 0, PROMPT)
        bench.engine.generate(session, Generation(len(PROMPT), 20, frozenset({stop})))
        assert await bench.ids(session, len(PROMPT)) == truth[:end]
        # Nor of the session: what follows comes where it would have stood.
        then = [9, 4]
        bench.feed_ids(session, len(PROMPT) + end, then)
        bench.engine.generate(session, Generation(len(PROMPT) + end + 2, 3, NEVER))
        said = await bench.ids(session, len(PROMPT) + end + 2)
        assert said == bench.model.greedy([*PROMPT, *truth[:end], *then], 3)


@check(Form.IDS)
async def a_generation_goes_on_where_the_one_before_ended(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        session, ids = bench.open(form), list[int]()
        bench.feed_ids(session, 0, PROMPT)
        for count in (1, 3, 2):
            at = len(PROMPT) + len(ids)
            bench.engine.generate(session, Generation(at, count, NEVER, step=len(ids)))
            ids += await bench.ids(session, at)
        assert ids == bench.model.greedy(PROMPT, 6)


@check(Form.IDS)
async def a_generation_goes_on_behind_a_stop_id(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        truth = bench.model.greedy(PROMPT, 6)
        end = truth.index(truth[3])
        session = bench.open(form)
        bench.feed_ids(session, 0, PROMPT)
        bench.engine.generate(session, Generation(len(PROMPT), 20, frozenset({truth[3]})))
        await bench.ids(session, len(PROMPT))
        bench.engine.generate(session, Generation(len(PROMPT) + end, 6 - end, NEVER))
        assert await bench.ids(session, len(PROMPT) + end) == truth[end:]


@check(Form.IDS)
async def turns_reuse_a_session_and_drop_what_was_not_handed_on(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        session, history = bench.open(form), list(PROMPT)
        bench.feed_ids(session, 0, PROMPT)
        for kept, more in ((5, [7, 3]), (2, [1]), (0, [4, 4, 4]), (6, [2])):
            bench.engine.generate(session, Generation(len(history), 6, NEVER))
            said = await bench.ids(session, len(history))
            assert said == bench.model.greedy(history, 6)
            history += said[:kept]
            bench.feed_ids(session, len(history), more, back=6 - kept)
            history += more
        bench.engine.generate(session, Generation(len(history), 3, NEVER))
        assert await bench.ids(session, len(history)) == bench.model.greedy(history, 3)


@check(Form.IDS)
async def a_halt_ends_a_generation_and_the_session_goes_on(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        for events in range(4):
            session = bench.open(form)
            bench.engine.halt(session)  # none runs: nothing follows
            bench.feed_ids(session, 0, PROMPT)
            bench.engine.generate(session, Generation(len(PROMPT), 50, NEVER))
            said: list[int] = []
            for _ in range(events):
                event = await bench.event(session)
                assert isinstance(event, Ids)
                assert not event.done
                said += np.frombuffer(event.ids, "<u4").tolist()
            bench.engine.halt(session)
            said += await bench.ids(session, len(PROMPT) + len(said))
            assert len(said) < 50
            assert said == bench.model.greedy(PROMPT, 50)[: len(said)]
            bench.feed_ids(session, len(PROMPT) + len(said), [6])
            bench.engine.generate(session, Generation(len(PROMPT) + len(said) + 1, 2, NEVER))
            again = await bench.ids(session, len(PROMPT) + len(said) + 1)
            assert again == bench.model.greedy([*PROMPT, *said, 6], 2)
            bench.close(session)


@check(Form.IDS)
async def a_sampled_generation_depends_on_its_seed(make: Make, form: Form) -> None:
    async with benched(make) as bench:

        async def drawn(seed: int, top_k: int) -> list[int]:
            session = bench.open(form)
            bench.feed_ids(session, 0, PROMPT)
            generation = Generation(len(PROMPT), 12, NEVER, temperature=2.0, top_k=top_k, top_p=0.999, seed=seed)
            bench.engine.generate(session, generation)
            ids = await bench.ids(session, len(PROMPT))
            bench.close(session)
            return ids

        one, again, two = await asyncio.gather(drawn(1, 0), drawn(1, 0), drawn(2, 0))
        assert one == again
        assert one != two
        assert await drawn(3, 1) == bench.model.greedy(PROMPT, 12)


BAD_GENERATIONS: dict[str, tuple[Generation, str]] = {
    "another position": (Generation(len(PROMPT) - 1, 4, NEVER), "position_refused"),
    "no ids": (Generation(len(PROMPT), 0, NEVER), "position_refused"),
    "beyond the session": (Generation(len(PROMPT), 64 - len(PROMPT) + 1, NEVER), "position_refused"),
}


@check(Form.IDS)
async def a_generation_that_cannot_be_accepted_ends_its_session_and_no_other(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        for name, (generation, code) in BAD_GENERATIONS.items():
            neighbour = asyncio.create_task(bench.says(form, PROMPT, 6))
            session = bench.open(form)
            bench.feed_ids(session, 0, PROMPT)
            bench.engine.generate(session, generation)
            assert await bench.ends(session) == code, name
            assert await neighbour == bench.model.greedy(PROMPT, 6), name
        empty = bench.open(form)
        bench.engine.generate(empty, Generation(0, 4, NEVER))
        assert await bench.ends(empty) == "position_refused"


@check(Form.IDS)
async def one_generation_runs_at_a_time_and_nothing_is_fed_meanwhile(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        twice, fed = bench.open(form), bench.open(form)
        for session in (twice, fed):
            bench.feed_ids(session, 0, PROMPT)
            bench.engine.generate(session, Generation(len(PROMPT), 40, NEVER))
        bench.engine.generate(twice, Generation(len(PROMPT), 4, NEVER))
        bench.feed_ids(fed, len(PROMPT), [1])
        assert await _ends(bench, twice) == "request_invalid"
        assert await _ends(bench, fed) == "position_refused"


async def _ends(bench: Bench, session: tuple[int, bytes]) -> str:
    """The end of a session of which ids may have been on their way."""
    while True:
        try:
            return await bench.ends(session)
        except AssertionError:
            continue


BAD_IDS: dict[str, tuple[int, int, int, int, bytes, str]] = {
    "a gap": (len(PROMPT) + 1, 1, 0, 0, bytes(4), "position_refused"),
    "a byte short": (len(PROMPT), 2, 0, 0, bytes(7), "tensor_invalid"),
    "an id outside": (len(PROMPT), 1, 0, 0, b"\xff" * 4, "tensor_invalid"),
    "outputs": (len(PROMPT), 1, 1, 0, bytes(4), "frame_invalid"),
    "back into the prompt": (len(PROMPT) - 1, 1, 0, 1, bytes(4), "position_refused"),
}


@check(Form.IDS)
async def bad_ids_end_their_session_and_no_other(make: Make, form: Form) -> None:
    async with benched(make) as bench:
        for name, (position, count, outputs, back, ids, code) in BAD_IDS.items():
            neighbour = asyncio.create_task(bench.says(form, PROMPT, 6))
            session = bench.open(form)
            bench.feed_ids(session, 0, PROMPT)
            bench.engine.feed([Slice(session, position, count, outputs, ids, back)])
            assert await bench.ends(session) == code, name
            assert await neighbour == bench.model.greedy(PROMPT, 6), name
