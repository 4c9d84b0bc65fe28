"""What every part does the same way: configuration, logs, metrics, errors over gRPC, draining."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from prometheus_client import CollectorRegistry, Counter

from stip_protocol import telemetry
from stip_protocol.errors import ConfigurationError, TensorInvalid
from stip_protocol.runtime import metrics
from stip_protocol.runtime.config import ConfigPath, Serving, Settings, load
from stip_protocol.runtime.files import FILE_LIMIT, read_ed25519, read_file, read_x25519
from stip_protocol.runtime.metrics import MetricsServer
from stip_protocol.telemetry import Metric, Telemetry
from stip_protocol.tensor import FRAME_LIMIT, require_rows, row_bytes, rows_per_frame


class Example(Settings):
    serving: Serving = Serving()
    where: ConfigPath
    count: int = 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('where = "x"\nunknown = 1', "unknown"),
        ('where = "x"\ncount = "many"', "count"),
        ("count = 1", "where"),
        ('where = "x"\n[serving]\nlisten = "nowhere"', "serving.listen"),
        ('where = "x"\n[serving]\nlisten = "host:65536"', "serving.listen"),
        ('where = "~nobody-has-this-name/x"', "where"),
        ("not toml", "TOML"),
    ],
)
def test_a_wrong_configuration_names_the_file_and_the_field(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "part.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=named) as caught:
        load(Example, path)
    assert str(path) in str(caught.value)


def test_relative_paths_are_relative_to_their_file(tmp_path: Path) -> None:
    (tmp_path / "part.toml").write_text('where = "keys/a.pem"')
    assert load(Example, tmp_path / "part.toml").where == tmp_path / "keys/a.pem"
    with pytest.raises(ConfigurationError, match="No such file"):
        load(Example, tmp_path / "missing.toml")


def test_a_file_that_is_missing_empty_or_too_large_is_refused_by_its_field(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(bytes(FILE_LIMIT + 1))
    for name, said in (("missing", "No such file"), ("empty", "an empty file"), ("large", "more than")):
        with pytest.raises(ConfigurationError, match=said) as caught:
            read_file(tmp_path / name, field="certificate")
        assert str(caught.value).startswith(f"certificate: {tmp_path / name}")


def test_only_an_ed25519_public_key_in_pem_is_one(tmp_path: Path) -> None:
    path = tmp_path / "key.pub"
    key = Ed25519PrivateKey.generate().public_key()
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    spki = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for data in (b"no PEM", key.public_bytes_raw(), other.public_bytes(*spki)):
        path.write_bytes(data)
        for read in (read_ed25519, read_x25519):
            with pytest.raises(ConfigurationError, match="service_key"):
                read(path, field="service_key")
    path.write_bytes(key.public_bytes(*spki))
    assert read_ed25519(path, field="service_key") == key


LOGGING = """
import asyncio, logging, structlog
from stip_protocol.errors import LeaseSpent
from stip_protocol.runtime import logs
logs.configure("enclave", simulated=True)
log = structlog.get_logger()
structlog.contextvars.bind_contextvars(request_id="ab")
log.info("opened", sessions=1)
try:
    raise ValueError("the prompt is SENTINEL")
except ValueError as error:
    log.error("failed", fault=logs.fault(error))
    log.error("failed with its exception", exc_info=True)
    logging.getLogger("asyncio").error("Task exception SENTINEL", exc_info=True)
log.warning("refused", fault=logs.fault(LeaseSpent("lease tokens: got 2, allowed: at most 1")))
async def main():
    raise RuntimeError("SENTINEL in a task")
asyncio.run(main())
"""


def test_logs_say_where_something_failed_and_never_with_which_value() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(LOGGING)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "SENTINEL" not in done.stderr + done.stdout
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all(line["part"] == "enclave" and line["simulated"] is True for line in lines)
    assert lines[0]["event"] == "opened"
    assert lines[0]["request_id"] == "ab"
    assert [line["fault"].split(" at <")[0] for line in lines if "fault" in line] == [
        "ValueError",
        "ValueError",
        "ValueError",
        "lease tokens: got 2, allowed: at most 1 [lease_spent]",
        "RuntimeError",
    ]


OTHER_WAYS_OUT = """
import gc, logging, threading, warnings
from stip_protocol.runtime import logs
logs.configure("enclave", simulated=True)
def fail():
    raise ValueError("SENTINEL")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
class Dying:
    def __del__(self):
        fail()
