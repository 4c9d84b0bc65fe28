"""No secret in anything that leaves the service but the sealed bundle: every refusal there is, and a sweep."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import structlog
from prometheus_client import generate_latest
from sqlalchemy import make_url

from stip_keyservice.home import Home
from stip_keyservice.rootkey.asking import read_line
from stip_keyservice.rootkey.settings import Pkcs11Settings, SharesSettings
from stip_keyservice.rootkey.shares import combine
from stip_keyservice.service.auditlog import AuditLog
from stip_keyservice.service.doctor.checking import Patient, examine
from stip_keyservice.service.doctor.table import CHECKS
from stip_keyservice.service.state.store import Store
from stip_protocol import rpc
from stip_protocol.errors import StipError
from stip_protocol.keys.stream import derive
from stip_protocol.runtime import logs
from stip_protocol.secrets_file import PART_LABEL

from .conftest import START, World
from .test_release import REFUSALS, Scene


def forms(secret: bytes) -> list[bytes]:
    """How a secret could show: raw, in hex, in base64 at any offset, as Python prints it."""
    encoded = [base64.b64encode(bytes(shift) + secret)[4:-4] for shift in range(3)]
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), *encoded, repr(secret)[2:-1].encode()]


def leaks(secrets: dict[str, bytes], places: dict[str, bytes]) -> list[tuple[str, str]]:
    return [
        (name, place)
        for name, secret in secrets.items()
        for place, text in places.items()
        if any(form in text for form in forms(secret))
    ]


async def test_no_refusal_puts_a_secret_in_logs_metrics_errors_or_the_audit_log(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("keyservice", simulated=True, level="debug")
    log, told = structlog.get_logger(), []
    secrets: dict[str, bytes] = {
        "root key": world.home.root.material(),
        "service key": world.home.service.private_bytes_raw(),
        "sealing key": world.home.sealing.private_bytes_raw(),
        "developer key": world.home.developer.private_bytes_raw(),
        "nonce key": world.servicer._issuer._nonces._key if world.servicer is not None else b"",
    }
    for number, (attempt, _) in enumerate(REFUSALS):
        alice, mallory = world.person(f"alice{number}"), world.person(f"mallory{number}")
        scene = Scene(world, alice, mallory, world.enclave(), world.instance(owner=alice))
        secrets |= {
            f"user key {number}": alice.key.private_bytes_raw(),
            f"instance root {number}": scene.instance.root,
            f"grant {number}": derive(scene.instance.root, PART_LABEL),
            f"HPKE key {number}": scene.enclave.hpke.private_bytes_raw(),
            f"nonce tag {number}": (await world.challenge()).nonce[16:],
        }
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await attempt(scene)
        error = rpc.from_rpc(caught.value)
        log.warning("refused", code=error.code, fault=logs.fault(error), exc_info=error)
        told.append(f"{caught.value.details()} {caught.value.debug_error_string()} {error!r}")
        if world.clock.now > START:
            AuditLog(world.store, world.home.service).accept_clock(now=START, reason="the test turned it")
            world.clock.now = START
    assert world.servicer is not None
    world.servicer._issuer.close()  # what was folded becomes entries, too
    entries = [entry.to_bytes() for entry in world.entries()]
    said = " ".join(f"{entry.code} {entry.detail}" for entry in world.entries())
    assert all(code in said for _, code in REFUSALS if code != "frame_invalid")
    places = {
        "logs": capsys.readouterr().err.encode(),
        "metrics": generate_latest(world.telemetry.registry),
        "errors": "\n".join(told).encode(),
        "audit log": b"\n".join(entries),
        "reprs": repr((world.home, world.store, world.servicer, world.vault)).encode(),
    }
    assert b"refused" in places["logs"]
    assert leaks(secrets, places) == []
    for name, secret in secrets.items():  # the sweep finds what it looks for
        for form in forms(secret):
            assert (name, "logs") in leaks({name: secret}, {"logs": b"oops " + form + b" there"})


PIN, PASSWORD = b"493-771-PIN", b"a-database-password"
WORDS = b"academic acid acrobat romp check network"


def share_words(folder: Path) -> None:
    settings = SharesSettings(public_key="00" * 32, threshold=2, shares=3)
    combine(settings, [WORDS.decode()])


def pin_file_of_two_lines(folder: Path) -> None:
    path = folder / "pin"
    path.write_bytes(PIN + b"\n" + PIN)
    path.chmod(0o600)
    read_line(path, "PIN")


def pin_file_that_others_read(folder: Path) -> None:
    path = folder / "pin"
    path.write_bytes(PIN)
    path.chmod(0o644)
    read_line(path, "PIN")


def pin_in_place_of_a_path(folder: Path) -> None:
    Home.open(folder / "home")
    toml = f'version = 1\n[root_key]\nkind = "pkcs11"\nmodule = "/no"\ntoken = "t"\npin = "{PIN.decode()}"\n'
    (folder / "home" / "home.toml").write_text(toml)
    (folder / "home" / "home.toml").chmod(0o600)
    Home.open(folder / "home")


def password_in_the_url(folder: Path) -> None:
    Store(make_url(f"postgresql+psycopg://stip:{PASSWORD.decode()}@127.0.0.1:1/stip"))


def server_that_does_not_answer(folder: Path) -> None:
    (folder / "password").write_bytes(PASSWORD)
    (folder / "password").chmod(0o600)
    Store(make_url("postgresql+psycopg://stip@127.0.0.1:1/stip"), password_file=folder / "password")


@pytest.mark.parametrize(
    "attempt",
    [
        share_words,
        pin_file_of_two_lines,
        pin_file_that_others_read,
        pin_in_place_of_a_path,
        password_in_the_url,
        server_that_does_not_answer,
    ],
    ids=lambda attempt: attempt.__name__,
)
def test_what_people_type_is_never_quoted(
    attempt: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("keyservice", simulated=True, level="debug")
    with pytest.raises(StipError) as caught:
        attempt(tmp_path)
    structlog.get_logger().error("refused", exc_info=caught.value)
    findings: list[Any] = examine(Patient(tmp_path / "home"), CHECKS) if (tmp_path / "home").exists() else []
    said = f"{caught.value} {caught.value!r} {capsys.readouterr()} {findings}".encode()
    typed = {"PIN": PIN, "password": PASSWORD, "share": WORDS, "word": b"acrobat"}
    assert leaks(typed, {"messages": said}) == []


def test_settings_that_hold_secrets_do_not_show_them() -> None:
    wrapped = hashlib.sha256(b"wrapped").digest()
    kept = Pkcs11Settings.model_validate({"module": "/m", "token": "t", "wrapped": wrapped.hex()})
    assert wrapped.hex() not in repr(kept)
    assert json.loads(kept.model_dump_json())["token"] == "t"
