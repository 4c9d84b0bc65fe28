"""A link that is far away: forwards TCP between two addresses, every byte a fixed time later.

`python -m stip_stack.delay --target HOST:PORT --dial FILE` announces where it listens and forwards until SIGTERM. Bytes
leave the delay after they came, in their order, at any bandwidth; the end of a stream travels with them, and where one
side breaks both end. The delay is one-way and holds in both directions, so a round trip takes twice as long. Only
setting up TCP is not delayed.

Threads and sleeps, no event loop: epoll waits in whole milliseconds, `time.sleep` in tens of microseconds.
"""

from __future__ import annotations

import json
import mmap
import queue
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import click

from stip_protocol.errors import ConfigurationError

LONGEST_SECONDS = 60.0
CHUNK_BYTES = 1 << 16
BACKLOG = 64
_SECONDS = struct.Struct("<d")


class Dial:
    """The delay in a file of eight bytes that setter and proxy both map: what is set holds for the next byte."""

    def __init__(self, path: Path, *, seconds: float | None = None) -> None:
        """`seconds` makes the file; without, it has to be there."""
        if seconds is not None:
            path.write_bytes(bytes(_SECONDS.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SECONDS.size)
        if seconds is not None:
            self.seconds = seconds

    @property
    def seconds(self) -> float:
        """One way."""
        value: float = _SECONDS.unpack_from(self._map)[0]
        return value

    @seconds.setter
    def seconds(self, value: float) -> None:
        if not 0 <= value <= LONGEST_SECONDS:
            raise ConfigurationError.because("link delay", f"{value} s", f"0 to {LONGEST_SECONDS} s")
        _SECONDS.pack_into(self._map, 0, value)


class Proxy:
    """Listens and forwards, on threads of its own. A context manager."""

    def __init__(self, target: tuple[str, int], dial: Dial, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._target, self._dial = target, dial
        self._listener = socket.create_server((host, port), backlog=BACKLOG)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept; closing alone does not
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._target)
        except OSError:
            near.close()
            return
        with near, far:
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ways = [_Way(near, far, self._dial), _Way(far, near, self._dial)]
            for way in ways:
                way.start()
            for way in ways:
                way.join()


class _Way:
    """One direction of one connection: a thread that takes bytes in, and one that lets them go when they are due."""

    def __init__(self, source: socket.socket, sink: socket.socket, dial: Dial) -> None:
        self._source, self._sink, self._dial = source, sink, dial
        self._underway: queue.SimpleQueue[tuple[float, bytes | None]] = queue.SimpleQueue()
        """(when it is due, what); no bytes: the stream ended; None: it broke."""
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._take, self._give)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _take(self) -> None:
        data: bytes | None = b"-"
        while data:
            try:
                data = self._source.recv(CHUNK_BYTES)
            except OSError:
                data = None
            self._underway.put((time.monotonic() + self._dial.seconds, data))

    def _give(self) -> None:
        while True:
            due, data = self._underway.get()
            while (left := due - time.monotonic()) > 0:
                time.sleep(left)
            try:
                if data:
                    self._sink.sendall(data)
                elif data is None:
                    raise ConnectionResetError
                else:
                    self._sink.shutdown(socket.SHUT_WR)
                    return
            except OSError:
                _break(self._source, self._sink)
                return


def _break(*sockets: socket.socket) -> None:
    """End both sides at once: whoever reads or writes there notices."""
    for each in sockets:
        try:
            each.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # it has ended already


@click.command()
@click.option("--target", required=True, help="HOST:PORT to forward to.")
@click.option("--dial", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True,
              help="File that holds the delay (stip_stack.delay.Dial).")  # fmt: skip
def main(target: str, dial: Path) -> None:
    """Forward until SIGTERM; for tests and benchmarks."""
    host, _, port = target.rpartition(":")
    ended = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, leave)
    sys.setswitchinterval(1e-4)  # a byte that is due must not wait for another thread's turn
    with Proxy((host, int(port)), Dial(dial)) as proxy:
        click.echo(json.dumps({"event": "listening", "address": proxy.address, "metrics": ""}))
        ended.wait()


if __name__ == "__main__":
    main()
