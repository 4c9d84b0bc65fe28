"""What the gateway adds to one round trip: the same rows to the same replica, straight and through the gateway.

`python -m benchmarks.hop` measures it on a server and a gateway of its own. Both ways are gone in turns, a block of
round trips each, and every other pair of blocks the other way round. The model between two round trips counts: one that
computes for long leaves every part's caches cold, and a cold crossing costs more than twice as much as a warm one.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from benchmarks.models import DEMO_MODEL
from stip_keyservice.service.linkca import issue_link_certificate
from stip_protocol import rpc
from stip_protocol.documents import Signed
from stip_protocol.lease import Lease
from stip_protocol.runtime import loop
from stip_protocol.tensor import row_bytes
from stip_protocol.wire import model_pb2, model_pb2_grpc
from stip_stack.processes import Process
from stip_stack.stack import BIN, Stack
from stip_stack.workspace import AUDIENCE, Published

LEASE_SECONDS = 900


@dataclass(frozen=True)
class Hop:
    """Round trips of one row, less the compute and the queue that the replica reports. Seconds."""

    straight: float
    """Median."""
    through: float
    straight_p95: float
    through_p95: float
    trips: int
    """Of each."""

    @property
    def added(self) -> float:
        """What the gateway and its additional TLS connection cost, both directions together."""
        return self.through - self.straight

    def __str__(self) -> str:
        return (
            f"p50 {self.straight * 1e3:.3f} ms straight, {self.through * 1e3:.3f} ms through the gateway: "
            f"{self.added * 1e3:+.3f} ms, {self.through / self.straight:.2f} times; "
            f"p95 {self.straight_p95 * 1e3:.3f} and {self.through_p95 * 1e3:.3f} ms ({self.trips} round trips each)"
        )


async def measure(stack: Stack, published: Published, server: str, *, blocks: int, trips: int) -> Hop:
    """`blocks` sessions of `trips` rows each way, in turns. Nothing else should be running.

    `stack` has the processes `server` and "gateway"; the gateway routes to that server alone.
    """
    operator = (stack.workspace.operator / "ca.pem").read_bytes()
    lease, link = _admission(stack, published, rows=blocks * trips)
    own = stack.workspace.identity("benchmark")
    straight: list[float] = []
    through: list[float] = []
    arms = (
        (stack.processes[server].address, (own.certificate, own.private_key), b"", straight),
        (stack.processes["gateway"].address, link, lease, through),
    )
    for block in range(blocks):
        for address, identity, signed, times in arms if block % 2 else reversed(arms):
            async with _link(address, operator, identity, published) as call:
                times.extend(await _trips(call, published, signed, trips))
    p50, p95 = (np.quantile((straight, through), q, axis=1).tolist() for q in (0.5, 0.95))
    return Hop(p50[0], p50[1], p95[0], p95[1], len(straight))


def _admission(stack: Stack, published: Published, *, rows: int) -> tuple[bytes, tuple[bytes, bytes]]:
    """A lease and a link certificate with its key (PEM), as the key service would release them."""
    home, now = stack.workspace.home, int(time.time())
    key = ec.generate_private_key(ec.SECP256R1())
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    lease = Lease(
        handle=secrets.token_bytes(16),
        serial=0,
        audience=AUDIENCE,
        instance=published.manifest.instance,
        epoch=published.manifest.epoch,
        manifest_digest=published.digest,
        link_key=hashlib.sha256(spki).digest(),
        not_before=now,
        expires=now + LEASE_SECONDS,
        tokens=rows,
        audit_head=bytes(32),
    )
    der = issue_link_certificate(home.link_ca, key.public_key(), now=now, expires=now + LEASE_SECONDS)
    certificate = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Signed.sign(lease, home.service).to_bytes(), (certificate, private)


@asynccontextmanager
async def _link(address: str, roots: bytes, identity: tuple[bytes, bytes], published: Published) -> AsyncIterator[Any]:
    channel = rpc.channel(address, roots=roots, identity=identity)
    manifest = published.manifest
    metadata = ((rpc.INSTANCE_KEY, manifest.instance), (rpc.EPOCH_KEY, str(manifest.epoch)))
    call: Any = model_pb2_grpc.ModelStub(channel).Link(metadata=metadata)
    try:
        yield call
    finally:
        call.cancel()
        await channel.close()


async def _trips(call: Any, published: Published, lease: bytes, trips: int) -> list[float]:
    manifest = published.manifest
    session = secrets.token_bytes(16)
    output = model_pb2.OUTPUT_HIDDEN if manifest.output == "hidden" else model_pb2.OUTPUT_TOP
    opening = model_pb2.Open(session=session, lease=lease, output=output, max_positions=trips)
    await call.write(model_pb2.Up(open=opening))
    down = await call.read()
    if not down.HasField("opened"):
        raise RuntimeError(f"the session was not opened: {down.closed.code}")
    row = bytes(row_bytes(manifest.dtype, manifest.width))
    times = []
    for position in range(trips):
        part = model_pb2.Slice(session=session, position=position, count=1, outputs=1)
        up = model_pb2.Up(feed=model_pb2.Feed(slices=[part], rows=row))
        began = time.perf_counter()
        await call.write(up)
        down = await call.read()
        seconds = time.perf_counter() - began
        if not down.HasField("fed"):
            raise RuntimeError(f"the session was ended: {down.closed.code}")
        times.append(seconds - (down.fed.compute_us + down.fed.queue_us) * 1e-6)
    return times


@click.command()
@click.option("--model", type=click.Path(path_type=Path, file_okay=False), default=DEMO_MODEL, help="A checkpoint.")
@click.option("--preset", default="hardened", show_default=True)
@click.option("--blocks", type=click.IntRange(1), default=16, show_default=True)
@click.option("--trips", type=click.IntRange(1), default=64, show_default=True, help="Of a block.")
def main(model: Path, preset: str, blocks: int, trips: int) -> None:
    """Measure what the gateway adds, and print it with the load of the machine before and after."""
    with tempfile.TemporaryDirectory(prefix="stip-hop-") as folder, Stack(Path(folder)) as stack:
        published = stack.protect(model, preset, "--samples", "1")
        server, workspace = "server-0-0", stack.workspace
        config = workspace.server(server, published, engine={"threads": 1, "max_positions": trips})
        stack.processes[server] = _started(stack, server, "stip-server", config)
        config = workspace.gateway({server: (stack.processes[server].address, published)})
        stack.processes["gateway"] = _started(stack, "gateway", "stip-gateway", config)
        before = os.getloadavg()[0]
        found = loop.run(measure(stack, published, server, blocks=blocks, trips=trips))
        click.echo(f"{found}; load {before:.2f} to {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")


def _started(stack: Stack, name: str, program: str, config: Path) -> Process:
    argv = [str(BIN / program), "serve", "--config", str(config)]
    process = Process(name, argv, stack.workspace.logs / f"{name}.jsonl", environment={"OMP_NUM_THREADS": "1"})
    process.wait_until_listening()
    return process


if __name__ == "__main__":
    main()
