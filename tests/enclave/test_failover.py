"""A replica goes away at any point of a turn: the session goes on elsewhere, nothing lost, repeated or drawn anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stip_enclave.config import Limits
from stip_protocol.errors import StipError
from stip_protocol.wire import model_pb2
from tests.enclave.bench import until

PROMPT = [5, 17, 3, 60, 61, 62, 63]
LOOP = [5, 17, 3, 60, 5, 17, 3, 60, 5, 17]
BOTH = ("one", "two")
SAMPLED = {"temperature": 1.2, "seed": 9}
FULL_ROWS = {"temperature": 2.0, "seed": 4}
"""Draws from the whole distribution: the 64 largest logits do not decide, and the row is recalled."""

Point = Callable[[model_pb2.Up], bool]


def nth(wanted: Callable[[model_pb2.Up], bool], number: int) -> Point:
    """The `number`-th message of a kind, once."""
    seen = 0

    def is_it(up: model_pb2.Up) -> bool:
        nonlocal seen
        seen += wanted(up)
        return wanted(up) and seen == number

    return is_it


def feeding(up: model_pb2.Up) -> bool:
    return up.HasField("feed")


POINTS: dict[str, tuple[Callable[[model_pb2.Up], bool], int]] = {
    "at the first piece of the prompt": (feeding, 1),
    "at the last piece of the prompt": (feeding, 2),
    "at the first token": (feeding, 3),
    "between tokens": (feeding, 6),
    "at the last token": (feeding, 9),
    "at a recall": (lambda up: up.HasField("recall"), 2),
    "at a generation": (lambda up: up.HasField("generate"), 1),
}
RUNS = [
    ("hardened", SAMPLED, ("at the first piece of the prompt", "at the last piece of the prompt", "at the first token",
                           "between tokens", "at the last token")),
    ("paper", FULL_ROWS, ("at the first piece of the prompt", "between tokens", "at a recall")),
    ("throughput", SAMPLED, ("at the first piece of the prompt", "at the last piece of the prompt", "at a generation")),
]  # fmt: skip


def broken(made: Any, point: str) -> None:
    """Whichever replica meets the point breaks all its links, and stays away."""
    wanted, number = POINTS[point]
    reached = nth(wanted, number)
    for replica in made.front.replicas:

        def broken_by(up: model_pb2.Up, replica: Any = replica) -> bool:
            replica.dead = replica.dead or reached(up)
            return replica.dead

        replica.broken_by = broken_by


CASES = [(preset, sampling, point) for preset, sampling, points in RUNS for point in points]


@pytest.mark.parametrize(("preset", "sampling", "point"), CASES)
async def test_a_session_goes_on_elsewhere_with_the_same_transcript(
    bench: Any, preset: str, sampling: dict[str, Any], point: str
) -> None:
    made = await bench(preset=preset, replicas=BOTH)
    talk = await made.session()
    broken(made, point)
    talk.begin(PROMPT, max_tokens=8, **sampling)
    expected = made.toy.generate(PROMPT, 8, **sampling)
    assert await talk.rest() == (expected, 2)
    assert [replica.dead for replica in made.front.replicas].count(True) == 1
    talk.begin([40, 41], max_tokens=4, **sampling)
    assert (await talk.rest())[0] == made.toy.generate([*PROMPT, *expected, 40, 41], 4, **sampling)


@pytest.mark.parametrize("number", range(1, 8))
async def test_a_session_that_drafts_goes_on_elsewhere(bench: Any, number: int) -> None:
    made = await bench(replicas=BOTH)
    talk = await made.session()
    POINTS["now"] = feeding, number
    broken(made, "now")
    talk.begin(LOOP, max_tokens=20, drafts=4)
    assert await talk.rest() == (made.toy.generate(LOOP, 20), 2)
    assert [replica.dead for replica in made.front.replicas].count(True) == 1


@pytest.mark.parametrize("frames", range(5))
async def test_a_generation_that_was_cut_off_goes_on_with_the_next_draw(bench: Any, frames: int) -> None:
    made = await bench(preset="throughput", replicas=BOTH)
    talk = await made.session()
    first = made.seated()
    first.pace = asyncio.Semaphore(frames)
    talk.begin(PROMPT, max_tokens=14, **SAMPLED)
    for _ in range(3 * frames):
        await talk.frame()
    first.kill()
    expected = made.toy.generate(PROMPT, 14, **SAMPLED)
    assert await talk.rest() == (expected[3 * frames :], 2)


async def test_a_session_returns_to_the_only_replica_when_it_comes_back(bench: Any) -> None:
    made = await bench()
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=30)
    first = [(await talk.frame()).step.id for _ in range(3)]
    made.replica.break_links()
    tokens, kind = await talk.rest()
    assert (first + tokens, kind) == (made.toy.generate(PROMPT, 30), 2)
    assert made.replica.links == 2


async def test_a_session_between_turns_replays_with_its_next_turn(bench: Any) -> None:
    made = await bench(replicas=BOTH)
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=3)
    tokens, _ = await talk.rest()
    gone = made.seated()
    other = next(replica for replica in made.front.replicas if replica is not gone)
    gone.kill()
    talk.begin([], max_tokens=3)
    assert (await talk.rest())[0] == made.toy.generate(PROMPT, 6)[3:]
    assert [part.position for part in other.feeds[0].slices] == [0]
    assert len(tokens) == 3


async def test_sixteen_sessions_move_and_replay_a_few_at_a_time(bench: Any) -> None:
    made = await bench(replicas=BOTH, limits=Limits(replays=3))
    talks = [await made.session() for _ in range(16)]
    prompts = [[number, *PROMPT] for number in range(16)]
    for talk, prompt in zip(talks, prompts, strict=True):
        talk.begin(prompt, max_tokens=20, **SAMPLED)
    for talk in talks:
        await talk.frame()
    gone, kept = made.front.replicas
    assert gone.sessions
    assert kept.sessions
    gone.kill()
    for talk, prompt in zip(talks, prompts, strict=True):
        tokens, kind = await talk.rest()
        assert (tokens, kind) == (made.toy.generate(prompt, 20, **SAMPLED)[1:], 2)


async def test_running_sessions_share_a_replica_with_a_few_replays_at_a_time(bench: Any) -> None:
    made = await bench(replicas=BOTH, limits=Limits(replays=3))
    talks = [await made.session() for _ in range(16)]
    for talk in talks:
        talk.begin(PROMPT, max_tokens=20)
    for talk in talks:
        await talk.frame()
    gone, kept = made.front.replicas
    outputs: list[model_pb2.Down] = []
    kept.tamper = lambda down: outputs.append(down) or [] if down.HasField("fed") else [down]
    before = len(kept.opened)
    gone.kill()
    await until(lambda: len(kept.opened) >= before + 3)
    await made.session()  # a round trip for another session, behind all that the others had to say
    assert len(kept.opened) == before + 3 + 1
    kept.tamper = lambda down: [down]
    for down in outputs:
        kept.say(down)
    for talk in talks:
        assert await talk.rest() == (made.toy.generate(PROMPT, 20)[1:], 2)


@given(
    preset=st.sampled_from(["hardened", "paper", "throughput"]),
    breaks=st.sets(st.integers(3, 120), max_size=6),
    drains=st.sets(st.integers(3, 120), max_size=1),
    drafts=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_breaks_whenever_no_transcript_changes(
    bench: Any, preset: str, breaks: set[int], drains: set[int], drafts: int, seed: int
) -> None:
    made = await bench(preset=preset, replicas=("one", "two", "three"))
    messages = 0

    def broken_by(replica: Any) -> Callable[[model_pb2.Up], bool]:
        def count(up: model_pb2.Up) -> bool:
            nonlocal messages
            messages += 1
            if messages in drains:
                replica.drain()
            return messages in breaks

        return count

    talks = [await made.session() for _ in range(4)]
    for replica in made.front.replicas:
        replica.broken_by = broken_by(replica)
    sampling = {"temperature": 1.1, "seed": seed}
    texts: list[list[int]] = [[] for _ in talks]
    for _ in range(3):
        for number, talk in enumerate(talks):
            talk.begin([number, *LOOP], max_tokens=9, drafts=drafts, **sampling)
        for number, talk in enumerate(talks):
            texts[number] += [number, *LOOP]
            tokens, _ = await talk.rest()
            assert tokens == made.toy.generate(texts[number], 9, **sampling)
            texts[number] += tokens


def refused(code: str) -> Callable[[model_pb2.Down], list[model_pb2.Down]]:
    """Closes a session in the place of its second output."""
    outputs = 0

    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        nonlocal outputs
        outputs += down.HasField("fed")
        if not down.HasField("fed") or outputs != 2:
            return [down]
        session = down.fed.slices[0].session
        return [model_pb2.Down(closed=model_pb2.Closed(session=session, code=code, message="so it is"))]

    return tamper


@pytest.mark.parametrize("code", ["overloaded", "draining", "replica_lost", "deadline_exceeded", "unavailable"])
async def test_a_replica_that_refuses_to_go_on_is_left(bench: Any, code: str) -> None:
    made = await bench(replicas=BOTH)
    talk = await made.session()
    left = made.seated()
    left.tamper = refused(code)
    talk.begin(PROMPT, max_tokens=6)
    assert await talk.rest() == (made.toy.generate(PROMPT, 6), 2)
    assert [len(replica.opened) for replica in made.front.replicas] == [1, 1]


@pytest.mark.parametrize(
    "code", ["request_invalid", "position_refused", "tensor_invalid", "session_unknown", "lease_spent", "lease_expired"]
)
async def test_an_error_about_the_session_itself_ends_it(bench: Any, code: str) -> None:
    made = await bench(replicas=BOTH)
    talk = await made.session()
    made.seated().tamper = refused(code)
    talk.begin(PROMPT, max_tokens=6)
    assert await talk.failure() == code


async def test_a_row_that_is_not_answered_is_asked_elsewhere(bench: Any) -> None:
    made = await bench(replicas=BOTH, limits=Limits(reply_seconds=0.2))
    talk = await made.session()
    made.seated().tamper = lambda down: []
    talk.begin(PROMPT, max_tokens=4)
    assert await talk.rest() == (made.toy.generate(PROMPT, 4), 2)


async def test_a_session_that_finds_no_seat_in_time_ends(bench: Any) -> None:
    made = await bench(limits=Limits(failover_seconds=0.2))
    talk = await made.session()
    talk.begin(PROMPT, max_tokens=40)
    await talk.frame()
    made.front.dead = True
    made.replica.kill()
    assert await talk.failure() == "replica_lost"


async def test_answers_that_never_come_do_not_make_a_session_travel_for_ever(bench: Any) -> None:
    made = await bench(replicas=BOTH, limits=Limits(reply_seconds=0.1, failover_seconds=0.5))
    talk = await made.session()
    for replica in made.front.replicas:
        replica.tamper = lambda down: [] if down.HasField("fed") else [down]
    talk.begin(PROMPT)
    assert await talk.failure() == "replica_lost"


async def test_with_the_gateway_gone_new_sessions_are_told_when_to_come_again(bench: Any) -> None:
    made = await bench()
    made.front.dead = True
    with pytest.raises(StipError) as caught:
        await made.session()
    assert caught.value.code == "replica_lost"
    assert caught.value.retry_after


async def test_a_replica_that_is_full_sends_a_new_session_to_the_other(bench: Any) -> None:
    made = await bench(replicas=BOTH)
    for replica in made.front.replicas:
        replica.full = True
    with pytest.raises(StipError) as caught:
        await made.session()
    assert (caught.value.code, caught.value.retry_after) == ("overloaded", 0.25)
    made.front.replicas[1].full = False
    for _ in range(3):
        talk = await made.session()
    talk.begin(PROMPT, max_tokens=2)
    assert await talk.rest() == (made.toy.generate(PROMPT, 2), 2)
    assert len(made.front.replicas[1].sessions) == 3
