"""Sources of collateral that mean harm: they hold a connection for ever, or hand out genuine pieces of another time."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stip_protocol.attestation.collateral_cache import CollateralCache, Kept
from stip_protocol.attestation.collateral_source import CollateralSettings, CollateralSource
from stip_protocol.attestation.pccs import Endpoint, PccsClient
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.errors import CollateralUnavailable, EvidenceRefused
from stip_stack.pccs import Answer, StandIn, serve
from stip_stack.tee import Faults, SimulatedPlatform

SGX = PlatformKind("sgx", b"STIPSM", "platform")
DAY = 24 * 3600


@contextmanager
def dribbling(first: bytes, drop: bytes) -> Iterator[str]:
    """A server that answers with `first`, and then with one `drop` after the other, each well within any timeout."""
    stopping = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(taken: socket.socket) -> None:
        with taken:
            try:
                taken.recv(65536)
                taken.sendall(first)
                while not stopping.wait(0.02):
                    taken.sendall(drop)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                taken, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(taken,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stopping.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


DRIBBLES: dict[str, tuple[str, bytes, bytes]] = {
    "the status line": ("http", b"HTTP/1.1 200 ", b"x"),
    "a header": ("http", b"HTTP/1.1 200 OK\r\nx: ", b"x"),
    "answers that are none yet": ("http", b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "the size of a chunk": ("http", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;", b"x"),
    "the TLS handshake": ("https", b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03", b"x"),
}


@pytest.mark.parametrize("held", DRIBBLES)
def test_a_source_that_dribbles_is_given_up(platform: SimulatedPlatform, now: int, held: str) -> None:
    scheme, first, drop = DRIBBLES[held]
    ended: list[CollateralUnavailable] = []

    def fetch(url: str) -> None:
        client = PccsClient([Endpoint(url=url)], platform.root_der, clock=lambda: now, request_seconds=0.3)
        with pytest.raises(CollateralUnavailable) as refused:
            client.fetch(SGX, seconds=0.3)
        ended.append(refused.value)

    with dribbling(first, drop) as address:
        fetching = threading.Thread(target=fetch, args=(f"{scheme}://{address}",), daemon=True)
        fetching.start()
        fetching.join(10)
        assert not fetching.is_alive(), "the source holds the client for as long as it likes"
    assert "takes too long" in ended[0].message


def test_a_source_that_asks_for_a_long_pause_takes_no_second_chance_from_another(
    platform: SimulatedPlatform, now: int
) -> None:
    seen: list[str] = []

    def at_first(path: str, answer: Answer) -> Answer:
        seen.append(path)
        return answer if len(seen) > 1 else Answer(status=503)

    good = {SGX: platform.collateral(now)}
    with (
        serve(StandIn(good, fault=lambda _, answer: Answer(status=429, headers={"retry-after": "3600"}))) as rude,
        serve(StandIn(good, fault=at_first)) as second,
    ):
        endpoints = [Endpoint(url=rude.url), Endpoint(url=second.url)]
        client = PccsClient(endpoints, platform.root_der, clock=lambda: now)
        assert Kept.parse(client.fetch(SGX, seconds=20)).kind == SGX
        assert len(rude.asked) == 1


def mixed(base: bytes, **pieces: bytes) -> bytes:
    """Collateral with pieces of other collateral, each of them genuine."""
    made = json.loads(base)
    for name, other in pieces.items():
        taken = json.loads(other)
        made |= {key: value for key, value in taken.items() if key.startswith(name)}
    return json.dumps(made).encode()


PIECES = ("tcb_info", "qe_identity", "pck_crl", "root_ca_crl")


@pytest.mark.parametrize("piece", PIECES)
def test_no_piece_of_what_is_kept_is_set_back_by_others_that_are_newer(
    platform: SimulatedPlatform, now: int, tmp_path: Path, piece: str
) -> None:
    """The revocation of a platform, above all: an old list beside a new TCB info would take it back."""
    oldest, kept, newest = (platform.collateral(now + day * DAY) for day in (0, 10, 20))
    cache = CollateralCache(tmp_path, platform.root_der)
    moment = now + 21 * DAY
    cache.store(kept, now=moment)
    assert cache.store(mixed(newest, **{piece: oldest}), now=moment).data == kept
    assert cache.store(newest, now=moment).data == newest


def test_one_newer_piece_beside_the_same_others_is_taken(platform: SimulatedPlatform, now: int, tmp_path: Path) -> None:
    kept, newest = platform.collateral(now), platform.collateral(now + DAY)
    cache = CollateralCache(tmp_path, platform.root_der)
    for piece in PIECES:
        cache.store(kept, now=now + DAY)
        assert (
            json.loads(cache.store(mixed(kept, **{piece: newest}), now=now + DAY).data)[piece]
            == (json.loads(newest)[piece])
        )
        (tmp_path / f"{SGX}.json").unlink()


@pytest.fixture
def source(platform: SimulatedPlatform, tmp_path: Path) -> Iterator[Callable[..., CollateralSource]]:
    made: list[CollateralSource] = []

    def build(pccs: StandIn, clock: Callable[[], float], **options: Any) -> CollateralSource:
        fields = {"cache": tmp_path / "cache", "endpoints": (Endpoint(url=pccs.url),), "fetch_seconds": 0.4} | options
        made.append(CollateralSource(CollateralSettings(**fields), platform.root_der, clock=clock))
        return made[-1]

    yield build
    for one in made:
        one.close()


def test_what_ran_out_stands_in_nobodys_way_whatever_its_number(
    platform: SimulatedPlatform, now: int, source: Callable[..., CollateralSource]
) -> None:
    moment = [now]
    early = platform.collateral(now, faults=Faults(evaluation_number=99))
    with serve(StandIn({SGX: early})) as pccs:
        one = source(pccs, lambda: moment[0])
        assert one.get(SGX).collateral.evaluation_number == 99
        moment[0] = now + 40 * DAY
        pccs.collateral = {SGX: platform.collateral(moment[0])}
        found = one.get(SGX)
        assert found.collateral.evaluation_number < 99
        assert found.expires > moment[0]


def test_a_source_that_has_nothing_newer_is_not_asked_every_minute(
    platform: SimulatedPlatform, now: int, source: Callable[..., CollateralSource]
) -> None:
    moment = [float(now)]
    with serve(StandIn({SGX: platform.collateral(now)})) as pccs:
        one = source(pccs, lambda: moment[0], retry_minutes=10)
        one.get(SGX)
        moment[0] = now + 25 * DAY
        for _ in range(10):  # the service looks once a minute
            one.renew_due()
            moment[0] += 60
        assert len([path for path in pccs.asked if "/tcb?" in path]) == 2
        one.renew_due()
        assert len([path for path in pccs.asked if "/tcb?" in path]) == 3


@pytest.mark.parametrize("revoked", ["tcb_signer_revoked", "intermediate_revoked"])
def test_what_a_revoked_key_signed_is_not_kept(
    platform: SimulatedPlatform, now: int, tmp_path: Path, revoked: str
) -> None:
    """Whoever has a revoked signer's key could number and date it so that nothing genuine ever displaces it."""
    cache = CollateralCache(tmp_path, platform.root_der)
    with pytest.raises(EvidenceRefused, match="revoked"):
        cache.store(platform.collateral(now, faults=Faults(**{revoked: True})), now=now)


def test_waiting_is_refused_where_nobody_may_wait(
    platform: SimulatedPlatform, now: int, source: Callable[..., CollateralSource]
) -> None:
    with serve(StandIn({SGX: platform.collateral(now)})) as pccs:
        one = source(pccs, lambda: float(now), waiters=0)
        with pytest.raises(CollateralUnavailable, match="being fetched"):
            one.get(SGX)
        deadline = time.monotonic() + 10
        while not one.shelves() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert one.get(SGX)
