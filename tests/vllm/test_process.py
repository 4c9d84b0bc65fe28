"""`stip-server serve` with vLLM as a process of its own: a session over TLS, and what is left when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import signal
import stat
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_protocol.rpc import channel
from stip_protocol.wire import model_pb2 as wire
from stip_protocol.wire import model_pb2_grpc
from stip_server.engine import Form
from tests.server.links import Pki
from tests.vllm.conftest import DEVELOPER

pytestmark = pytest.mark.timeout(300)
PROMPT = [(5 * i + 1) % 211 for i in range(40)]
HANDLE = b"h" * 16
CONFIG = """
name = "replica-1"
instance = "{instance}"
developer_key = "developer.pub"
certificate = "server.pem"
private_key = "server.key"
client_ca = "ca.pem"
simulated = true
[serving]
drain_seconds = 20
[engine]
kind = "vllm"
slots = 4
memory_gb = 0.05
compiled = false
threads = 1
"""


def scratch(tmp_path: Path) -> Path:
    """The server's folder for temporary files. Not below `tmp_path`, whose name is too long for a socket's."""
    folder = Path(tempfile.gettempdir()) / f"scratch-{tmp_path.name[-8:]}"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, instance: Path, pki: Pki) -> AsyncIterator[tuple[asyncio.subprocess.Process, Any]]:
    """A server that listens, and what it announced."""
    files = {"ca.pem": pki.ca, "server.pem": pki.server[0], "server.key": pki.server[1]}
    files["developer.pub"] = DEVELOPER.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "server.toml").write_text(CONFIG.format(instance=instance))
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "stip_server.cli", "serve", "--config", str(tmp_path / "server.toml")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(scratch(tmp_path))},
    )
    try:
        assert server.stdout is not None
        line = await server.stdout.readline()
        assert line, (await server.communicate())[1].decode()[-3000:]
        yield server, json.loads(line)
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()


def listening(*processes: int) -> set[str]:
    """Addresses at which any of these processes takes connections."""
    found = (each for pid in processes for each in psutil.Process(pid).net_connections("inet"))
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}


def family(server: asyncio.subprocess.Process) -> list[psutil.Process]:
    """The server's processes but itself."""
    return psutil.Process(server.pid).children(recursive=True)


async def said(address: str, pki: Pki, instance: Any, prompt: list[int], count: int) -> list[int]:
    """A session of the gRPC service from its opening to the end of a generation."""
    async with channel(address, roots=pki.ca, identity=pki.client, server_name="localhost") as made:
        stub = model_pb2_grpc.ModelStub(made)  # type: ignore[no-untyped-call]
        card = await stub.Describe(wire.InstanceRef(instance=instance.files.instance, epoch=instance.files.epoch))
        link = stub.Link(metadata=(("stip-instance", card.instance), ("stip-epoch", str(card.epoch))))
        opened = wire.Open(session=HANDLE, output=wire.OUTPUT_IDS, max_positions=128)
        await link.write(wire.Up(open=opened))
        piece = wire.Slice(session=HANDLE, position=0, count=len(prompt))
        await link.write(wire.Up(feed=wire.Feed(slices=[piece], ids=np.array(prompt, "<u4").tobytes())))
        await link.write(wire.Up(generate=wire.Generate(session=HANDLE, position=len(prompt), max_ids=count)))
        assert (await link.read()).WhichOneof("body") == "opened"
        ids: list[int] = []
        while True:
            down = await link.read()
            assert down.WhichOneof("body") == "fed", down
            ids += np.frombuffer(down.fed.ids.ids, "<u4").tolist()
            if down.fed.slices[0].done:
                await link.write(wire.Up(close=wire.Close(session=HANDLE)))
                return ids


async def test_a_served_instance_answers_and_leaves_nothing_behind(tmp_path: Path, make_instance: Any) -> None:
    instance, pki = make_instance(Form.IDS), Pki.make()
    async with serving(tmp_path, instance.directory, pki) as (server, line):
        prompt = instance.permuted[PROMPT].tolist()
        ids = await said(line["address"], pki, instance, prompt, 30)
        assert instance.true[ids].tolist() == instance.said(PROMPT, 30)
        processes = family(server)
        assert processes
        (private,) = scratch(tmp_path).iterdir()
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        found = listening(server.pid, *(each.pid for each in processes))
        assert found
        assert all(ipaddress.ip_address(each.removeprefix("::ffff:")).is_loopback for each in found)
        server.send_signal(signal.SIGTERM)
        _, logs = await server.communicate()
        assert server.returncode == 0, logs.decode()[-3000:]
    psutil.wait_procs(processes, timeout=20)
    assert [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []
    assert list(scratch(tmp_path).iterdir()) == []
    entries = [entry for entry in logs.decode().splitlines() if entry.startswith("{")]
    assert {"loaded", "session opened", "stopped"} <= {json.loads(entry)["event"] for entry in entries}
    assert str(ids[:3])[1:-1] not in logs.decode()


async def test_a_killed_server_takes_vllm_with_it(tmp_path: Path, make_instance: Any) -> None:
    async with serving(tmp_path, make_instance(Form.HIDDEN).directory, Pki.make()) as (server, _):
        processes = family(server)
        assert processes
        server.kill()
        await server.wait()
    psutil.wait_procs(processes, timeout=20)
    assert [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []


async def test_vllm_that_dies_takes_the_server_with_it(tmp_path: Path, make_instance: Any) -> None:
    async with serving(tmp_path, make_instance(Form.HIDDEN).directory, Pki.make()) as (server, _):
        core = max(family(server), key=lambda each: each.memory_info().rss)
        core.kill()
        _, logs = await server.communicate()
        assert server.returncode != 0
    assert "engine failed" in logs.decode()
