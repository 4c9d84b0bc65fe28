"""Rate limits: what one peer may ask for, and that nobody else pays for it."""

from __future__ import annotations

import hashlib
import secrets

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from stip_keyservice.service.config import Rate, Rates
from stip_keyservice.service.ratelimit import Buckets, Kind, Limiter, LinkKeys, peer_name
from stip_keyservice.service.strangers import OTHERS, Strangers
from stip_protocol.errors import Overloaded
from stip_protocol.release import Heartbeat, sign_heartbeat


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("ipv4:192.0.2.7:40112", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:40112", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:1", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:1", "192.0.2.7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:1", "fe80::/64"),
        ("unix:", "local"),
        ("", "unknown"),
        ("ipv4:nonsense", "unknown"),
    ],
)
def test_a_peer_is_an_ipv4_address_or_an_ipv6_64(address: str, name: str) -> None:
    assert peer_name(address) == name


def test_a_bucket_gives_its_burst_at_once_and_then_its_rate() -> None:
    clock = Clock()
    buckets = Buckets(Rate(per_second=2, burst=3), keys=10, clock=clock)
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 0]
    wait = buckets.take("a")
    assert wait == pytest.approx(0.5)
    assert buckets.take("b") == 0
    clock.now += wait
    assert buckets.take("a") == 0
    assert buckets.take("a") > 0


@given(steps=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 2)), max_size=200))
def test_no_one_ever_gets_more_than_burst_and_rate_whoever_else_asks(steps: list[tuple[str, float]]) -> None:
    clock, granted = Clock(), dict.fromkeys("abcdefgh", 0)
    buckets = Buckets(Rate(per_second=1, burst=4), keys=3, clock=clock)
    began = clock.now
    for key, pause in steps:
        clock.now += pause
        granted[key] += buckets.take(key) == 0
        assert granted[key] <= 4 + 4 + 1 + 2 * (clock.now - began)  # its own, and of the newcomers' bucket


def test_a_crowd_of_addresses_resets_nobodys_bucket() -> None:
    clock = Clock()
    buckets = Buckets(Rate(per_second=1, burst=2), keys=16, clock=clock)
    assert [buckets.take("attacker") for _ in range(3)].count(0) == 2
    for number in range(1000):
        buckets.take(f"other {number}")
    assert buckets.take("attacker") > 0
    assert len(buckets._full_at) <= 17
    clock.now += 2.0
    assert buckets.take("attacker") == 0


def test_newcomers_share_one_bucket_while_there_is_no_room_and_get_their_own_after() -> None:
    clock = Clock()
    buckets = Buckets(Rate(per_second=1, burst=2), keys=2, clock=clock)
    for key in ("a", "b", "c"):
        assert buckets.take(key) == 0
    assert buckets.take("d") == 0
    assert buckets.take("e") > 0
    clock.now += 2
    assert buckets.take("e") == 0


def test_a_refusal_says_when_to_come_back_and_is_counted_by_kind() -> None:
    counted: list[Kind] = []
    rates = Rates(release=Rate(per_second=4, burst=1))
    limiter = Limiter(rates, LinkKeys(), refused=counted.append, clock=Clock())
    limiter.admit("release", "192.0.2.7")
    limiter.admit("release", "192.0.2.8")
    with pytest.raises(Overloaded) as caught:
        limiter.admit("release", "192.0.2.7")
    assert caught.value.retry_after == pytest.approx(0.25)
    limiter.admit("challenge", "192.0.2.7")
    assert counted == ["release"]


