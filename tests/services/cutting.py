"""A PostgreSQL server behind a socket that loses the answer to a commit."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import URL

from .postgres import Server

_CHUNK = 1 << 16


class Cutting:
    """A Unix socket before the server's own. While it is armed, the next decision's COMMIT reaches the server, which
    carries it out, and its answer reaches nobody: the connection is gone."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder, self._armed = server, folder, threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / f".s.PGSQL.{server.port}"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, database: str) -> URL:
        return self._server.url(database, host=str(self._folder))

    def arm(self) -> None:
        self._armed.set()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._server.folder / f".s.PGSQL.{self._server.port}"))
            cut = threading.Event()
            threading.Thread(target=self._forth, args=(client, server, cut), daemon=True).start()
            threading.Thread(target=_back, args=(server, client, cut), daemon=True).start()

    def _forth(self, client: socket.socket, server: socket.socket, cut: threading.Event) -> None:
        deciding = False
        for data in _received(client):
            deciding = deciding or b"pg_advisory_xact_lock" in data
            if deciding and b"COMMIT" in data:
                deciding = False
                if self._armed.is_set():
                    self._armed.clear()
                    cut.set()
            server.sendall(data)
        _end(server)


def _back(server: socket.socket, client: socket.socket, cut: threading.Event) -> None:
    for data in _received(server):
        if cut.is_set():  # the server has answered: it is done
            _end(client, server)
            return
        client.sendall(data)
    _end(client)


def _received(source: socket.socket) -> Iterator[bytes]:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            yield data


def _end(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
