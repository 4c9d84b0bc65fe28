"""Collateral from disk and source: fresh, stale while valid, never expired; several processes, and offline."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stip_protocol.attestation import collateral_bundle
from stip_protocol.attestation.collateral import Collateral
from stip_protocol.attestation.collateral_cache import CollateralCache, Kept
from stip_protocol.attestation.collateral_source import CollateralSettings, CollateralSource
from stip_protocol.attestation.evidence import Evidence
from stip_protocol.attestation.pccs import Endpoint
from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.errors import (
    AttestationError,
    CollateralExpired,
    CollateralUnavailable,
    ConfigurationError,
    EvidenceMalformed,
    EvidenceRefused,
    VersionUnsupported,
)
from stip_stack.pccs import Answer, StandIn, serve
from stip_stack.tee import Faults, SimulatedPlatform

SGX = PlatformKind("sgx", b"STIPSM", "platform")
TDX = PlatformKind("tdx", b"STIPSM", "platform")
DAY = 24 * 3600
LIFE = 30 * DAY
DOWN = Answer(status=503)


@dataclass
class Clock:
    now: float

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(now: int) -> Clock:
    return Clock(now)


@pytest.fixture
def pccs(platform: SimulatedPlatform, now: int) -> Iterator[StandIn]:
    issued = {SGX: platform.collateral(now), TDX: platform.collateral(now, tee="TDX")}
    with serve(StandIn(issued)) as served:
        yield served


@pytest.fixture
def source(
    platform: SimulatedPlatform, clock: Clock, pccs: StandIn, tmp_path: Path
) -> Iterator[Callable[..., CollateralSource]]:
    """Sources over one cache folder, as replicas or restarts; `offline` has no endpoint."""
    made: list[CollateralSource] = []

    def build(*, offline: bool = False, **options: Any) -> CollateralSource:
        endpoints = () if offline else (Endpoint(url=pccs.url),)
        fields = {"cache": tmp_path / "cache", "endpoints": endpoints, "fetch_seconds": 0.4} | options
        made.append(CollateralSource(CollateralSettings(**fields), platform.root_der, clock=clock))
        return made[-1]

    yield build
    for one in made:
        one.close()


Build = Callable[..., CollateralSource]


def fetches(pccs: StandIn) -> int:
    return len([path for path in pccs.asked if "/tcb?" in path])


def test_collateral_is_fetched_once_and_then_served_from_disk_also_after_a_restart(
    source: Build, pccs: StandIn, evidence: Callable[..., Evidence]
) -> None:
    one = source()
    for _ in range(3):
        assert Collateral.parse(one.for_quote(evidence().quote)).tcb_info.fmspc == b"STIPSM"
    assert source().get(SGX).kind == SGX
    assert fetches(pccs) == 1


def test_a_file_of_the_cache_is_public_and_its_folder_is_not_writable_by_others(source: Build, tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        source().get(SGX)
    finally:
        os.umask(mask)
    path = tmp_path / "cache" / "sgx-5354495053 4d-platform.json".replace(" ", "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert not stat.S_IMODE(path.parent.stat().st_mode) & 0o022
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(".sgx")] == []


def test_collateral_is_due_when_the_share_of_its_life_is_left(source: Build, clock: Clock, now: int) -> None:
    one = source(refresh_share=0.5)
    kept = one.get(SGX)
    (shelf,) = one.shelves()
    assert shelf.refresh_due == pytest.approx(now + LIFE / 2, abs=2)
    assert kept.collateral.age_seconds(now + 100) == 100
    clock.now = shelf.refresh_due - 1
    assert one.due() == []
    clock.now += 1
    assert one.due() == [SGX]


def test_what_is_due_is_renewed_and_older_collateral_displaces_nothing(
    source: Build, pccs: StandIn, platform: SimulatedPlatform, clock: Clock, now: int
) -> None:
    one = source()
    one.get(SGX)
    clock.now = now + 25 * DAY
    assert one.renew_due() == {SGX: None}
    assert one.get(SGX).issued == now  # the source gave the same again
    pccs.collateral = {SGX: platform.collateral(now + 24 * DAY)}
    clock.now += 600
    assert one.renew_due() == {SGX: None}
    assert one.get(SGX).issued == now + 24 * DAY
    assert one.renew_due() == {}
    pccs.collateral = {SGX: platform.collateral(now + 20 * DAY)}
    assert one.renew(SGX).issued == now + 24 * DAY
    pccs.collateral = {SGX: platform.collateral(now + 25 * DAY, faults=Faults(evaluation_number=16))}
    assert one.renew(SGX).issued == now + 24 * DAY


def test_while_the_source_is_down_what_is_valid_is_served_and_nothing_that_expired(
    source: Build, pccs: StandIn, clock: Clock, now: int
) -> None:
    one = source()
    expires = one.get(SGX).expires
    pccs.fault = lambda _, answer: DOWN
    clock.now = expires
    failed = one.renew_due()[SGX]
    assert isinstance(failed, CollateralUnavailable)
    assert one.get(SGX).expires == expires
    clock.now = expires + 1
    for served in (one, source()):
        with pytest.raises(CollateralUnavailable):
            served.get(SGX)
    clock.now = now - 1  # nor what is not valid yet, to a clock that was set back
    with pytest.raises(CollateralUnavailable):
        source().get(SGX)


def test_after_a_failure_the_source_is_left_alone_for_a_while(
    source: Build, pccs: StandIn, clock: Clock, now: int
) -> None:
    one = source(retry_minutes=10)
    pccs.fault = lambda _, answer: Answer(status=404)
    for _ in range(3):
        with pytest.raises(CollateralUnavailable) as refused:
            one.get(SGX)
    assert fetches(pccs) == 1
    assert refused.value.retry_after == 600
    pccs.fault = lambda _, answer: answer
    clock.now = now + 599
    with pytest.raises(CollateralUnavailable):
        one.get(SGX)
    clock.now = now + 600
    assert one.get(SGX)


def test_who_waits_for_a_slow_source_waits_no_longer_than_the_bound(source: Build, pccs: StandIn) -> None:
    blocked = threading.Event()

    def stuck(_: str, answer: Answer) -> Answer:
        blocked.wait(20)
        return answer

    pccs.fault = stuck
    one = source(wait_seconds=0.05, fetch_seconds=20)
    with pytest.raises(CollateralUnavailable, match="not fetched within") as refused:
        one.get(SGX)
    assert refused.value.retry_after == 0.05
    blocked.set()
    deadline = time.monotonic() + 10
    while not one.shelves() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert one.get(SGX)  # the fetch went on, and what it brought is there
    assert fetches(pccs) == 1


def test_many_who_ask_at_once_share_one_fetch(source: Build, pccs: StandIn) -> None:
    one = source(wait_seconds=10, waiters=16)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda _: one.get(SGX).expires, range(16)))
    assert len(set(found)) == 1
    assert fetches(pccs) == 1


def test_no_more_than_the_waiters_allowed_wait_and_the_others_are_told_to_come_back(
    source: Build, pccs: StandIn
) -> None:
    held = threading.Event()

    def stuck(_: str, answer: Answer) -> Answer:
        held.wait(20)
        return answer

    pccs.fault = stuck
    one = source(wait_seconds=20, waiters=1, fetch_seconds=20)

    def ask(_: int) -> str:
        try:
            return str(one.get(SGX).kind)
        except CollateralUnavailable as refused:
            held.set()  # the one that waits is let go by the one that may not
            return refused.message

    with ThreadPoolExecutor(2) as threads:
        found = sorted(threads.map(ask, range(2)))
    assert found == [f"collateral of {SGX}: is being fetched", str(SGX)]


WRITER = """
import sys
from pathlib import Path
from stip_protocol.attestation.collateral_cache import CollateralCache
cache = CollateralCache(Path(sys.argv[1]), bytes.fromhex(sys.argv[2]))
files = [Path(name).read_bytes() for name in sys.argv[4:]]
for _ in range(20):
    for data in files:
        cache.store(data, now=int(sys.argv[3]))
