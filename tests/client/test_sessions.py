"""Sessions over a real TLS socket: streaming, several turns, cancellation, time, and what is refused at once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import stip
from stip.stream import FinishReason
from stip_protocol.documents import Signed
from stip_protocol.errors import (
    BudgetSpent,
    Cancelled,
    DeadlineExceeded,
    DelegationRefused,
    FrameInvalid,
    ManifestMismatch,
    Overloaded,
    PositionRefused,
    RequestInvalid,
    SimulatedEvidenceRefused,
)
from stip_protocol.release import Delegation
from stip_protocol.wire import enclave_pb2

TEXT = " And the light was good, and the waters were calm."


def ids_of(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


async def said(chunks: Any) -> str:
    return "".join([chunk.text async for chunk in chunks])


async def test_an_answer_streams_token_by_token_and_ends_at_a_stop_id(enclave: Any, profile: Any, tokenizer: Any):
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        chunks = [chunk async for chunk in session.generate("In the beginning", max_tokens=64)]
        assert "".join(chunk.text for chunk in chunks) == TEXT
        assert [chunk.id for chunk in chunks] == enclave.answers[0][:-1]
        assert session.last is not None
        assert session.last.finish_reason == "stop"
        assert session.last.completion_tokens == len(chunks)
        assert session.last.prompt_tokens == len(tokenizer.encode("In the beginning", special=True))
        assert session.last.first_token_seconds <= session.last.seconds
    assert ids_of(enclave.turns[0].ids) == tokenizer.encode("In the beginning", special=True)


async def test_sampling_reaches_the_enclave_as_asked(enclave: Any, profile: Any):
    async with await stip.aconnect(profile) as connection, await connection.session(max_positions=99) as session:
        asked = session.generate(
            [5, 6], max_tokens=3, temperature=0.5, top_k=40, top_p=0.75, seed=2**64 - 1, stop_ids=[7, 9], drafts=7
        )
        await said(asked)
        assert session.last.finish_reason is FinishReason.LENGTH
        assert session.last.seed == 2**64 - 1
    sampling = enclave.turns[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 40, 0.75)
    assert (sampling.seed, sampling.max_tokens, ids_of(sampling.stop_ids)) == (2**64 - 1, 3, [7, 9])
    assert sampling.drafts == 7
    assert enclave.opens[0].max_positions == 99


async def test_nothing_is_guessed_ahead_unless_asked_for(enclave: Any, profile: Any):
    messages = [{"role": "user", "content": "Let there be light."}]
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        await said(session.generate([5]))
        await said(session.chat(messages))
        await said(session.chat([*messages, {"role": "user", "content": "And?"}], drafts=2))
    assert [turn.sampling.drafts for turn in enclave.turns] == [0, 0, 2]


async def test_a_seed_is_drawn_afresh_where_none_is_given(enclave: Any, profile: Any):
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        for _ in range(2):
            await said(session.generate([5], max_tokens=1))
    first, second = (turn.sampling.seed for turn in enclave.turns)
    assert first != second


async def test_several_turns_share_one_session_and_only_the_first_gets_special_tokens(
    enclave: Any, profile: Any, tokenizer: Any
):
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        assert await said(session.generate("And it")) == TEXT
        assert await said(session.generate(" was so")) == TEXT
    assert len(enclave.opens) == 1
    assert [ids_of(turn.ids) for turn in enclave.turns] == [
        tokenizer.encode("And it", special=True),
        tokenizer.encode(" was so", special=False),
    ]


async def test_a_conversation_sends_only_what_the_session_does_not_hold(enclave: Any, profile: Any, tokenizer: Any):
    messages = [{"role": "user", "content": "Let there be light."}]
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        answer = await said(session.chat(messages))
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
        await said(session.chat(messages))
    assert len(enclave.opens) == 1
    first, second = (ids_of(turn.ids) for turn in enclave.turns)
    whole = tokenizer.template.render(messages)
    assert first == tokenizer.encode("<s>Let there be light.", special=False)
    assert second == tokenizer.encode("\nAnd then?", special=False)
    assert whole == "<s>Let there be light." + answer + "\nAnd then?"


async def test_a_conversation_that_was_edited_starts_a_session_afresh(enclave: Any, profile: Any, tokenizer: Any):
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        await said(session.chat([{"role": "user", "content": "Let there be light."}]))
        await said(session.chat([{"role": "user", "content": "Let there be dark."}]))
    assert len(enclave.opens) == 2
    assert ids_of(enclave.turns[1].ids) == tokenizer.encode("<s>Let there be dark.", special=False)
    assert len(set(enclave.request_ids)) == 2


async def test_cancel_stops_the_turn_and_keeps_the_session(enclave: Any, profile: Any):
    enclave.hold_after = 2
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        seen = []
        async for chunk in session.generate("In the beginning"):
            seen.append(chunk.id)
            if len(seen) == 2:
                await session.cancel()
        assert seen == enclave.answers[0][:2]
        assert session.last.finish_reason == "cancelled"
        enclave.hold_after = None
        assert await said(session.generate(" again")) == TEXT
    assert len(enclave.opens) == 1


async def test_leaving_the_stream_early_cancels_the_turn(enclave: Any, profile: Any):
    enclave.hold_after = 2
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        async for _ in session.generate("In the beginning"):
            break
        enclave.hold_after = None
        assert await said(session.generate(" again")) == TEXT
    assert len(enclave.opens) == 1


async def test_a_new_turn_ends_one_that_still_runs(enclave: Any, profile: Any):
    enclave.hold_after = 2
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        first = session.generate("In the beginning")
        await anext(first)
        enclave.hold_after = None
        second = session.generate(" again")
        assert (await anext(second)).id == enclave.answers[0][0]
        await said(first)
        assert session.last is None
        await said(second)
        assert session.last.finish_reason == "stop"


async def test_a_turn_out_of_time_is_cancelled_and_the_session_stays(enclave: Any, profile: Any):
    enclave.hold_after = 1
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        with pytest.raises(DeadlineExceeded):
            await said(session.generate("In the beginning", timeout=0.2))
        assert session.last.finish_reason == "cancelled"
        enclave.hold_after = None
        assert await said(session.generate(" again", timeout=30)) == TEXT


async def test_an_enclave_that_ignores_cancel_loses_the_session(
    enclave: Any, profile: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stip.session.SETTLE_SECONDS", 0.2)
    enclave.hold_after, enclave.deaf = 1, True
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        with pytest.raises(DeadlineExceeded):
            await said(session.generate("In the beginning", timeout=0.2))
        with pytest.raises(DeadlineExceeded):
            await said(session.generate(" again"))
        with pytest.raises(Cancelled):
            await said(session.generate(" again"))


async def test_two_sessions_of_one_connection_run_side_by_side(enclave: Any, profile: Any):
    async with (
        await stip.aconnect(profile) as connection,
        await connection.session() as one,
        await connection.session() as two,
    ):
        assert await asyncio.gather(said(one.generate("a")), said(two.generate("b"))) == [TEXT, TEXT]
    assert len(enclave.nonces) == 1
    assert len({open_.delegation for open_ in enclave.opens}) == 1


async def test_the_delegation_names_the_verified_enclave_and_is_short(enclave: Any, profile: Any):
    from stip import keys

    async with await stip.aconnect(profile) as connection, await connection.session():
        document = connection.verification
    key = keys.load(profile.user_key)
    delegation = Signed.from_bytes(enclave.opens[0].delegation).open(Delegation, key.private.public_key())
    assert delegation.user == key.public
    assert delegation.enclave_key == enclave.identity.spki_sha256 == document.enclave_key
    assert delegation.measurement == bytes(range(32)) == document.measurement
    assert delegation.expires - document.at == 3600
    assert enclave.opens[0].instance == profile.instance == delegation.instance


async def test_a_refusal_of_the_enclave_keeps_its_code_and_ends_the_session(enclave: Any, profile: Any):
    enclave.turn_fails = ("budget_spent", "budget: spent")
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        for _ in range(2):
            with pytest.raises(BudgetSpent):
                await said(session.generate("In the beginning"))
        assert session.last is None
    assert len(enclave.turns) == 1


async def test_opening_is_retried_twice_where_the_enclave_says_retry(enclave: Any, profile: Any):
    enclave.opens_fail = [Overloaded("full"), Overloaded("full")]
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        assert await said(session.generate("In the beginning")) == TEXT
    assert len(enclave.opens) == 3


async def test_opening_gives_up_after_the_third_attempt(enclave: Any, profile: Any):
    enclave.opens_fail = [Overloaded("full")] * 4
    async with await stip.aconnect(profile) as connection:
        with pytest.raises(Overloaded):
            await connection.session()
    assert len(enclave.opens) == 3


async def test_a_refused_delegation_is_not_retried(enclave: Any, profile: Any):
    enclave.opens_fail = [DelegationRefused("no")]
    async with await stip.aconnect(profile) as connection:
        with pytest.raises(DelegationRefused):
            await connection.session()
    assert len(enclave.opens) == 1


async def test_a_turn_is_never_sent_twice(enclave: Any, profile: Any):
    enclave.turn_fails = ("replica_lost", "gone")
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        with pytest.raises(stip.Unavailable):
            await said(session.generate("In the beginning"))
    assert len(enclave.turns) == 1


async def test_after_a_failed_turn_a_conversation_goes_on_in_a_new_session_where_the_caller_asks(
    enclave: Any, profile: Any
):
    enclave.turn_fails = ("replica_lost", "gone")
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        messages = [{"role": "user", "content": "Let there be light."}]
        with pytest.raises(stip.Unavailable):
            await said(session.chat(messages))
        enclave.turn_fails = None
        assert await said(session.chat(messages)) == TEXT
        await session.close()
        with pytest.raises(Cancelled):
            await said(session.chat(messages))
    assert len(enclave.opens) == 2


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([], {}),
        ([5, 2048], {}),
        ([-1], {}),
        ([True], {}),
        (["5"], {}),
        ([5], {"max_tokens": 0}),
        ([5], {"temperature": -1.0}),
        ([5], {"temperature": float("nan")}),
        ([5], {"top_k": -1}),
        ([5], {"top_p": 0.0}),
        ([5], {"top_p": 1.5}),
        ([5], {"seed": 2**64}),
        ([5], {"drafts": -1}),
        ([5], {"drafts": 8}),
        ([5], {"stop_ids": [2048]}),
        ([5], {"stop_ids": [5] * 2000}),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_bad_request_is_refused_before_anything_is_sent(enclave: Any, profile: Any, prompt: Any, options: Any):
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        with pytest.raises(RequestInvalid):
            session.generate(prompt, **options)
    assert enclave.turns == []


async def test_a_prompt_beyond_the_positions_is_refused_with_both_numbers(enclave: Any, profile: Any):
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        with pytest.raises(PositionRefused, match="257 ids at position 0, allowed: at most 256"):
            session.generate([5] * 257)
    assert enclave.turns == []


async def test_messages_of_another_form_are_refused_without_quoting_them(enclave: Any, profile: Any):
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        for messages in ([], [{"role": "user"}], ["zebra"]):
            with pytest.raises(RequestInvalid) as caught:
                session.chat(messages)
            assert "zebra" not in str(caught.value)


def step(**fields: int) -> enclave_pb2.Step:
    return enclave_pb2.Step(**{"id": 0, "kind": 0, "position": 1, **fields})


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        ([step(kind=9)], FrameInvalid),
        ([step(id=2048)], FrameInvalid),
        ([step(id=5)] * 4, FrameInvalid),
        ([step(kind=1), step(id=5)], FrameInvalid),
    ],
    ids=["unknown kind", "id outside of the vocabulary", "more than max_tokens", "a step after the end"],
)
async def test_an_enclave_that_breaks_the_protocol_ends_the_session(enclave: Any, profile: Any, steps: Any, kind: Any):
    enclave.steps = lambda ids: steps
    async with await stip.aconnect(profile) as connection, await connection.session() as session:
        if len(steps) == 2:  # the turn itself is fine; what follows it is not
            await said(session.generate([5], max_tokens=3))
            await asyncio.wait([session._stream._reader])
        with pytest.raises(kind):
            await said(session.generate([5], max_tokens=3))


async def test_a_session_of_another_vocabulary_is_refused(enclave: Any, profile: Any):
    enclave.opened = {"vocabulary": 99}
    async with await stip.aconnect(profile) as connection:
        with pytest.raises(ManifestMismatch):
            await connection.session()


async def test_an_enclave_that_calls_itself_simulated_must_have_been_verified_as_such(enclave: Any, profile: Any):
    from dataclasses import replace

    async with await stip.aconnect(profile) as connection:
        connection._enclave = replace(
            connection._enclave, verification=replace(connection.verification, simulated=False)
        )
        with pytest.raises(SimulatedEvidenceRefused):
            await connection.session()


async def test_a_closed_connection_takes_no_session(profile: Any):
    connection = await stip.aconnect(profile)
    session = await connection.session()
    await connection.close()
    await connection.close()
    with pytest.raises(Cancelled):
        await connection.session()
    with pytest.raises(Cancelled):
        await said(session.generate([5]))


def test_the_synchronous_surface_streams_and_cancels_from_another_thread(enclave: Any, profile: Any):
    with stip.connect(profile) as connection:
        assert connection.verification.verified
        with connection.session() as session:
            assert "".join(chunk.text for chunk in session.generate("In the beginning")) == TEXT
            assert session.last.finish_reason == "stop"
            enclave.hold_after = 2
            seen = []
            for chunk in session.generate(" again"):
                seen.append(chunk.id)
                if len(seen) == 2:
                    threading.Thread(target=session.cancel).start()
            assert session.last.finish_reason == "cancelled"
            enclave.hold_after = None
            for _ in session.generate(" again"):
                break
            assert "".join(chunk.text for chunk in session.chat([{"role": "user", "content": "x"}])) == TEXT


def test_the_two_surfaces_have_the_same_names():
    for plain, asynchronous in ((stip.Connection, stip.AsyncConnection), (stip.Session, stip.AsyncSession)):
        names = {name for name in dir(plain) if not name.startswith("_")}
        assert names <= {name for name in dir(asynchronous) if not name.startswith("_")}


def test_chunks_and_completions_do_not_show_content():
    assert repr(stip.Chunk("zebra", 77)) == "Chunk()"
