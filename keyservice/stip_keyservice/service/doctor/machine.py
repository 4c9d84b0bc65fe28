"""Checks of the machine: its clock, its disk, what of memory may reach the disk, and the ports."""

from __future__ import annotations

import errno
import http.client
import json
import resource
import socket
import ssl
import time

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from stip_keyservice.service.doctor.checking import Finding, Patient, failed, passed, warned, worst
from stip_keyservice.service.doctor.state import last_entry_at
from stip_protocol.lease import CLOCK_SKEW

DRIFT_SECONDS = 0.05
"""Wall and monotonic time may differ by so much over `PAUSE_SECONDS`: NTP slews by 0.05 %, a step shows."""
PAUSE_SECONDS = 0.2
FREE_FAIL, FREE_WARN = 100 << 20, 1 << 30
CONNECT_SECONDS = 2.0


def clock(patient: Patient) -> Finding:
    """It moves, as fast as it should, and is not behind the audit log."""
    wall, steady = patient.wall(), patient.monotonic()
    time.sleep(PAUSE_SECONDS)
    moved, passed_by = patient.wall() - wall, patient.monotonic() - steady
    if abs(moved - passed_by) > DRIFT_SECONDS:
        found = f"moved {moved:.2f} s while {passed_by:.2f} s passed"
        return failed(found, "Find out what holds or steps the clock: leases and evidence are judged by it.")
    last = last_entry_at(patient)
    behind = 0 if last is None else last - int(patient.wall())
    if behind > CLOCK_SKEW:
        remedy = "Set the clock. If it is right and was ahead before, say so: `stip-keyservice audit-log accept-clock`."
        return failed(f"{behind} s behind the audit log's last entry: nothing is released", remedy)
    return passed("moves, and is not behind the audit log" if last is not None else "moves; nothing was decided yet")


def synchronization(patient: Patient) -> Finding:
    """NTP keeps the clock."""
    kept = patient.synchronized()
    if kept:
        return passed("kept by NTP")
    found = "cannot be told here (no timedatectl)" if kept is None else "not synchronized"
    return warned(found, "Run chrony or systemd-timesyncd against two sources at least, on the host of a container.")


def disk(patient: Patient) -> Finding:
    """There is room for the state: a full disk stops every decision."""
    free = patient.free(patient.home)
    found = f"{free / 2**30:.1f} GiB free at the home"
    if free < FREE_FAIL:
        return failed(found, "Make room now: without it no decision can be recorded, and none is made.")
    return warned(found, "Make room: decisions stop where the disk is full.") if free < FREE_WARN else passed(found)


def core_dumps(patient: Patient) -> Finding:
    """A crash writes no memory, which holds keys, to the disk."""
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if soft == 0:
        return passed("disabled for processes started from here")
    pattern = (patient.proc / "sys/kernel/core_pattern").read_text().strip()
    where = "a handler" if pattern.startswith("|") else "files"
    return warned(f"enabled, into {where}", "Set LimitCORE=0 in the service's unit (manifests/), or `ulimit -c 0`.")


def swap(patient: Patient) -> Finding:
    """No memory is swapped out in the clear."""
    devices = (patient.proc / "swaps").read_text().splitlines()[1:]
    if not devices:
        return passed("none")
    remedy = "Turn swap off, encrypt it under a key of this boot, or set MemorySwapMax=0 in the service's unit."
    return warned(f"{len(devices)} in use: keys in memory may be written there", remedy)


def ports(patient: Patient) -> Finding:
    """Both ports are free, or it is this service that listens."""
    if patient.settings is None:
        return warned("not checked: no configuration", "Name it: --config keyservice.toml.")
    serving = patient.settings.serving
    return worst([_port(serving.listen, "gRPC", patient), _port(serving.metrics, "metrics", patient)])


def _port(address: str, name: str, patient: Patient) -> Finding:
    host, _, text = address.rpartition(":")
    host, port = host.strip("[]"), int(text)
    if port == 0:
        return passed(f"{name}: any free port")
    try:
        with socket.create_connection((_reachable(host), port), CONNECT_SECONDS) as connection:
            ours = _same_certificate(connection, patient) if name == "gRPC" else _answers_probes(host, port)
    except OSError:
        return _bindable(host, port, name)
    remedy = "Stop that process, or choose another port in [serving]."
    return (
        passed(f"{name}: this service listens") if ours else failed(f"{name}: {address} is another process's", remedy)
    )


def _bindable(host: str, port: int, name: str) -> Finding:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, "unknown")
        return failed(
            f"{name}: {host}:{port} cannot be bound ({reason})", "Choose an address of this host, and a free port."
        )
    return passed(f"{name}: free")


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - what is bound, seen from here


def _same_certificate(connection: socket.socket, patient: Patient) -> bool:
    """Whether whoever listens has the home's certificate. Nothing is sent to them but a handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is compared with the one on the disk
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection) as secured:
            shown = secured.getpeercert(binary_form=True)
    except (ssl.SSLError, OSError):
        return False
    stored = x509.load_pem_x509_certificates((patient.home / "tls.pem").read_bytes())[0]
    return shown == stored.public_bytes(Encoding.DER)


def _answers_probes(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(_reachable(host), port, timeout=CONNECT_SECONDS)
    try:
        connection.request("GET", "/livez")
        document = json.loads(connection.getresponse().read(1 << 16))
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()
    return isinstance(document, dict) and "checks" in document
