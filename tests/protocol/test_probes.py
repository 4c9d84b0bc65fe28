"""Probes: what they say of a part, in bounded time, and without what a check must not say."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stip_protocol import rpc
from stip_protocol.errors import Unavailable
from stip_protocol.runtime import serving
from stip_protocol.runtime.config import Serving
from stip_protocol.runtime.probes import Check, Runner
from stip_protocol.telemetry import Telemetry


def fetch(address: str, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def refuse() -> str | None:
    raise Unavailable("state: the database is busy")


def leak() -> str | None:
    raise ValueError("SENTINEL")


def test_an_answer_names_each_check_and_why_one_fails_but_quotes_no_exception() -> None:
    checks = [
        Check("policy", lambda: None),
        Check("store", refuse),
        Check("vault", leak),
        Check("replicas", lambda: "no replica answers"),
    ]
    answer = Runner(checks).answer()
    assert not answer.good
    assert answer.checks["policy"] is None
    assert answer.checks["store"] == "state: the database is busy"
    assert (answer.checks["vault"] or "").startswith("ValueError at test_probes.py:")
    assert "SENTINEL" not in json.dumps(answer.document())
    assert answer.document()["checks"][3] == {
        "name": "replicas",
        "status": "failing",
        "reason": "no replica answers",
    }


def test_a_check_that_hangs_is_given_up_and_holds_one_thread_however_often_it_is_asked() -> None:
    release, begun = threading.Event(), []

    def hang() -> str | None:
        begun.append(1)
        release.wait(30)
        return None

    runner = Runner([Check("store", hang), Check("policy", lambda: None)], seconds=0.05)
    try:
        for _ in range(3):
            answer = runner.answer()
            assert answer.checks == {"store": "no answer within 0.05 s", "policy": None}
            runner._kept = None  # as after a second
        assert begun == [1]
    finally:
        release.set()
    until(lambda: _fresh(runner).good)


def test_what_a_check_said_too_late_is_not_told_as_if_it_were_so_now() -> None:
    release, answers = threading.Event(), [None, "the database has gone"]

    def slow() -> str | None:
        found = answers.pop(0)
        release.wait(30)
        return found

    runner = Runner([Check("store", slow)], seconds=0.05)
    assert runner.answer().checks == {"store": "no answer within 0.05 s"}
    release.set()
    until(runner._running["store"].done.is_set)
    assert _fresh(runner).checks == {"store": "the database has gone"}


def _fresh(runner: Runner) -> Any:
    runner._kept = None
    return runner.answer()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def credentials() -> tuple[bytes, bytes]:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), private


async def test_ready_and_grpc_health_follow_the_checks_while_live_and_startup_stand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "READY_SECONDS", 0.05)
    failing: list[str | None] = ["no replica answers"]
    telemetry = Telemetry("gateway", simulated=False)
    certificate, key = credentials()
    drained = asyncio.Event()

    async def drain() -> None:
        drained.set()

    running = asyncio.create_task(
        serving.serve(
            Serving(metrics_snapshot_seconds=0),
            telemetry,
            rpc.server_credentials(certificate, key, client_ca=None),
            lambda server: None,
            drain,
            ready=[Check("replicas", lambda: failing[0])],
        )
    )
    announced: dict[str, str] = {}
    async with asyncio.timeout(20):
        while not announced:
            await asyncio.sleep(0.02)
            out = capsys.readouterr().out
            announced = next((json.loads(line) for line in out.splitlines() if line.startswith("{")), {})

        async def probe(path: str) -> tuple[int, Any]:
            return await asyncio.to_thread(fetch, announced["metrics"], path)

        assert (await probe("/livez"))[0] == 200
        assert (await probe("/startupz"))[0] == 200
        status, document = await probe("/readyz")
        assert (status, document["status"]) == (503, "failing")
        assert document["checks"][1]["reason"] == "no replica answers"
        async with rpc.channel(announced["address"], roots=certificate, server_name="localhost") as channel:
            health = health_pb2_grpc.HealthStub(channel)

            async def served() -> int:
                return int((await health.Check(health_pb2.HealthCheckRequest())).status)

            assert await served() == health_pb2.HealthCheckResponse.NOT_SERVING
            assert telemetry.registry.get_sample_value("stip_ready", {"check": "replicas"}) == 0
            failing[0] = None
            while await served() != health_pb2.HealthCheckResponse.SERVING:  # noqa: ASYNC110 - a deadline is set
                await asyncio.sleep(0.05)
            while (await probe("/readyz"))[0] != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            assert telemetry.registry.get_sample_value("stip_ready", {"check": "replicas"}) == 1
        signal.raise_signal(signal.SIGTERM)
        await running
    assert drained.is_set()
