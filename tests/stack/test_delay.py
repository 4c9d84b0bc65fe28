"""The delaying proxy: every byte, in its order, no earlier than it should, and the ends of streams with them."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from stip_protocol.errors import ConfigurationError
from stip_stack.delay import Dial, Proxy

SECONDS = 20.0
"""A socket that says nothing for so long fails its test."""


@dataclass
class Joined:
    """Both ends of one connection through a proxy."""

    near: socket.socket
    far: socket.socket
    dial: Dial


@contextlib.contextmanager
def joined(folder: Path, milliseconds: float) -> Iterator[Joined]:
    dial = Dial(folder / "dial", seconds=milliseconds / 1e3)
    with socket.create_server(("127.0.0.1", 0)) as listener, Proxy(listener.getsockname(), dial) as proxy:
        listener.settimeout(SECONDS)
        host, _, port = proxy.address.rpartition(":")
        near = socket.create_connection((host, int(port)), timeout=SECONDS)
        far, _ = listener.accept()
        far.settimeout(SECONDS)
        with near, far:
            yield Joined(near, far, dial)


def everything(source: socket.socket) -> bytes:
    """Until the stream ends."""
    parts = []
    while part := source.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def test_all_bytes_arrive_in_their_order_in_both_directions_at_once(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    sent = [generator.bytes(3_000_001), generator.bytes(2_000_003)]
    with joined(tmp_path, 3) as link:

        def send(sink: socket.socket, data: bytes) -> None:
            for at in range(0, len(data), 9973):
                sink.sendall(data[at : at + 9973])
            sink.shutdown(socket.SHUT_WR)

        got: dict[str, bytes] = {}
        jobs = [
            threading.Thread(target=send, args=(link.near, sent[0])),
            threading.Thread(target=send, args=(link.far, sent[1])),
            threading.Thread(target=lambda: got.update(far=everything(link.far))),
            threading.Thread(target=lambda: got.update(near=everything(link.near))),
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(SECONDS)
    assert hashlib.sha256(got["far"]).digest() == hashlib.sha256(sent[0]).digest()
    assert hashlib.sha256(got["near"]).digest() == hashlib.sha256(sent[1]).digest()


@pytest.mark.parametrize("milliseconds", [0, 5, 40])
def test_no_byte_is_earlier_than_the_delay_and_a_round_trip_takes_two(tmp_path: Path, milliseconds: float) -> None:
    with joined(tmp_path, milliseconds) as link:
        for _ in range(5):
            began = time.monotonic()
            link.near.sendall(b"there")
            assert link.far.recv(16) == b"there"
            assert time.monotonic() - began >= milliseconds / 1e3
            link.far.sendall(b"and back")
            assert link.near.recv(16) == b"and back"
            assert time.monotonic() - began >= 2 * milliseconds / 1e3


def test_a_delay_that_is_set_holds_for_the_next_byte(tmp_path: Path) -> None:
    with joined(tmp_path, 0) as link:
        link.near.sendall(b"1")
        assert link.far.recv(1) == b"1"
        Dial(tmp_path / "dial").seconds = 0.05
        assert link.dial.seconds == 0.05
        began = time.monotonic()
        link.near.sendall(b"2")
        assert link.far.recv(1) == b"2"
        assert time.monotonic() - began >= 0.05


def test_bytes_sent_before_the_delay_shrank_are_not_overtaken(tmp_path: Path) -> None:
    with joined(tmp_path, 60) as link:
        link.near.sendall(b"first")
        # The reply shows that the proxy has taken "first" in: both directions are delayed alike.
        link.far.sendall(b".")
        assert link.near.recv(1) == b"."
        link.dial.seconds = 0.0
        link.near.sendall(b" second")
        link.near.shutdown(socket.SHUT_WR)
        assert everything(link.far) == b"first second"


def test_an_end_is_passed_on_and_the_other_direction_stays_open(tmp_path: Path) -> None:
    with joined(tmp_path, 2) as link:
        link.near.sendall(b"question")
        link.near.shutdown(socket.SHUT_WR)
        assert everything(link.far) == b"question"
        link.far.sendall(b"answer")
        link.far.close()
        assert everything(link.near) == b"answer"


def test_a_reset_on_one_side_ends_the_other(tmp_path: Path) -> None:
    with joined(tmp_path, 2) as link:
        link.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        link.far.close()  # with a linger of 0 this is a reset
        with contextlib.suppress(ConnectionResetError):
            assert link.near.recv(1) == b""


def test_a_connection_ends_at_once_where_nobody_listens_behind_the_proxy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nowhere = listener.getsockname()
    with Proxy(nowhere, Dial(tmp_path / "dial", seconds=0.0)) as proxy:
        host, _, port = proxy.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=SECONDS) as near:
            assert near.recv(1) == b""


@pytest.mark.parametrize("seconds", [-0.001, 60.001, float("nan")])
def test_a_delay_out_of_range_is_refused(tmp_path: Path, seconds: float) -> None:
    dial = Dial(tmp_path / "dial", seconds=0.01)
    with pytest.raises(ConfigurationError, match="allowed: 0 to 60"):
        dial.seconds = seconds
    assert dial.seconds == 0.01
