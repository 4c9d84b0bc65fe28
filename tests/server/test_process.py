"""`stip-server serve` as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_protocol.manifest import Manifest, file_digest
from stip_protocol.rpc import channel
from stip_protocol.wire import model_pb2 as wire
from stip_protocol.wire import model_pb2_grpc

KEY = Ed25519PrivateKey.generate()
INSTANCE = "cd" * 16
HANDLE = b"h" * 16


@pytest.fixture
def config(tmp_path: Path, llama: Any, pki: Any) -> Path:
    server = tmp_path / "instance" / "server"
    llama.model.base_model.save_pretrained(server)
    Manifest(
        instance=INSTANCE,
        epoch=1,
        preset="hardened",
        dtype="float32",
        width=48,
        vocabulary=211,
        max_positions=64,
        output="hidden",
        server={path.name: file_digest(path) for path in server.iterdir()},
        enclave={},
        certificate={},
    ).write(tmp_path / "instance" / "manifest.json", KEY)
    files = {"ca.pem": pki.ca, "server.pem": pki.server[0], "server.key": pki.server[1]}
    files["developer.pub"] = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path / "server.toml"
    path.write_text("""
name = "replica-1"
instance = "instance"
developer_key = "developer.pub"
certificate = "server.pem"
private_key = "server.key"
client_ca = "ca.pem"
simulated = true
[serving]
metrics_snapshot_seconds = 0
drain_seconds = 20
[engine]
slots = 2
threads = 1
""")
    return path


def edit(config: Path, old: str, new: str) -> None:
    config.write_text(config.read_text().replace(old, new))


@contextlib.asynccontextmanager
async def process(config: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "stip_server.cli", "serve", "--config", str(config)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def test_a_served_instance_answers_and_drains_on_sigterm(config: Path, llama: Any, pki: Any) -> None:
    async with process(config) as server:
        assert server.stdout is not None
        line = json.loads(await server.stdout.readline())
        assert (line["event"], line["part"]) == ("listening", "server")
        async with channel(line["address"], roots=pki.ca, identity=pki.client, server_name="localhost") as made:
            stub = model_pb2_grpc.ModelStub(made)  # type: ignore[no-untyped-call]
            card = await stub.Describe(wire.InstanceRef(instance=INSTANCE, epoch=1))
            assert (card.preset, card.max_positions, card.max_sessions, card.vocabulary) == ("hardened", 64, 2, 0)
            link = stub.Link(metadata=(("stip-instance", INSTANCE), ("stip-epoch", "1")))
            opened = wire.Open(session=HANDLE, output=wire.OUTPUT_HIDDEN, max_positions=64)
            await link.write(wire.Up(open=opened))
            assert (await link.read()).WhichOneof("body") == "opened"

            def metrics() -> str:
                with urllib.request.urlopen(f"http://{line['metrics']}/metrics", timeout=5) as page:
                    return str(page.read().decode())

            text = await asyncio.to_thread(metrics)
            assert "stip_simulation 1.0" in text
            assert "stip_sessions 1.0" in text

            server.send_signal(signal.SIGTERM)
            assert (await link.read()).drain.seconds == 20
            piece = wire.Slice(session=HANDLE, position=0, count=3, outputs=1)
            await link.write(wire.Up(feed=wire.Feed(slices=[piece], rows=llama.rows([1, 2, 3]))))
            assert len((await link.read()).fed.hidden) == card.width * 4
            await link.write(wire.Up(close=wire.Close(session=HANDLE)))
            _, logs = await server.communicate()
        assert server.returncode == 0
    entries = [json.loads(entry) for entry in logs.decode().splitlines() if entry.startswith("{")]
    assert {"loaded", "listening", "session opened", "draining", "session ended", "stopped"} <= {
        entry["event"] for entry in entries
    }
    assert all(entry["simulated"] and entry["part"] == "server" for entry in entries)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        pytest.param("slots = 2", "slots = 0", "engine.transformers.slots", id="a value out of range"),
        pytest.param("slots = 2", "slot = 2", "engine.transformers.slot", id="an unknown key"),
        pytest.param('"developer.pub"', '"ca.pem"', "developer_key", id="no Ed25519 key"),
    ],
)
async def test_a_wrong_configuration_exits_2_and_names_the_field(config: Path, old: str, new: str, said: str) -> None:
    edit(config, old, new)
    async with process(config) as server:
        out, err = await server.communicate()
        assert (server.returncode, out) == (2, b"")
        assert said in err.decode()
        assert "Traceback" not in err.decode()
