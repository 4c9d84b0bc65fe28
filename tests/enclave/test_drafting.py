"""Guesses from repetition: which ids are guessed, and how many a client may ask for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stip_enclave.config import Limits
from stip_enclave.drafting import propose
from stip_enclave.turns import TurnRequest
from stip_protocol.errors import RequestInvalid
from stip_protocol.wire import enclave_pb2


def guessed(history: list[int], most: int) -> list[int]:
    found = propose(np.array(history, np.uint32), most)
    assert found.dtype == np.uint32
    return found.tolist()


def naive(history: list[int], most: int) -> list[int]:
    """The definition, in the plainest terms."""
    for length in (4, 3, 2):
        for start in range(len(history) - length - 1, -1, -1):
            if history[start : start + length] == history[-length:]:
                text = list(history)
                for at in range(most):
                    text.append(text[start + length + at])
                return text[len(history) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 9))
@example([], 7)
@example([1], 7)
@example([1, 1], 7)
@example([1, 1, 1], 7)
def test_a_guess_is_what_followed_the_latest_occurrence_of_the_longest_suffix(history: list[int], most: int) -> None:
    assert guessed(history, most) == naive(history, most)


@pytest.mark.parametrize(
    ("history", "most", "expected"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2, 3, 4], 3, [5, 9, 1]),
        ([1, 2, 7, 8, 1, 2, 9, 8, 1, 2], 2, [9, 8]),
        ([0, 1, 2, 7, 5, 1, 2, 9, 0, 1, 2], 2, [7, 5]),
        ([1, 2, 3, 4], 7, []),
        ([5, 1, 6, 1], 7, []),
        ([8, 8, 8], 4, [8, 8, 8, 8]),
        ([1, 2, 3, 1, 2], 5, [3, 1, 2, 3, 1]),
        ([1, 2, 9, 1, 2], 0, []),
    ],
    ids=[
        "what followed", "the latest of two", "a longer match before a later one", "nothing recurs",
        "one id is not enough", "a loop of one", "a loop of three", "none wanted",
    ],
)  # fmt: skip
def test_what_is_guessed(history: list[int], most: int, expected: list[int]) -> None:
    assert guessed(history, most) == expected


def test_a_guess_leaves_the_history_as_it_was() -> None:
    history = np.array([4, 5, 6, 4, 5], np.uint32)
    found = propose(history, 2)
    found[:] = 0
    assert history.tolist() == [4, 5, 6, 4, 5]


def test_a_turn_guesses_as_many_as_were_asked_for() -> None:
    for drafts in (0, 3, 7):
        message = enclave_pb2.Turn(sampling=enclave_pb2.Sampling(max_tokens=1, drafts=drafts))
        assert TurnRequest.read(message, Limits()).turn.drafts == drafts


@pytest.mark.parametrize(("limit", "drafts"), [(7, 8), (0, 1), (3, 2**32 - 1)])
def test_more_guesses_than_the_enclave_allows_are_refused(limit: int, drafts: int) -> None:
    message = enclave_pb2.Turn(sampling=enclave_pb2.Sampling(max_tokens=1, drafts=drafts))
    with pytest.raises(RequestInvalid, match=f"sampling drafts: got {drafts}, allowed: 0 to {limit}"):
        TurnRequest.read(message, Limits(drafts=limit))
