"""What a lease admits: rows, and outputs since its user was last confirmed. Nothing here believes a clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stip_enclave import lease as lease_module
from stip_enclave.lease import LeaseAccount
from stip_protocol.errors import BudgetSpent, LeaseExpired, LeaseRevoked, StipError, Unavailable, UserRefused

Leases = Callable[..., tuple[LeaseAccount, Any]]


class Holder:
    """A session that notes what it is told."""

    def __init__(self, account: LeaseAccount) -> None:
        self.account, self.errors, self.leases, self.resumed = account, [], [], asyncio.Event()
        account.join(self)

    def lease_renewed(self, signed: bytes) -> None:
        self.leases.append(signed)

    def failed(self, error: StipError) -> None:
        self.errors.append(error.code)
        self.account.leave(self)
        self.resumed.set()

    def take(self, rows: int) -> int:
        self.resumed.clear()
        return self.account.take(rows, self, self.resumed.set)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RETRY_SECONDS", (0.001, 0.001))


async def settled(account: LeaseAccount) -> None:
    if account._task is not None:
        await account._task


async def test_rows_are_admitted_up_to_the_mark_and_a_renewal_raises_it(leases: Leases) -> None:
    account, service = leases(tokens=10, heartbeat_tokens=100, chunk=10)
    service.gate = asyncio.Event()
    holder = Holder(account)
    assert holder.take(25) == 10
    assert holder.take(15) == 0
    service.gate.set()
    await asyncio.wait_for(holder.resumed.wait(), 5)
    assert holder.leases == [b"lease 1"]
    assert (service.heartbeats[0].fed, service.heartbeats[0].wanted) == (10, 15)
    assert holder.take(15) == 15


async def test_a_renewal_runs_ahead_before_the_bound_is_reached(leases: Leases) -> None:
    account, service = leases(tokens=1000, heartbeat_tokens=8)
    holder = Holder(account)
    for _ in range(40):
        assert holder.take(1) == 1
        await settled(account)
    # The first at half of the bound; then, as an answer takes no output's time, at a quarter before it.
    assert len(service.heartbeats) == 1 + (40 - 4) // 6


async def test_a_slow_renewal_begins_earlier_the_next_time(leases: Leases) -> None:
    account, service = leases(tokens=1000, heartbeat_tokens=16)
    service.gate = asyncio.Event()
    holder = Holder(account)
    assert [holder.take(1) for _ in range(8)] == [1] * 8
    await asyncio.sleep(0)  # the heartbeat is made
    assert [holder.take(1) for _ in range(5)] == [1] * 5
    service.gate.set()
    await settled(account)
    beats = len(service.heartbeats)
    holder.take(1)
    await settled(account)
    assert len(service.heartbeats) == beats + 1


async def test_generation_stops_at_the_revocation_bound_until_a_heartbeat_is_answered(leases: Leases) -> None:
    account, service = leases(tokens=1000, heartbeat_tokens=8)
    service.gate = asyncio.Event()
    first, second = Holder(account), Holder(account)
    assert sum(holder.take(1) for _ in range(20) for holder in (first, second)) == 8
    service.gate.set()
    await asyncio.wait_for(first.resumed.wait(), 5)
    # Four outputs came after the heartbeat was made: they count against the next period already.
    assert sum(first.take(1) for _ in range(4)) == 4


async def test_a_refused_renewal_ends_every_session_of_the_lease(leases: Leases) -> None:
    account, service = leases(heartbeat_tokens=2)
    service.refusals = [UserRefused("removed")]
    holders = [Holder(account) for _ in range(3)]
    holders[0].take(1)
    await settled(account)
    assert [holder.errors for holder in holders] == [["user_refused"]] * 3
    with pytest.raises(UserRefused):
        Holder(account)
    assert holders[0].take(1) == 0


async def test_a_spent_budget_ends_who_needs_more_and_nobody_else(leases: Leases) -> None:
    account, service = leases(tokens=10, heartbeat_tokens=100, chunk=1)
    service.refusals = [BudgetSpent("spent")]
    greedy, modest = Holder(account), Holder(account)
    assert modest.take(2) == 2
    assert greedy.take(20) == 8
    await settled(account)
    assert greedy.errors == ["budget_spent"]
    assert modest.errors == []


async def test_a_budget_that_grants_no_more_is_not_asked_again_and_again(leases: Leases) -> None:
    account, service = leases(tokens=100, heartbeat_tokens=1000, chunk=100)
    service.grows = 0
    holder = Holder(account)
    for _ in range(100):
        assert holder.take(1) == 1
        await settled(account)
    assert len(service.heartbeats) == 1


async def test_a_lost_answer_is_asked_for_with_the_same_heartbeat(leases: Leases, hurried: None) -> None:
    account, service = leases(heartbeat_tokens=2)
    service.refusals = [Unavailable("away"), Unavailable("away")]
    holder = Holder(account)
    holder.take(1)
    await settled(account)
    assert holder.errors == []
    assert len({beat.to_bytes() for beat in service.heartbeats}) == 1 < len(service.heartbeats)


async def test_an_unreachable_key_service_fails_who_waits_and_may_be_back_later(leases: Leases, hurried: None) -> None:
    account, service = leases(heartbeat_tokens=2)
    service.refusals = [Unavailable("away")] * 3
    waiting, calm = Holder(account), Holder(account)
    assert [waiting.take(1) for _ in range(3)] == [1, 1, 0]
    await asyncio.wait_for(waiting.resumed.wait(), 5)
    assert (waiting.errors, calm.errors) == (["unavailable"], [])
    assert calm.take(1) == 0
    await asyncio.wait_for(calm.resumed.wait(), 5)
    assert calm.take(1) == 1


async def test_an_expired_lease_feeds_nothing_and_is_renewed_first(leases: Leases) -> None:
    now = [0.0]
    account, service = leases(expires=100, clock=lambda: now[0])
    holder = Holder(account)
    assert holder.take(1) == 1
    now[0] = 100.0
    assert holder.take(1) == 0
    await settled(account)
    # The renewal is expired too: then there is no hope, and no busy loop.
    assert holder.errors == ["lease_expired"]
    assert len(service.heartbeats) == 1
    with pytest.raises(LeaseExpired):
        await account.refresh()


async def test_a_defect_in_renewing_ends_the_sessions_without_its_text(leases: Leases) -> None:
    account, service = leases(heartbeat_tokens=2)
    service.refusals = [ValueError("the secret text")]
    holder = Holder(account)
    holder.take(1)
    await settled(account)
    assert holder.errors == ["internal"]


@given(st.integers(1, 20), st.lists(st.integers(1, 7), min_size=1, max_size=60))
def test_outputs_never_exceed_the_bound_while_no_heartbeat_is_answered(bound: int, wanted: list[int]) -> None:
    async def run() -> None:
        from stip_enclave.release import HeldLease
        from stip_protocol.lease import Lease

        class Silent:
            async def renew(self, held: HeldLease, heartbeat: Any) -> HeldLease:
                await asyncio.Event().wait()
                raise AssertionError

        lease = Lease(
            handle=bytes(16), serial=0, audience="a", instance="0" * 32, epoch=0, manifest_digest=bytes(32),
            link_key=bytes(32), not_before=0, expires=2**39, tokens=50, audit_head=bytes(32),
        )  # fmt: skip
        account = LeaseAccount(HeldLease(b"", lease, b""), Silent(), heartbeat_tokens=bound, chunk=10)
        holder = Holder(account)
        taken = [(rows, holder.take(rows)) for rows in wanted]
        assert sum(rows == got for rows, got in taken) <= bound
        assert sum(got for _, got in taken) <= 50
        await account.stop()

    asyncio.run(run())


async def test_several_outputs_count_towards_the_bound_and_unused_ones_are_returned(leases: Leases) -> None:
    account, _ = leases(tokens=100, heartbeat_tokens=8)
    holder = Holder(account)
    assert account.take(5, holder, holder.resumed.set, outputs=5) == 5
    assert account.spare() == 3
    account.returned(4, account.beats)
    assert account.spare() == 7
    assert account.take(90, holder, holder.resumed.set, outputs=1) == 90
    assert account.spare() == 5


@pytest.mark.parametrize("answered", [False, True])
async def test_what_is_returned_after_a_heartbeat_that_counted_it_admits_no_more(
    leases: Leases, answered: bool
) -> None:
    account, service = leases(tokens=1000, heartbeat_tokens=8)
    service.gate = asyncio.Event()
    holder, beat = Holder(account), account.beats
    assert account.take(5, holder, holder.resumed.set, outputs=5) == 5
    await asyncio.sleep(0)  # the heartbeat is made
    assert account.beats == beat + 1
    if answered:
        service.gate.set()
        await settled(account)
        service.gate.clear()
    account.returned(4, beat)
    if not answered:
        service.gate.set()
        await settled(account)
        service.gate.clear()
    # One token was given before: eight may be after the heartbeat, whatever was guessed around it.
    assert sum(holder.take(1) for _ in range(20)) == 8


async def test_rows_that_give_no_output_do_not_count_towards_the_bound(leases: Leases) -> None:
    account, _ = leases(tokens=100, heartbeat_tokens=2)
    holder = Holder(account)
    for _ in range(10):
        assert account.take(5, holder, holder.resumed.set, outputs=0) == 5
    assert account.spare() == 2


async def test_reserved_ids_are_taken_from_the_others_and_half_is_left_to_them(leases: Leases) -> None:
    account, service = leases(tokens=1000, heartbeat_tokens=100, chunk=1000)
    service.gate = asyncio.Event()
    holder = Holder(account)
    assert account.reserve(2000, holder, holder.resumed.set) == 500
    assert account.reserve(100, holder, holder.resumed.set) == 100
    assert account.reserve(2000, holder, holder.resumed.set) == 200
    assert holder.take(300) == 200
    assert account.reserve(1, holder, holder.resumed.set) == 0
    account.counted(400)
    account.released(100)
    assert account.reserve(1000, holder, holder.resumed.set) == 64


async def test_ids_that_went_astray_are_counted_once_when_the_gateway_says_so(leases: Leases) -> None:
    account, service = leases(tokens=100, heartbeat_tokens=100)
    service.gate = asyncio.Event()
    holder = Holder(account)
    assert account.settle() == 0
    assert account.reserve(60, holder, holder.resumed.set) == 60
    account.counted(10)
    account.forfeited(50)
    assert account.spare() == 90
    assert account.settle() == 50
    assert account.spare() == 40
    assert account.settle() == 0


async def test_ids_are_handed_on_up_to_the_bound_and_after_the_next_heartbeat(leases: Leases) -> None:
    account, service = leases(tokens=100, heartbeat_tokens=8)
    service.gate = asyncio.Event()
    holder = Holder(account)
    assert account.reserve(50, holder, holder.resumed.set) == 50
    account.counted(50)
    assert account.hand_on(5, holder, holder.resumed.set) == 5
    assert account.hand_on(45, holder, holder.resumed.set) == 3
    holder.resumed.clear()
    assert account.hand_on(42, holder, holder.resumed.set) == 0
    service.gate.set()
    await asyncio.wait_for(holder.resumed.wait(), 5)
    assert 0 < account.hand_on(42, holder, holder.resumed.set) <= 8


async def test_a_lease_that_has_ended_reserves_and_hands_on_nothing(leases: Leases) -> None:
    account, service = leases(tokens=100, heartbeat_tokens=4)
    service.refusals = [UserRefused("removed")]
    holder = Holder(account)
    assert holder.take(4) == 4
    assert account.hand_on(9, holder, holder.resumed.set) == 3
    await asyncio.wait_for(holder.resumed.wait(), 5)
    await settled(account)
    assert holder.errors == ["user_refused"]
    assert (account.reserve(5, holder, holder.resumed.set), account.hand_on(1, holder, holder.resumed.set)) == (0, 0)
    assert account.spare() == 0


async def test_a_lease_that_is_ended_fails_its_sessions_at_once_and_a_late_answer_changes_nothing(
    leases: Leases,
) -> None:
    account, service = leases(tokens=100, heartbeat_tokens=4)
    service.gate = asyncio.Event()
    holders = [Holder(account), Holder(account)]
    assert [holders[0].take(1) for _ in range(5)] == [1, 1, 1, 1, 0]
    await asyncio.sleep(0)  # the heartbeat is made
    account.end(LeaseRevoked("revoked"))
    account.end(UserRefused("a second reason"))
    assert [holder.errors for holder in holders] == [["lease_revoked"]] * 2
    service.gate.set()
    await settled(account)
    assert holders[0].leases == []
    assert account.take(1, holders[0], holders[0].resumed.set) == 0
    with pytest.raises(LeaseRevoked):
        Holder(account)
    with pytest.raises(LeaseRevoked):
        await account.refresh()


async def test_a_lease_in_use_is_confirmed_on_demand_and_an_idle_one_is_not(leases: Leases) -> None:
    account, service = leases(tokens=1000, heartbeat_tokens=1000)
    account.confirm()
    assert service.heartbeats == []
    Holder(account)
    account.confirm()
    await settled(account)
    assert len(service.heartbeats) == 1
    assert account.ended is None