"""


def test_processes_that_share_a_folder_never_see_half_a_file_and_end_with_the_newest(
    platform: SimulatedPlatform, now: int, tmp_path: Path
) -> None:
    files = []
    for day in range(3):
        files.append(tmp_path / f"{day}.json")
        files[-1].write_bytes(platform.collateral(now + day * DAY))
    cache = CollateralCache(tmp_path / "cache", platform.root_der)
    cache.store(files[0].read_bytes(), now=now + 3 * DAY)
    writers = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WRITER,
                str(tmp_path / "cache"),
                platform.root_der.hex(),
                str(now + 3 * DAY),
                *map(str, order),
            ]
        )
        for order in (files, files[::-1])
    ]
    seen = []
    while any(writer.poll() is None for writer in writers):
        kept = cache.read(SGX)
        assert kept is not None
        seen.append(kept.issued)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen == sorted(seen)
    last = cache.read(SGX)
    assert last is not None
    assert last.issued == now + 2 * DAY


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b"x" * 70_000])
def test_a_damaged_file_is_fetched_anew(source: Build, pccs: StandIn, tmp_path: Path, damage: bytes) -> None:
    one = source()
    one.get(SGX)
    path = tmp_path / "cache" / f"{SGX}.json"
    path.write_bytes(damage)
    assert one.get(SGX).kind == SGX
    path.write_bytes(one.get(SGX).data.replace(b'\\"tcbType\\":0', b'\\"tcbType\\":1'))  # its signature fails
    assert one.get(SGX).collateral.v3.tcb_info.count('"tcbType":0') == 1
    path.unlink()
    path.write_bytes(pccs.collateral[TDX])
    assert one.get(SGX).kind == SGX  # another platform's under this name
    assert fetches(pccs) == 4


def test_a_folder_that_cannot_be_used_is_a_configuration_error(source: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="collateral cache"):
        source(cache=tmp_path / "file")
    with pytest.raises(ConfigurationError, match="collateral cache"):
        source(cache=tmp_path / "file" / "below")


def test_offline_a_bundle_serves_several_platforms_and_nothing_is_fetched(
    source: Build, pccs: StandIn, tmp_path: Path, clock: Clock, evidence: Callable[..., Evidence]
) -> None:
    online = source()
    bundle = collateral_bundle.encode([online.get(SGX), online.get(TDX)])
    (tmp_path / "bundle.json").write_bytes(bundle)
    asked = len(pccs.asked)
    offline = source(offline=True, cache=tmp_path / "other", bundle=tmp_path / "bundle.json")
    assert [shelf.kept.kind for shelf in offline.shelves()] == [SGX, TDX]
    assert offline.for_quote(evidence().quote)
    clock.now += 29 * DAY
    assert offline.due() == [SGX, TDX]
    assert offline.renew_due() == {}
    with pytest.raises(CollateralUnavailable, match="no endpoint"):
        offline.renew(SGX)
    clock.now += 2 * DAY
    with pytest.raises(CollateralUnavailable, match="import a collateral bundle"):
        offline.get(SGX)
    late = source(offline=True, cache=tmp_path / "third", bundle=tmp_path / "bundle.json")  # a restart starts
    assert [shelf.kept.kind for shelf in late.shelves()] == [SGX, TDX]
    with pytest.raises(CollateralUnavailable):
        late.get(SGX)
    with pytest.raises(CollateralExpired):
        late.take(collateral_bundle.decode(bundle))
    assert len(pccs.asked) == asked


def test_a_bundle_under_another_root_is_refused_whole(
    source: Build, platform: SimulatedPlatform, now: int, tmp_path: Path
) -> None:
    other = SimulatedPlatform.create(tmp_path / "other", now=now)
    mixed = [Kept.parse(platform.collateral(now)), Kept.parse(other.collateral(now, tee="TDX"))]
    one = source(offline=True)
    with pytest.raises(EvidenceRefused, match="trust anchor"):
        one.take(mixed)
    assert one.shelves() == []
    (tmp_path / "foreign.json").write_bytes(collateral_bundle.encode(mixed[1:]))
    with pytest.raises(EvidenceRefused, match="trust anchor"):
        source(offline=True, bundle=tmp_path / "foreign.json")


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda b: b | {"version": [2, 0]}, VersionUnsupported),
        (lambda b: b | {"version": "1"}, EvidenceMalformed),
        (lambda b: b | {"more": 1}, EvidenceMalformed),
        (lambda b: b | {"collateral": []}, EvidenceMalformed),
        (lambda b: b | {"collateral": b["collateral"] * 257}, EvidenceMalformed),
        (lambda b: b | {"collateral": [{}]}, EvidenceMalformed),
        (lambda b: [b], EvidenceMalformed),
    ],
)
def test_a_malformed_bundle_is_refused(
    platform: SimulatedPlatform, now: int, change: Callable[[Any], Any], refusal: type[Exception]
) -> None:
    genuine = collateral_bundle.encode([Kept.parse(platform.collateral(now))])
    assert [kept.kind for kept in collateral_bundle.decode(genuine)] == [SGX]
    with pytest.raises(refusal):
        collateral_bundle.decode(json.dumps(change(json.loads(genuine))).encode())


@settings(max_examples=100, deadline=None)
@given(data=st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["version", "collateral"]), inner),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_arbitrary_bundles_give_a_refusal_and_nothing_else(data: bytes) -> None:
    with pytest.raises((AttestationError, VersionUnsupported)):
        collateral_bundle.decode(data)


@pytest.mark.parametrize("wrong", [{"refresh_share": 0}, {"refresh_share": 1}, {"wait_seconds": 0}, {"more": 1}])
def test_settings_out_of_bounds_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CollateralSettings.model_validate({"cache": tmp_path} | wrong)
