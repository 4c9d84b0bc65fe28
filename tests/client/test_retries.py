"""Trying again: opening is, a bounded number of times and when the enclave says; a turn never is."""

from __future__ import annotations

from typing import Any

import pytest

import stip
from stip import connection as connections
from stip_protocol.errors import BudgetSpent, DelegationRefused, Overloaded, RequestInvalid, StipError, Unavailable
from stip_protocol.rpc import RETRY_LIMIT

NEVER = 10_000.0
"""Seconds that no test waits: what goes on all the same has waited for something else."""


async def said(chunks: Any) -> str:
    return "".join([chunk.text async for chunk in chunks])


@pytest.mark.parametrize("retries", [0, 1, 4])
async def test_opening_is_tried_again_as_often_as_asked(enclave: Any, profile: Any, retries: int):
    enclave.opens_fail = [Overloaded("full", retry_after=0.01)] * (retries + 1)
    async with await stip.aconnect(profile) as connection:
        with pytest.raises(Overloaded) as caught:
            await connection.session(open_retries=retries)
        assert caught.value.retry_after == 0.01
        assert len(enclave.opens) == retries + 1
        enclave.opens_fail = [Overloaded("full", retry_after=0.01)] * retries
        async with await connection.session(open_retries=retries) as session:
            assert await said(session.generate([5]))


async def test_the_enclave_says_how_long_to_wait(enclave: Any, profile: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "FIRST_PAUSE", NEVER)
    monkeypatch.setattr(connections, "LONGEST_PAUSE", NEVER)
    enclave.opens_fail = [Overloaded("full", retry_after=0.05), Overloaded("full", retry_after=0.05)]
    async with await stip.aconnect(profile) as connection, await connection.session():
        assert len(enclave.opens) == 3


@pytest.mark.parametrize("retry_after", [60.0, None])
async def test_what_cannot_be_waited_for_is_raised_at_once(
    enclave: Any, profile: Any, monkeypatch: pytest.MonkeyPatch, retry_after: float | None
):
    monkeypatch.setattr(connections, "FIRST_PAUSE", 60.0)
    monkeypatch.setattr(connections, "LONGEST_PAUSE", 60.0)
    enclave.opens_fail = [Overloaded("full", retry_after=retry_after)]
    async with await stip.aconnect(profile) as connection:
        with pytest.raises(Overloaded) as caught:
            await connection.session(timeout=30.0)
    assert caught.value.retry_after == retry_after
    assert len(enclave.opens) == 1


def test_pauses_grow_to_a_limit_unless_the_enclave_names_one():
    for tried, least in enumerate((0.2, 0.8, 3.2, 8.0, 8.0)):
        assert least <= connections._pause(tried, None) <= least * 1.1
        assert 5.0 <= connections._pause(tried, 5.0) <= 5.5
    assert 8.0 <= connections._pause(10**6, None) <= 8.8
    assert len({connections._pause(0, 5.0) for _ in range(20)}) > 1


@pytest.mark.parametrize("refusal", [DelegationRefused("no"), BudgetSpent("spent", retry_after=0.01)])
async def test_a_refusal_that_time_does_not_mend_is_final(enclave: Any, profile: Any, refusal: StipError):
    enclave.opens_fail = [refusal]
    async with await stip.aconnect(profile) as connection:
        with pytest.raises(type(refusal)):
            await connection.session()
    assert len(enclave.opens) == 1


async def test_a_negative_number_of_retries_is_refused_before_anything_is_sent(enclave: Any, profile: Any):
    async with await stip.aconnect(profile) as connection:
        with pytest.raises(RequestInvalid, match="open_retries: got -1, allowed: 0 or more"):
            await connection.session(open_retries=-1)
    assert enclave.opens == []


async def test_a_challenge_is_tried_again_when_the_enclave_says(
    enclave: Any, profile: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "FIRST_PAUSE", NEVER)
    monkeypatch.setattr(connections, "LONGEST_PAUSE", NEVER)
    enclave.challenges_fail = [Unavailable("starting", retry_after=0.02)] * 2
    async with await stip.aconnect(profile) as connection:
        assert connection.verification.verified
    assert len(enclave.nonces) == 3
    assert len(set(enclave.nonces)) == 3


@pytest.mark.parametrize(("said_ms", "seconds"), [(250, 0.25), (0, None), (2**32 - 1, RETRY_LIMIT)])
async def test_a_turn_that_failed_is_not_sent_again_and_its_error_says_when_to(
    enclave: Any, profile: Any, said_ms: int, seconds: float | None
):
    enclave.turn_fails, enclave.turn_retry_ms = ("overloaded", "busy"), said_ms
    async with await stip.aconnect(profile) as connection, await connection.session(open_retries=5) as session:
        with pytest.raises(Overloaded) as caught:
            await said(session.generate([5]))
    assert caught.value.retry_after == seconds
    assert (len(enclave.turns), len(enclave.opens)) == (1, 1)


async def test_a_conversation_that_starts_afresh_opens_with_the_same_patience(enclave: Any, profile: Any):
    async with await stip.aconnect(profile) as connection, await connection.session(open_retries=3) as session:
        await said(session.chat([{"role": "user", "content": "Let there be light."}]))
        enclave.opens_fail = [Overloaded("full", retry_after=0.01)] * 3
        await said(session.chat([{"role": "user", "content": "Let there be dark."}]))
    assert len(enclave.opens) == 5


def test_the_synchronous_surface_retries_alike(enclave: Any, profile: Any):
    with stip.connect(profile) as connection:
        enclave.opens_fail = [Overloaded("full", retry_after=0.01)] * 4
        with pytest.raises(Overloaded):
            connection.session(open_retries=1)
        with connection.session(open_retries=2) as session:
            assert "".join(chunk.text for chunk in session.generate([5], drafts=1))
    assert enclave.turns[0].sampling.drafts == 1
