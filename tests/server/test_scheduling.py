"""Turns, slots and the gather window: pure bookkeeping, with the time passed in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stip_server.engine import Card, Form, Slice
from stip_server.engines.transformers.cache import Placement, SlotCache
from stip_server.engines.transformers.gather import RETURN_LIMIT, GatherWindow
from stip_server.engines.transformers.scheduler import Batch, Scheduler
from stip_server.engines.transformers.sequence import Sequence
from stip_server.engines.transformers.slots import SlotTable
from stip_server.frames import EXPONENT, is_finite

CARD = Card("0" * 32, 0, b"", "plain", "float32", 1, 0, 1000, 8, (Form.HIDDEN,))


def scheduler(window: float = 0.01, chunk: int = 4) -> Scheduler:
    return Scheduler(CARD, prefill_chunk=chunk, window=window, idle=60)


def feed(plan: Scheduler, name: int, position: int, count: int, now: float) -> None:
    plan.feed(Slice((1, bytes([name])), position, count, 1, bytes(4 * count)), now)


def start(plan: Scheduler, name: int, rows: int, now: float = 0.0) -> None:
    plan.open((1, bytes([name])), max_positions=1000, output=Form.HIDDEN, now=now)
    feed(plan, name, 0, rows, now)


def finish(plan: Scheduler, batch: Batch, now: float) -> None:
    plan.computed(batch, seconds=0.1, now=now)
    for work in batch.work:
        if work.outputs and plan.is_open(work.sequence):
            work.sequence.answer(now)


def names(batch: Batch) -> list[tuple[int, int]]:
    return [(work.sequence.session[1][0], work.count) for work in batch.work]


def test_a_lone_session_never_waits() -> None:
    plan = scheduler()
    start(plan, 1, 1)
    assert plan.patience(0.0) == 0.0
    finish(plan, plan.next(0.0), 0.1)
    assert plan.patience(0.1) is None
    feed(plan, 1, 1, 1, 0.102)
    assert plan.patience(0.102) == 0.0


def test_a_step_waits_for_the_sessions_that_are_about_to_return_and_no_longer() -> None:
    plan = scheduler(window=0.01)
    for name in (1, 2, 3):
        start(plan, name, 1)
    batch = plan.next(0.0)
    assert names(batch) == [(1, 1), (2, 1), (3, 1)]
    finish(plan, batch, 1.0)
    feed(plan, 1, 1, 1, 1.002)
    wait = plan.patience(1.002)
    assert wait is not None
    assert 0 < wait <= 0.01
    feed(plan, 2, 1, 1, 1.003)
    assert plan.patience(1.003) != 0
    feed(plan, 3, 1, 1, 1.004)
    assert plan.patience(1.004) == 0.0
    assert len(plan.next(1.004).work) == 3


def test_nobody_waits_for_a_session_that_stays_away() -> None:
    plan = scheduler(window=0.01)
    for name in (1, 2):
        start(plan, name, 1)
    finish(plan, plan.next(0.0), 1.0)
    feed(plan, 1, 1, 1, 1.001)
    finish(plan, plan.next(1.02), 1.1)
    feed(plan, 1, 2, 1, 1.101)
    assert plan.patience(1.101) == 0.0


@given(st.lists(st.floats(0, 3), min_size=1, max_size=50), st.floats(0, 0.1))
def test_the_wait_never_exceeds_the_window(returns: list[float], window: float) -> None:
    gather = GatherWindow(window)
    for seconds in returns:
        gather.link(1).observe(seconds)
    assert gather.patience([(1, 10.0)], ready=10.0, now=10.0) <= window * 1.000001 + 1e-9
    assert gather.patience([(1, 10.0)], ready=10.0, now=10.0 + window) <= 1e-9
    assert gather.patience([], ready=10.0, now=10.0) == 0.0


def test_the_window_follows_the_observed_return_times() -> None:
    link = GatherWindow(1.0).link(1)
    assert link.expected == 1.0
    for _ in range(100):
        link.observe(0.002)
    assert 0.002 <= link.expected < 0.003
    link.observe(RETURN_LIMIT * 10)
    assert link.expected < 0.003
    for _ in range(100):
        link.observe(0.2)
    assert link.expected == pytest.approx(0.2, rel=0.05)


def test_a_step_waits_half_a_step_at_most() -> None:
    gather = GatherWindow(1.0)
    gather.link(1).observe(0.004)
    gather.stepped(0.04)
    assert 0 < gather.patience([(1, 10.0)], ready=10.0, now=10.0) <= 0.02
    assert gather.patience([(1, 10.0)], ready=10.0, now=10.021) == 0.0


def test_nobody_waits_for_sessions_that_usually_take_longer_than_the_wait_may_last() -> None:
    gather = GatherWindow(1.0)
    gather.stepped(0.04)
    for _ in range(100):
        gather.link(1).observe(0.03)
    assert gather.patience([(1, 10.0)], ready=10.0, now=10.0) == 0.0
    assert gather.patience([(1, 9.985)], ready=10.0, now=10.0) > 0.0


def test_a_link_far_away_neither_makes_others_wait_nor_shortens_the_wait_for_a_near_one() -> None:
    gather = GatherWindow(1.0)
    gather.stepped(0.04)
    for _ in range(100):
        gather.link(1).observe(0.002)
        gather.link(2).observe(0.3)
    near = gather.patience([(1, 10.0)], ready=10.0, now=10.0)
    assert 0.002 <= near < 0.003
    assert gather.patience([(2, 10.0)], ready=10.0, now=10.0) == 0.0
    assert gather.patience([(1, 10.0), (2, 10.0)], ready=10.0, now=10.0) == near
    gather.forget(1)
    assert gather.link(1).expected == 1.0


def test_alternating_half_batches_find_together() -> None:
    plan, now = scheduler(window=0.05), 0.0
    for name in range(1, 5):
        start(plan, name, 1)
    halves: list[Batch] = []
    batch = plan.next(now)
    position = dict.fromkeys(range(1, 5), 1)
    # The first two return at once and are stepped alone: nothing is known of how long a return takes.
    finish(plan, batch, now := 0.1)
    back = [(0.101, 1), (0.101, 2), (0.16, 3), (0.16, 4)]
    for _ in range(6):
        while (wait := plan.patience(now)) is None or wait > 0:
            later = min((at for at, _ in back), default=now + 1)
            now = max(now, later) if wait is None else min(now + wait, max(now, later))
            for at, name in [each for each in back if each[0] <= now]:
                feed(plan, name, position[name], 1, at)
                position[name] += 1
                back.remove((at, name))
        batch = plan.next(now)
        halves.append(batch)
        ends = now + 0.1
        for at, name in [each for each in back if each[0] <= ends]:
            feed(plan, name, position[name], 1, at)
            position[name] += 1
            back.remove((at, name))
        finish(plan, batch, now := ends)
        back += [(now + 0.005, work.sequence.session[1][0]) for work in batch.work]
    assert len(halves[0].work) == 2
    assert [len(batch.work) for batch in halves[-3:]] == [4, 4, 4]


def test_prompts_take_turns_with_running_sessions_and_with_each_other() -> None:
    plan = scheduler(chunk=4)
    start(plan, 1, 1)
    start(plan, 2, 9)
    start(plan, 3, 6)
    seen, position = [], 1
    for step in range(7):
        assert plan.patience(float(step)) == 0.0
        batch = plan.next(float(step))
        seen.append(names(batch))
        finish(plan, batch, step + 0.5)
        if (1, 1) in seen[-1]:
            feed(plan, 1, position, 1, step + 0.5)
            position += 1
    assert seen[:5] == [[(2, 4)], [(1, 1)], [(3, 4)], [(1, 1)], [(2, 4)]]
    # The last row of the second prompt joins the running session's step.
    assert sorted(seen[5]) == [(1, 1), (2, 1)]
    assert seen[6] == [(3, 2)]


@given(st.lists(st.integers(0, 11), max_size=60))
def test_active_slots_stay_contiguous_and_rows_stay_with_their_session(choices: list[int]) -> None:
    table, held = SlotTable(), dict[int, Sequence]()
    shape = (12, 1, 6, 1)
    cache = SlotCache(1, shape, torch.float32, torch.device("cpu"))
    layer: Any = cache.layers[0]
    for name in choices:
        if name in held:
            cache.vacate([table.leave(held.pop(name))])
        else:
            held[name] = Sequence((1, bytes([name])), 6, Form.HIDDEN, 0.0)
            table.assign(held[name])
            rows = 1 + name % 6
            states = torch.full((1, 1, rows, 1), float(name + 1))
            slot = held[name].slot
            cache.place(Placement(slot, slot + 1, 0, rows, rows))
            layer.update(states, states)
            held[name].written = rows
        assert len(table) == len(held)
        assert sorted(s.slot for s in held.values()) == list(range(len(held)))
        expected = torch.zeros(shape)
        for name_, sequence in held.items():
            expected[sequence.slot, :, : sequence.written] = name_ + 1
        assert torch.equal(layer.keys, expected)
        assert torch.equal(layer.values, expected)


@pytest.mark.parametrize("dtype", sorted(EXPONENT))
@given(data=st.data())
def test_finite_means_what_ieee_754_says(dtype: str, data: st.DataObject) -> None:
    carrier = EXPONENT[dtype][0]
    size = np.dtype(carrier).itemsize
    raw = data.draw(st.binary(max_size=16 * size).map(lambda b: b[: len(b) // size * size]))
    edge = data.draw(st.sampled_from([b"", EXPONENT[dtype][1].to_bytes(size, "little"), b"\xff" * size]))
    rows = raw + edge
    expected = torch.frombuffer(bytearray(rows), dtype=getattr(torch, dtype)).isfinite().all() if rows else True
    assert is_finite(rows, dtype) is bool(expected)


@pytest.mark.parametrize("form", [Form.HIDDEN, Form.IDS])
def test_a_session_that_waits_keeps_its_own_rows_and_nothing_else_of_their_frame(form: Form) -> None:
    frame, session = bytearray(4096), Sequence((1, b"\x01"), 100, form, 0.0)
    card = Card("0" * 32, 0, b"", "plain", "float32", 1, 100, 100, 8, (form,))
    rows = memoryview(frame)[:4]
    session.accept(Slice(session.session, 0, 1, 0, rows), card, 0.0)
    rows.release()
    del frame[4:]  # raises BufferError where somebody still looks at it


def test_a_prompt_that_took_longer_than_sessions_may_idle_does_not_end_with_its_last_step() -> None:
    plan, session = scheduler(chunk=1), (1, b"\x01")
    plan.open(session, max_positions=1000, output=Form.HIDDEN, now=0.0)
    plan.feed(Slice(session, 0, 2, 0, bytes(8)), 0.0)
    for now in (50.0, 100.0):
        finish(plan, plan.next(now - 50.0), now)
    assert plan.idle(101.0) == []
    assert [ended for ended, _ in plan.idle(161.0)] == [session]
