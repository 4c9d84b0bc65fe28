"""Who is let in, whose turn it is, and how much may wait: pure bookkeeping, with the time passed in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stip_protocol.errors import Overloaded
from stip_server.engine import Card, Form, Generation, Slice
from stip_server.engines.admission import RETRY_LEAST, RETRY_MOST, Admission
from stip_server.engines.transformers import scheduler as scheduling
from stip_server.engines.transformers.scheduler import Batch, Scheduler

CARD = Card("0" * 32, 0, b"", "plain", "float32", 1, 100, 1000, 8, (Form.HIDDEN, Form.IDS), max_outputs=8)
A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def test_an_account_alone_may_hold_everything() -> None:
    admission = Admission(sessions=16, positions=1600)
    for _ in range(16):
        admission.enter(A, 100, 0.0)
    with pytest.raises(Overloaded, match="sessions: got 16 of 16 taken"):
        admission.enter(A, 100, 0.0)


def test_whoever_is_turned_away_gets_the_next_place_and_not_the_account_that_held_everything() -> None:
    admission = Admission(sessions=16, positions=1600)
    for _ in range(16):
        admission.enter(A, 100, 0.0)
    with pytest.raises(Overloaded):
        admission.enter(B, 100, 1.0)
    admission.leave(A, 100, 2.0)
    with pytest.raises(Overloaded):
        admission.enter(A, 100, 2.0)
    admission.enter(B, 100, 2.0)


def test_an_account_that_asked_long_ago_is_not_waited_for() -> None:
    admission = Admission(sessions=2, positions=200)
    for _ in range(2):
        admission.enter(A, 100, 0.0)
    with pytest.raises(Overloaded):
        admission.enter(B, 100, 1.0)
    admission.leave(A, 100, 2.0)
    with pytest.raises(Overloaded):
        admission.enter(A, 100, 2.0)
    admission.enter(A, 100, 2.0 + RETRY_MOST)


@pytest.mark.parametrize("accounts", [2, 3, 5])
def test_the_shares_of_accounts_that_all_want_everything_become_equal(accounts: int) -> None:
    admission, held, now = Admission(sessions=16, positions=1600), {bytes([n]): 0 for n in range(accounts)}, 0.0
    for round_ in range(100):
        for account in held if round_ else [b"\x00"]:
            for _ in range(16):
                try:
                    admission.enter(account, 100, now)
                    held[account] += 1
                except Overloaded:
                    break
        assert sum(held.values()) == 16  # nothing stays unused
        now += 1.0
        largest = max(held, key=lambda account: held[account])
        admission.leave(largest, 100, now)
        held[largest] -= 1
    assert max(held.values()) - min(held.values()) <= 1


def test_an_account_that_asks_again_and_again_is_told_to_wait_longer_and_nobody_else_is() -> None:
    admission = Admission(sessions=1, positions=100)
    admission.enter(A, 100, 0.0)
    said = [told(admission, B) for _ in range(20)]
    assert said == [pytest.approx(float(n)) for n in range(1, 21)]
    assert told(admission, C) == pytest.approx(2.0)


def told(admission: Admission, account: bytes) -> float:
    with pytest.raises(Overloaded) as error:
        admission.enter(account, 100, 0.0)
    assert error.value.retry_after is not None
    return error.value.retry_after


def test_what_nobody_else_waits_for_is_free_for_all() -> None:
    admission = Admission(sessions=16, positions=1600)
    admission.enter(B, 100, 0.0)
    for _ in range(15):
        admission.enter(A, 100, 0.0)
    with pytest.raises(Overloaded):
        admission.enter(A, 100, 0.0)
    admission.leave(A, 100, 1.0)
    admission.enter(B, 100, 1.0)


def test_positions_are_bounded_like_sessions() -> None:
    admission = Admission(sessions=16, positions=100)
    admission.enter(A, 90, 0.0)
    with pytest.raises(Overloaded, match="positions") as refused:
        admission.enter(A, 11, 0.0)
    assert refused.value.field == "positions"
    admission.enter(B, 10, 0.0)


@given(st.lists(st.floats(0, 1000), max_size=30), st.integers(1, 200))
def test_what_is_said_about_trying_again_is_bounded(gaps: list[float], refusals: int) -> None:
    admission, now = Admission(sessions=1, positions=10), 0.0
    for gap in gaps:
        admission.enter(A, 10, now)
        now += gap
        admission.leave(A, 10, now)
    admission.enter(A, 10, now)
    for _ in range(refusals):
        with pytest.raises(Overloaded) as refused:
            admission.enter(B, 1, now)
        assert refused.value.retry_after is not None
        assert RETRY_LEAST <= refused.value.retry_after <= RETRY_MOST


def test_what_is_said_follows_how_fast_sessions_end_and_spreads_those_who_return() -> None:
    admission, said = Admission(sessions=1, positions=10), []
    for end in range(20):
        admission.enter(A, 10, end * 0.5)
        admission.leave(A, 10, end * 0.5 + 0.5)
    admission.enter(A, 10, 10.0)
    for account in (B, C, B):
        with pytest.raises(Overloaded) as refused:
            admission.enter(account, 10, 10.0)
        said.append(refused.value.retry_after)
    assert said == pytest.approx([0.5, 1.0, 1.5])


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(1, 40), st.booleans()), max_size=80))
def test_the_bounds_hold_whatever_is_asked(asked: list[tuple[bytes, int, bool]]) -> None:
    admission, held = Admission(sessions=5, positions=100), list[tuple[bytes, int]]()
    for now, (account, positions, leaves) in enumerate(asked):
        if leaves and held:
            admission.leave(*held.pop(0), float(now))
            continue
        try:
            admission.enter(account, positions, float(now))
            held.append((account, positions))
        except Overloaded:
            full = len(held) == 5 or sum(p for _, p in held) + positions > 100
            assert full or any(owner == account for owner, _ in held)  # who holds nothing gets what is free
        assert len(held) <= 5
        assert sum(p for _, p in held) <= 100


def plan(chunk: int = 4) -> Scheduler:
    return Scheduler(CARD, prefill_chunk=chunk, window=0.0, idle=60)


def start(planned: Scheduler, name: int, account: bytes, rows: int, outputs: int = 1) -> None:
    session = (1, bytes([name]))
    planned.open(session, max_positions=1000, output=Form.HIDDEN, account=account, now=0.0)
    planned.feed(Slice(session, 0, rows, outputs, bytes(4 * rows)), 0.0)


def finish(planned: Scheduler, batch: Batch) -> None:
    planned.computed(batch, seconds=0.1, now=1.0)
    for work in batch.work:
        if work.outputs:
            work.sequence.answer(1.0)


def names(batch: Batch) -> list[int]:
    return [work.sequence.session[1][0] for work in batch.work]


def test_prompts_of_an_account_with_many_sessions_do_not_hold_up_another_account() -> None:
    planned, order = plan(), []
    for name in range(1, 5):
        start(planned, name, A, 40)
    start(planned, 9, B, 12)
    for _ in range(6):
        batch = planned.next(0.0)
        order += names(batch)
        finish(planned, batch)
    assert order == [1, 9, 2, 9, 3, 9]


def test_closing_and_opening_again_wins_no_turn() -> None:
    planned, order = plan(), []
    start(planned, 1, A, 40)
    for name in range(2, 8):
        start(planned, name, B, 40)
        batch = planned.next(0.0)
        order += names(batch)
        finish(planned, batch)
        planned.close((1, bytes([name])), 0.0)
    assert order.count(1) >= 3


def test_several_drafts_of_several_sessions_are_one_step() -> None:
    planned = plan()
    for name, rows in ((1, 1), (2, 3), (3, 4)):
        start(planned, name, A, rows, outputs=rows)
    assert [(w.count, w.outputs) for w in planned.next(0.0).work] == [(1, 1), (3, 3), (4, 4)]


def test_a_step_that_padding_would_blow_up_is_split_and_the_oldest_goes_first() -> None:
    planned = plan()
    for name in range(1, 8):
        start(planned, name, A, 1)
    start(planned, 8, A, 8, outputs=8)
    first = planned.next(0.0)
    assert names(first) == [1, 2, 3, 4, 5, 6, 7]
    finish(planned, first)
    assert names(planned.next(0.0)) == [8]


@pytest.mark.parametrize(("rows", "outputs", "chunk"), [(20, 8, 4), (70, 8, 64), (9, 8, 1), (3, 2, 64), (64, 1, 64)])
def test_the_rows_that_are_answered_stay_in_one_step(rows: int, outputs: int, chunk: int) -> None:
    planned, steps = plan(chunk), []
    start(planned, 1, A, rows, outputs)
    while planned.patience(0.0) == 0.0:
        batch = planned.next(0.0)
        steps.append((batch.work[0].count, batch.work[0].outputs))
        finish(planned, batch)
    assert sum(count for count, _ in steps) == rows
    assert [answered for _, answered in steps] == [0] * (len(steps) - 1) + [outputs]
    assert all(count <= max(chunk, outputs) for count, _ in steps)


def test_a_session_that_leaves_is_wiped_as_far_as_it_ever_wrote() -> None:
    planned, session = plan(), (1, b"\x01")
    start(planned, 1, A, 4, outputs=4)
    finish(planned, planned.next(0.0))
    planned.feed(Slice(session, 1, 1, 1, bytes(4), back=3), 0.0)
    finish(planned, planned.next(0.0))
    start(planned, 2, A, 1)
    finish(planned, planned.next(0.0))
    planned.close(session, 0.0)
    planned.feed(Slice((1, b"\x02"), 1, 1, 1, bytes(4)), 0.0)
    (move,) = planned.next(0.0).moves
    assert (move.slot, move.source, move.rows, move.moved) == (0, 1, 4, 1)


def test_rows_that_wait_are_bounded_for_a_link_and_room_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "BACKLOG", 0)  # what is left is twice the largest session: 8,000 bytes
    planned = plan(chunk=1000)
    start(planned, 1, A, 1000)
    start(planned, 2, A, 1000)
    planned.open((1, b"\x03"), max_positions=1000, output=Form.HIDDEN, now=0.0)
    planned.open((2, b"\x03"), max_positions=1000, output=Form.HIDDEN, now=0.0)
    row = Slice((1, b"\x03"), 0, 1, 1, bytes(4))
    with pytest.raises(Overloaded, match="waiting on this link") as refused:
        planned.feed(row, 0.0)
    assert refused.value.retry_after is not None
    planned.feed(Slice((2, b"\x03"), 0, 1, 1, bytes(4)), 0.0)
    planned.close((1, b"\x01"), 0.0)
    planned.feed(row, 0.0)
    finish(planned, planned.next(0.0))


def test_a_prompt_of_ids_goes_ahead_in_whole_chunks_and_waits_for_its_generation() -> None:
    planned, session = plan(chunk=4), (1, b"\x01")
    planned.open(session, max_positions=100, output=Form.IDS, now=0.0)
    planned.feed(Slice(session, 0, 9, 0, bytes(36)), 0.0)
    counts = []
    for _ in range(2):
        assert planned.patience(0.0) == 0.0
        batch = planned.next(0.0)
        counts += [(w.count, w.outputs) for w in batch.work]
        planned.computed(batch, seconds=0.1, now=0.0)
    assert counts == [(4, 0), (4, 0)]
    assert planned.patience(0.0) is None
    assert planned.next_idle(0.0) == 60
    planned.generate(session, Generation(9, 3, frozenset()), 0.0)
    assert [(w.count, w.outputs) for w in planned.next(0.0).work] == [(1, 1)]


def test_who_decodes_alone_waits_for_nobody() -> None:
    planned = Scheduler(CARD, prefill_chunk=4, window=0.5, idle=60)
    start(planned, 1, A, 1)
    finish(planned, planned.next(0.0))
    session = (2, b"\x01")
    planned.open(session, max_positions=100, output=Form.IDS, now=1.0)
    planned.feed(Slice(session, 0, 1, 0, bytes(4)), 1.0)
    planned.generate(session, Generation(1, 3, frozenset()), 1.0)
    assert planned.patience(1.0) == 0.0
