"""Turns that guess ahead: the same transcript, fewer round trips, and what was wrong is taken back."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stip_protocol.wire import model_pb2

LOOP = [5, 17, 3, 60, 5, 17, 3, 60, 5, 17]


def slices(made: Any) -> list[model_pb2.Slice]:
    return [part for feed in made.replica.feeds for part in feed.slices]


def guessing(made: Any, monkeypatch: pytest.MonkeyPatch, right: int) -> None:
    """Guesses of which the first `right` come true and the next does not: the toy's text does not repeat itself."""

    def propose(history: np.ndarray, most: int) -> np.ndarray:
        after = made.toy.generate(history.tolist(), most)
        after[right:] = [(one + 1) % 101 for one in after[right:]]
        return np.array(after, np.uint32)

    monkeypatch.setattr("stip_enclave.stepwise.propose", propose)


@pytest.mark.parametrize("right", range(5))
@pytest.mark.parametrize("preset", ["hardened", "paper"])
async def test_guesses_change_no_transcript_and_wrong_ones_are_taken_back(
    bench: Any, monkeypatch: pytest.MonkeyPatch, preset: str, right: int
) -> None:
    made = await bench(preset=preset)
    guessing(made, monkeypatch, right)
    talk = await made.session()
    talk.begin(LOOP, max_tokens=20, drafts=4)
    tokens, kind = await talk.rest()
    assert (tokens, kind) == (made.toy.generate(LOOP, 20), 2)
    drafted = [part for part in slices(made) if part.outputs > 1]
    assert drafted
    pairs = itertools.pairwise(drafted)
    assert all(after.back == max(0, before.outputs - 1 - right) for before, after in pairs)
    # All went through one replica, which holds every position and every row taken back to the wire's rules.
    talk.begin([], max_tokens=3, drafts=4)
    assert (await talk.rest())[0] == made.toy.generate([*LOOP, *tokens], 3)


@pytest.mark.parametrize("stop_at", range(1, 9))
async def test_a_stop_among_confirmed_guesses_ends_the_turn_there(
    bench: Any, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    made = await bench()
    guessing(made, monkeypatch, 4)
    expected = made.toy.generate(LOOP, 12)
    first = expected.index(expected[stop_at])
    talk = await made.session()
    talk.begin(LOOP, max_tokens=12, drafts=4, stop_ids=(expected[stop_at],))
    assert await talk.rest() == (expected[:first], 1)
    talk.begin([40], max_tokens=6, drafts=4)
    assert (await talk.rest())[0] == made.toy.generate([*LOOP, *expected[:first], 40], 6)


async def test_a_turn_cancelled_while_guesses_are_out_forgets_them(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await bench()
    guessing(made, monkeypatch, 4)
    talk = await made.session()
    talk.begin(LOOP, max_tokens=30, drafts=4)
    given_ids = [(await talk.frame()).step.id]
    made.replica.hold = asyncio.Event()
    talk.session.cancel()
    tokens, _ = await talk.rest()
    given_ids += tokens
    made.replica.hold.set()
    talk.begin([40], max_tokens=6, drafts=4)
    assert (await talk.rest())[0] == made.toy.generate([*LOOP, *given_ids, 40], 6)


async def test_a_replica_that_answers_one_row_is_sent_no_guesses(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await bench(max_outputs=1)
    guessing(made, monkeypatch, 4)
    talk = await made.session()
    talk.begin(LOOP, max_tokens=8, drafts=4)
    assert await talk.rest() == (made.toy.generate(LOOP, 8), 2)
    assert {part.outputs for part in slices(made)} == {0, 1}


async def test_nothing_is_guessed_where_every_token_needs_its_whole_row(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await bench(preset="paper")
    guessing(made, monkeypatch, 4)
    talk = await made.session()
    talk.begin(LOOP, max_tokens=8, drafts=4, temperature=2.0, seed=3)
    assert await talk.rest() == (made.toy.generate(LOOP, 8, temperature=2.0, seed=3), 2)
    assert {part.outputs for part in slices(made)} == {0, 1}


async def test_guesses_respect_the_heartbeat_bound_and_give_back_what_was_wrong(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await bench()
    guessing(made, monkeypatch, 1)
    made.renewing.gate = asyncio.Event()
    account = made.account(heartbeat_tokens=6)
    talk = await made.session(account)
    talk.begin(LOOP, max_tokens=20, drafts=4)
    given_ids = [(await talk.frame()).step.id for _ in range(6)]
    assert talk.session.frames.empty()
    assert account._outputs == 6
    made.renewing.gate.set()
    assert given_ids + (await talk.rest())[0] == made.toy.generate(LOOP, 20)


@given(
    prompt=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    count=st.integers(1, 25),
    drafts=st.integers(1, 7),
    right=st.integers(0, 7),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_turn_with_guesses_is_the_turn_without(
    bench: Any, prompt: list[int], count: int, drafts: int, right: int, seed: int
) -> None:
    made = await bench(preset="paper")
    with pytest.MonkeyPatch.context() as patch:
        guessing(made, patch, right)
        talk = await made.session(max_positions=30)
        talk.begin(prompt, max_tokens=count, drafts=drafts, temperature=0.7, top_k=30, seed=seed)
        tokens, _ = await talk.rest()
    room = min(count, 30 - len(prompt))
    assert tokens == made.toy.generate(prompt, room, temperature=0.7, top_k=30, seed=seed)


LIES: dict[str, tuple[Any, str]] = {
    "fewer outputs": (lambda fed: setattr(fed.slices[0], "count", 2), "frame_invalid"),
    "the position of the last row": (lambda fed: setattr(fed.slices[0], "position", 14), "position_refused"),
    "bytes of fewer rows": (lambda fed: setattr(fed, "hidden", fed.hidden[:48]), "tensor_invalid"),
    "a NaN in the last row": (
        lambda fed: setattr(fed, "hidden", fed.hidden[:-4] + np.float32(np.nan).tobytes()),
        "tensor_invalid",
    ),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_about_several_outputs_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    made = await bench()
    guessing(made, monkeypatch, 4)
    bend, code = LIES[lie]

    def tamper(down: model_pb2.Down) -> list[model_pb2.Down]:
        if down.HasField("fed") and down.fed.slices[0].count > 1:
            bend(down.fed)
        return [down]

    made.replica.tamper = tamper
    talk = await made.session()
    talk.begin(LOOP, max_tokens=20, drafts=4)
    assert await talk.failure() == code