def test_a_flood_behind_the_same_address_does_not_starve_a_lease_and_forgers_do_not_get_its_bucket() -> None:
    rates = Rates(renewal=Rate(per_second=1, burst=1), lease=Rate(per_second=1, burst=2))
    link_keys = LinkKeys()
    limiter = Limiter(rates, link_keys, clock=Clock())
    link, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    spki = link.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    handle = hashlib.sha256(spki).digest()[:16]
    beat = Heartbeat(handle=handle, serial=0, nonce=secrets.token_bytes(32), fed=0, wanted=1)
    foreign = beat.model_copy(update={"handle": bytes(16)})
    genuine, forged = sign_heartbeat(beat, link), sign_heartbeat(beat, other)
    link_keys.note(handle, spki)
    limiter.admit_renewal("192.0.2.7", b"a flood", b"")
    for heartbeat, signature in (
        (b"a flood", b""),
        (beat.to_bytes(), forged),
        (beat.to_bytes(), b""),
        (foreign.to_bytes(), sign_heartbeat(foreign, link)),
    ):
        with pytest.raises(Overloaded):
            limiter.admit_renewal("192.0.2.7", heartbeat, signature)
    limiter.admit_renewal("192.0.2.7", beat.to_bytes(), genuine)
    limiter.admit_renewal("192.0.2.7", beat.to_bytes(), genuine)
    with pytest.raises(Overloaded):  # and has an end of its own
        limiter.admit_renewal("192.0.2.7", beat.to_bytes(), genuine)


def test_what_is_no_heartbeat_by_its_size_is_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be read on the loop that serves everybody."""
    read: list[int] = []
    monkeypatch.setattr(Heartbeat, "from_bytes", lambda data: read.append(len(data)))
    limiter = Limiter(Rates(renewal=Rate(per_second=1, burst=1)), LinkKeys(), clock=Clock())
    limiter.admit_renewal("192.0.2.7", b"", b"")
    for heartbeat, signature in ((bytes(1 << 20), b""), (b"", bytes(1 << 20))):
        with pytest.raises(Overloaded):
            limiter.admit_renewal("192.0.2.7", heartbeat, signature)
    assert not read


def test_refusals_beyond_the_first_few_of_a_minute_are_counted_by_peer() -> None:
    strangers = Strangers(in_full=2, peers=2)
    told = [strangers.recorded("a", "nonce_refused", now=60 + n) for n in range(5)]
    assert told == [True, True, False, False, False]
    strangers.recorded("a", "evidence_refused", now=119)
    assert strangers.recorded("b", "nonce_refused", now=119)
    assert not strangers.recorded("c", "nonce_refused", now=119)  # beyond the peers told apart
    assert not strangers.recorded("d", "nonce_refused", now=119)
    assert strangers.ended(now=119) == []
    ended = strangers.ended(now=120)
    assert [(one.peer, one.count, one.code) for one in ended] == [
        ("a", 4, "nonce_refused"),
        (OTHERS, 2, "nonce_refused"),
    ]
    assert ended[0].detail == "nonce_refused 3, evidence_refused 1"
    assert strangers.ended(now=120) == []
    assert strangers.recorded("a", "nonce_refused", now=121)


def test_the_turn_of_a_minute_is_no_way_to_begin_anew_again_and_again() -> None:
    """Threads read the clock before they get here, and two replicas of one log differ by a second."""
    strangers = Strangers(in_full=2, peers=2)
    told = [strangers.recorded("a", "nonce_refused", now=120 - n % 2) for n in range(40)]
    assert sum(told) <= 4
    assert sum(one.count for one in strangers.close()) == 40 - sum(told)
    # A clock that was set back goes on from there.
    assert strangers.recorded("a", "nonce_refused", now=10_000)
    assert strangers.recorded("a", "nonce_refused", now=10)
    strangers.recorded("a", "nonce_refused", now=10)
    assert not strangers.recorded("a", "nonce_refused", now=11)
    assert strangers.ended(now=71)


def test_what_was_folded_is_bounded_while_nothing_can_be_written() -> None:
    strangers = Strangers(in_full=0, peers=3)
    for minute in range(100):
        for peer in range(50):
            strangers.recorded(str(peer), "nonce_refused", now=60 * minute)
    assert len(strangers.close()) <= 16
