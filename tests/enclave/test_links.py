"""One link a replica: where sessions are placed, and what happens when replicas come and go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import generate_latest

from stip_enclave import links
from stip_enclave.config import Limits
from stip_protocol.errors import LeaseForeign, Overloaded, PositionRefused, ReplicaLost, StipError
from stip_protocol.wire import model_pb2
from tests.enclave.bench import stranding, until
from tests.enclave.replica import Sequence

PROMPT = [5, 17, 3]
THREE = ("one", "two", "three")


def counts(made: Any) -> list[int]:
    return [len(replica.sessions) for replica in made.front.replicas]


async def test_sessions_spread_over_the_replicas_on_one_link_each(bench: Any) -> None:
    made = await bench(replicas=THREE)
    await asyncio.gather(*(made.session() for _ in range(9)))
    assert counts(made) == [3, 3, 3]
    assert [replica.links for replica in made.front.replicas] == [1, 1, 1]
    assert made.front.described == 1 + 3


async def test_what_others_have_on_a_replica_counts_as_its_load(bench: Any) -> None:
    made = await bench(replicas=("one", "two"))
    busy, free = made.front.replicas
    for number in range(6):  # of other enclaves
        busy.sessions[bytes([number])] = Sequence()
    for _ in range(6):  # after the first two, both have said how many they hold
        await made.session()
    assert len(free.opened) == 5
    assert len(busy.opened) == 1


async def test_a_replica_that_hangs_keeps_nobody_waiting(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "GRACE_SECONDS", 0.01)
    made = await bench(replicas=("one", "two"))
    hanging, free = made.front.replicas
    made.front.hanging = {hanging.name}
    talk = await asyncio.wait_for(made.session(), 5)
    talk.begin(PROMPT, max_tokens=3)
    assert await talk.rest() == (made.toy.generate(PROMPT, 3), 2)
    assert (hanging.links, free.links) == (0, 1)


async def test_a_gateway_that_does_not_answer_is_waited_for_in_bounds(bench: Any) -> None:
    made = await bench(limits=Limits(open_seconds=0.2))
    made.front.hanging = {""}
    with pytest.raises(StipError) as caught:
        await asyncio.wait_for(made.session(), 5)
    assert (caught.value.code, caught.value.retry_after) == ("deadline_exceeded", links.RETRY_SECONDS)


async def test_a_replica_that_joins_gets_sessions(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await bench(replicas=("one", "two"))
    joining = made.front.replicas[1]
    joining.dead = True
    for _ in range(2):
        await made.session()
    assert counts(made) == [2, 0]
    joining.dead = False
    monkeypatch.setattr(links, "REFRESH_SECONDS", 0.0)
    for _ in range(20):
        await made.session()
        if joining.opened:
            break
    assert joining.opened


async def test_one_replica_gone_keeps_no_new_session_from_the_other(bench: Any) -> None:
    made = await bench(replicas=("one", "two"))
    await made.session()
    made.front.replicas[0].kill()
    talks = [await made.session() for _ in range(4)]
    for talk in talks:
        talk.begin(PROMPT, max_tokens=2)
        assert await talk.rest() == (made.toy.generate(PROMPT, 2), 2)
    assert counts(made)[0] == 0


async def test_a_card_that_does_not_fit_keeps_its_replica_out_and_no_other(bench: Any) -> None:
    made = await bench(replicas=("one", "two"))
    made.front.replicas[1].card.width += 1
    for _ in range(3):
        await made.session()
    assert counts(made) == [3, 0]
    assert made.front.replicas[1].links == 0


async def test_names_that_no_gateway_gives_are_not_asked_for(bench: Any) -> None:
    made = await bench(replicas=("one", "two\n", "thr\u00e9e", "x" * 64, ""))
    made.front.replicas[0].card.replicas.extend(["one"] * 50)
    for _ in range(3):
        await made.session()
    assert counts(made) == [3, 0, 0, 0, 0]
    assert made.front.described == 2


async def test_no_more_links_are_held_than_there_may_be_replicas(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "REPLICAS_LIMIT", 3)
    monkeypatch.setattr(links, "REFRESH_SECONDS", 0.0)
    made = await bench(replicas=tuple("abcdefgh"))
    for away in range(5):  # whoever answers changes from list to list
        for number, replica in enumerate(made.front.replicas):
            replica.dead = number < away
        await made.session()
        await asyncio.wait([made.instance.opened.links._refreshing])
    assert sum(replica.links for replica in made.front.replicas) <= 3


async def test_long_sessions_go_where_there_is_room_for_them(bench: Any) -> None:
    made = await bench(replicas=("one", "two"))
    made.front.replicas[0].card.max_positions = 20
    for _ in range(3):
        talk = await made.session(max_positions=30)
    assert counts(made) == [0, 3]
    assert talk.session.max_positions == 30
    made.front.replicas[1].kill()
    await stranding(talk)
    with pytest.raises(PositionRefused, match="at most 20"):
        await made.session(max_positions=30)


async def test_a_link_whose_last_session_left_a_draining_replica_is_closed(bench: Any) -> None:
    made = await bench(replicas=("one", "two"))
    talks = [await made.session() for _ in range(2)]
    assert "stip_links 2.0" in generate_latest(made.telemetry.registry).decode()
    made.front.replicas[0].drain()
    await until(lambda: "stip_links 1.0" in generate_latest(made.telemetry.registry).decode())
    await until(lambda: not made.front.replicas[0]._downs)
    for talk in talks:
        talk.begin(PROMPT, max_tokens=3)
        assert await talk.rest() == (made.toy.generate(PROMPT, 3), 2)


async def test_a_reply_before_its_rows_were_sent_is_refused(bench: Any) -> None:
    made = await bench()
    talk = await made.session()
    early = model_pb2.Fed(slices=[model_pb2.Slice(session=made.replica.opened[0], position=22, count=1)])
    early.hidden = bytes(48)
    talk.begin(list(range(23)), max_tokens=3)
    link = talk.session._decoding.travel.seat.link
    await link._received(model_pb2.Down(fed=early))
    assert await talk.failure() == "frame_invalid"


async def test_a_link_that_is_refused_for_want_of_room_says_when_to_try_again(bench: Any) -> None:
    made = await bench()
    made.front.refusing = Overloaded("links: got 9, allowed: at most 8", retry_after=2.5)
    with pytest.raises(Overloaded) as caught:
        await asyncio.wait_for(made.session(), 10)
    assert caught.value.retry_after == 2.5


async def test_a_link_that_is_refused_for_its_certificate_is_a_replica_that_is_not_there(bench: Any) -> None:
    made = await bench()
    made.front.refusing = LeaseForeign("link: no client certificate was presented")
    with pytest.raises(ReplicaLost, match="lease_foreign"):
        await asyncio.wait_for(made.session(), 10)