Dying()
gc.collect()
warnings.warn("SENTINEL")
logging.getLogger("library").error("%d", "SENTINEL")
"""


def test_threads_finalizers_warnings_and_broken_records_say_nothing_of_values() -> None:
    done = subprocess.run([sys.executable, "-c", OTHER_WAYS_OUT], capture_output=True, text=True, check=True)
    assert "SENTINEL" not in done.stderr + done.stdout
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"].split(" at ")[0] for line in lines] == [
        "uncaught in a thread",
        "uncaught in a finalizer",
        "py.warnings",
    ]
    assert [line["fault"].split(" at ")[0] for line in lines if "fault" in line] == ["ValueError", "ValueError"]


def test_connections_that_say_nothing_are_bounded_and_keep_no_scraper_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CONNECTIONS", 8)
    before = threading.active_count()
    served = MetricsServer("127.0.0.1", 0, CollectorRegistry(), lambda: True, snapshot_seconds=0)
    host, port = served.address.rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            idle = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            with contextlib.suppress(OSError):
                idle.sendall(b"GET /me")
        deadline, answered = time.monotonic() + 10, False
        while not answered:
            assert time.monotonic() < deadline
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://{served.address}/healthz", timeout=5) as answer,
            ):
                answered = answer.status == 200
        assert threading.active_count() - before <= 8 + 1  # and the one that accepts
    served.stop()


def test_a_scraper_that_hangs_up_leaves_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    served = MetricsServer("127.0.0.1", 0, CollectorRegistry(), lambda: True, snapshot_seconds=0)
    try:
        host, port = served.address.split(":")
        for _ in range(20):
            with socket.create_connection((host, int(port))) as scraper:
                scraper.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
                scraper.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert fetch(served.address, "/healthz")[0] == 200
    finally:
        served.stop()
    assert "Traceback" not in capfd.readouterr().err


def fetch(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_scrapes_within_the_snapshot_time_see_the_same_numbers() -> None:
    registry = CollectorRegistry()
    counter = Counter("stip_test_total", "test", registry=registry)
    healthy = [True]
    slow = MetricsServer("127.0.0.1", 0, registry, lambda: healthy[0], snapshot_seconds=3600)
    quick = MetricsServer("127.0.0.1", 0, registry, lambda: healthy[0], snapshot_seconds=0)
    try:
        before = fetch(slow.address, "/metrics")
        counter.inc()
        assert fetch(slow.address, "/metrics") == before
        assert "stip_test_total 1.0" in fetch(quick.address, "/metrics")[1]
        assert fetch(quick.address, "/healthz")[0] == 200
        healthy[0] = False
        assert fetch(quick.address, "/healthz")[0] == 503
        assert fetch(quick.address, "/other")[0] == 404
    finally:
        slow.stop()
        quick.stop()


def declared() -> list[Metric]:
    return [value for value in vars(telemetry).values() if isinstance(value, Metric)]


def test_every_metric_follows_the_conventions_and_has_no_label_for_a_person() -> None:
    for metric in declared():
        assert metric.name.startswith("stip_")
        assert set(metric.labels) <= {"stage", "code", "kind", "direction", "event", "check", "result"}
    for stage, (part, _) in telemetry.STAGES.items():
        made = Telemetry(part, simulated=False)
        made.stage(stage).observe(0.001)
    with pytest.raises(KeyError):
        Telemetry("gateway", simulated=False).stage("head")


def test_simulation_is_a_metric_of_every_serving_part() -> None:
    for part in telemetry.SERVING:
        for simulated in (True, False):
            value = Telemetry(part, simulated=simulated).registry.get_sample_value("stip_simulation")
            assert value == int(simulated)


def test_rows_are_measured_before_they_are_looked_at() -> None:
    require_rows(bytes(2 * 4 * 8), 2, "float32", 8, what="rows")
    with pytest.raises(TensorInvalid, match="rows"):
        require_rows(bytes(63), 2, "float32", 8, what="rows")
    with pytest.raises(TensorInvalid, match="dtype"):
        row_bytes("complex64", 8)
    assert rows_per_frame("bfloat16", 4096) * row_bytes("bfloat16", 4096) <= FRAME_LIMIT
    assert rows_per_frame("float64", FRAME_LIMIT) == 1


LEAVING = """
import asyncio, signal
from stip_protocol.runtime import logs
from stip_protocol.runtime.serving import leave_with
logs.configure("gateway", simulated=False)
async def fails(): raise ValueError("SENTINEL")
async def waits(): await asyncio.sleep(3600)
async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    cancelled = asyncio.create_task(waits())
    leave_with(cancelled, "cancelled task")
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    assert not stop.is_set()
    leave_with(asyncio.create_task(fails()), "routing table")
    await asyncio.wait_for(stop.wait(), 30)
asyncio.run(main())
"""


def test_a_part_leaves_when_a_task_it_cannot_do_without_fails_and_says_which() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert line["event"] == "routing table failed"
    assert line["fault"].startswith("ValueError")
    assert "SENTINEL" not in done.stderr
