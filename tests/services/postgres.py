"""A PostgreSQL server of the tests' own, from the installed package, under its own user."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import URL

START_SECONDS = 60
PASSWORD = "a password that the tests made up"


@dataclass(frozen=True)
class Server:
    folder: Path
    port: int

    def url(self, name: str, **query: str) -> URL:
        """Over the socket, as the server's superuser, whom it trusts there."""
        given = {"host": str(self.folder), "port": str(self.port)} | query
        return URL.create("postgresql+psycopg", username="stip", database=name, query=given)

    def run(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """One statement, outside of any transaction."""
        with psycopg.connect(
            host=str(self.folder), port=self.port, user="stip", dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def database(self) -> str:
        """The name of a fresh, empty database."""
        name = f"test_{secrets.token_hex(6)}"
        self.run(f"CREATE DATABASE {name}")
        return name


def binaries() -> Path | None:
    """Where `initdb` and `postgres` are; Debian keeps them off PATH."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


def server() -> Iterator[Server]:
    """Started, until the generator ends. Skips where PostgreSQL is not installed."""
    found = binaries()
    if found is None:
        pytest.skip("PostgreSQL is not installed; `make services` installs it where root and apt are there")
    owner = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    try:
        account = pwd.getpwnam(owner)
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres; `make services`")
    folder = Path(tempfile.mkdtemp(prefix="stip-pg-"))
    os.chown(folder, account.pw_uid, account.pw_gid)
    (folder / "password").write_text(PASSWORD)
    os.chown(folder / "password", account.pw_uid, account.pw_gid)
    as_owner = {"user": owner, "group": account.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    initdb = [str(found / "initdb"), "-D", str(folder / "data"), "-U", "stip", "--pwfile", str(folder / "password")]
    initdb += ["--auth-local=trust", "--auth-host=scram-sha-256", "--no-sync", "-E", "UTF8", "--locale=C"]
    subprocess.run(initdb, check=True, capture_output=True, cwd="/", **as_owner)  # type: ignore[call-overload]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    settings = [
        "listen_addresses=127.0.0.1", f"port={port}", f"unix_socket_directories={folder}", "max_connections=80",
        "shared_buffers=16MB", "max_wal_size=64MB",
    ]  # fmt: skip
    command = [str(found / "postgres"), "-D", str(folder / "data"), *(f"--{one}" for one in settings)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **as_owner)  # type: ignore[call-overload]
    made = Server(folder, port)
    try:
        _await(made, process)
        yield made
    finally:
        process.send_signal(signal.SIGQUIT)  # immediate shutdown
        process.wait(30)
        shutil.rmtree(folder)


def _await(made: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            made.run("SELECT 1")
        except psycopg.OperationalError:
            assert process.poll() is None, (made.folder / "log").read_text()
            assert time.monotonic() < end, (made.folder / "log").read_text()
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    yield from server()
