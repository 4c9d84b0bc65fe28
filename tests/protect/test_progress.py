"""Rates and times left, from a clock of the test's own."""

from __future__ import annotations

import pytest

from stip_keyservice.protect.progress import LINE_SECONDS, Lines, Stages, amount, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_comes_every_ten_seconds_with_rate_and_time_left() -> None:
    clock, said = Clock(), list[str]()
    lines = Lines(said.append, clock)
    for done in range(0, 31):
        lines("server", done * 10**8, 10**10)
        clock.now += 1
    assert len(said) == 30 // LINE_SECONDS
    assert said[0] == "Server part: 1.00 GB of 10.00 GB (10%), 100 MB/s, 1:30 left"


def test_what_an_earlier_run_did_does_not_count_as_speed() -> None:
    clock, said = Clock(), list[str]()
    lines = Lines(said.append, clock)
    lines("enclave", 8 * 10**9, 10**10)
    clock.now += 20
    lines("enclave", 9 * 10**9, 10**10)
    assert said == ["Enclave part: 9.00 GB of 10.00 GB (90%), 50 MB/s, 0:20 left"]


def test_steps_are_counted_as_steps() -> None:
    clock, said = Clock(), list[str]()
    lines = Lines(said.append, clock)
    lines("certificate", 0, 16)
    clock.now += 16
    lines("certificate", 4, 16)
    assert said == ["Certificate: 4 of 16 (25%), 0.25/s, 0:48 left"]


def test_stages_are_timed_and_count_only_their_own_bytes() -> None:
    clock = Clock()
    told: list[tuple[str, int, int]] = []
    stages = Stages(lambda *progress: told.append(progress), clock)
    with stages.stage("server", 100, before=40) as advance:
        clock.now += 2.5
        advance(60)
    with stages.stage("certificate", 3) as advance:
        advance(3)
    assert told == [("server", 40, 100), ("server", 100, 100), ("certificate", 0, 3), ("certificate", 3, 3)]
    assert (stages.times["server"].seconds, stages.times["server"].nbytes) == (2.5, 60)
    assert stages.times["certificate"].nbytes == 0


def test_amounts_below_a_gigabyte_are_in_megabytes() -> None:
    assert [amount("server", count) for count in (0, 1_234_567, 10**9)] == ["0.0 MB", "1.2 MB", "1.00 GB"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_durations_read_as_clocks(seconds: float, text: str) -> None:
    assert duration(seconds) == text
