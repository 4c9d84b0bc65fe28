"""The doctor: each thing broken on its own, and the verdict on it and on nothing else."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from stip_keyservice.certificates import issue_server_certificate
from stip_keyservice.cli import main
from stip_keyservice.home import Home
from stip_keyservice.service.auditlog import AuditLog, Trail
from stip_keyservice.service.config import KeyServiceSettings
from stip_keyservice.service.doctor.checking import Check, Patient, Verdict, examine, passed
from stip_keyservice.service.doctor.table import CHECKS
from stip_keyservice.service.state.store import Store
from stip_protocol.runtime.config import load

from .place import Place

NAMES = [check.name for check in CHECKS]


@dataclass
class Ward:
    """A sound key service to break, and the doctor's view of it."""

    place: Place
    patient: Patient

    def verdicts(self, **other: Any) -> dict[str, Verdict]:
        return {name: found.verdict for name, found in examine(replace(self.patient, **other), CHECKS)}

    def finding(self, name: str, **other: Any) -> tuple[Verdict, str, str]:
        (check,) = [check for check in CHECKS if check.name == name]
        ((_, found),) = examine(replace(self.patient, **other), [check])
        return found.verdict, found.found, found.remedy

    def reload(self) -> None:
        self.patient = replace(self.patient, settings=load(KeyServiceSettings, self.place.config))

    def sql(self, *statements: str) -> None:
        db = sqlite3.connect(self.place.home / "state.db", isolation_level=None)
        for statement in statements:
            db.execute(statement)
        db.close()


@pytest.fixture
def ward(place: Place) -> Ward:
    home = Home.open(place.home)
    home.tls("localhost")
    key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    store = Store(home.database)
    log = AuditLog(store, home.service)
    for number in range(3):
        with store.write() as db:
            log.append(db, Trail("user_added", int(time.time()) - 10 + number, {"detail": key.hex()}))
    store.close()
    patient = Patient(place.home, load(KeyServiceSettings, place.config), synchronized=lambda: True)
    return Ward(place, patient)


def test_a_sound_service_has_nothing_that_fails(ward: Ward) -> None:
    found = ward.verdicts()
    assert [name for name, verdict in found.items() if verdict is Verdict.FAIL] == []
    sound = {"clock", "clock synchronization", "home", "root key", "database", "durability", "audit log"}
    sound |= {"TLS certificate", "link authority", "ports", "disk space"}
    assert {found[name] for name in sound} == {Verdict.PASS}
    assert found["configuration"] is Verdict.WARN  # it is simulated


def wide_open(ward: Ward) -> None:
    (ward.place.home / "service.key").chmod(0o644)


def another_root_key(ward: Ward) -> None:
    (ward.place.home / "root.key").write_bytes(bytes(32))


def no_root_key(ward: Ward) -> None:
    (ward.place.home / "root.key").unlink()


def missing_key(ward: Ward) -> None:
    (ward.place.home / "sealing.key").unlink()


def no_database(ward: Ward) -> None:
    for path in ward.place.home.glob("state.db*"):
        path.unlink()
    (ward.place.home / "home.toml").touch(mode=0o600)


def no_database_at_all(ward: Ward) -> None:
    path = ward.place.home / "state.db"
    for each in ward.place.home.glob("state.db-*"):
        each.unlink()
    path.write_bytes(b"not a database, but long enough to be looked at " * 100)


def old_schema(ward: Ward) -> None:
    ward.sql(
        "UPDATE meta SET value = '1' WHERE key = 'schema_version'", "UPDATE alembic_version SET version_num = '0001'"
    )


def rollback_journal(ward: Ward) -> None:
    ward.sql("PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA journal_mode = DELETE")


def cut_log(ward: Ward) -> None:
    ward.sql("DELETE FROM audit WHERE sequence = 3")


def edited_log(ward: Ward) -> None:
    ward.sql("UPDATE audit SET hash = zeroblob(32) WHERE sequence = 2")


def headless_log(ward: Ward) -> None:
    ward.sql("DELETE FROM audit_head")


def broken_policy(ward: Ward) -> None:
    (ward.place.folder / "policy.toml").write_text("[evidence]\nmode = 'everything'\n")


def no_policy(ward: Ward) -> None:
    (ward.place.folder / "policy.toml").unlink()


def policy_for_another_root(ward: Ward) -> None:
    (ward.place.folder / "root.der").write_bytes(b"another")


def expired_certificate(ward: Ward) -> None:
    ward.patient = replace(ward.patient, wall=lambda: time.time() + 20 * 365 * 86400)


def another_key(ward: Ward) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    form = PrivateFormat.PKCS8, NoEncryption()
    (ward.place.home / "tls.key").write_bytes(other.private_bytes(Encoding.PEM, *form))


def another_name(ward: Ward) -> None:
    ward.place.config.write_text('dns_name = "keys.example.org"\n' + ward.place.config.read_text())
    ward.reload()


def foreign_chain(ward: Ward) -> None:
    home = Home.open(ward.place.home)
    one = issue_server_certificate(home.tls_ca, ec.generate_private_key(ec.SECP256R1()), "localhost")
    (ward.place.home / "tls.pem").write_bytes(
        one.split(b"-----END CERTIFICATE-----\n")[0] + b"-----END CERTIFICATE-----\n"
    )
    with (ward.place.home / "tls.pem").open("ab") as file:
        file.write(home.link_ca.pem)


def no_link_authority(ward: Ward) -> None:
    (ward.place.home / "link-ca.pem").write_bytes(b"nothing")


def full_disk(ward: Ward) -> None:
    ward.patient = replace(ward.patient, free=lambda path: 10 << 20)


def offline_without_collateral(ward: Ward) -> None:
    with ward.place.config.open("a") as file:
        file.write('\n[collateral]\ncache = "collateral"\n')
    ward.reload()


def foreign_address(ward: Ward) -> None:
    text = ward.place.config.read_text()
    ward.place.config.write_text(text.replace("[serving]\n", '[serving]\nlisten = "192.0.2.1:7443"\n'))
    ward.reload()


BROKEN: list[tuple[Callable[[Ward], None], set[str]]] = [
    (wide_open, {"home"}),
    (another_root_key, {"root key", "TLS certificate"}),
    (no_root_key, {"root key", "TLS certificate"}),
    (missing_key, {"root key"}),
    (no_database, {"database", "durability", "audit log", "root key"}),
    (no_database_at_all, {"database", "durability", "audit log", "root key"}),
    (old_schema, {"database"}),
    (cut_log, {"audit log"}),
    (edited_log, {"audit log"}),
    (headless_log, {"audit log"}),
    (broken_policy, {"policy"}),
    (no_policy, {"policy"}),
    (policy_for_another_root, {"policy"}),
    (expired_certificate, {"TLS certificate", "link authority"}),
    (another_key, {"TLS certificate"}),
    (another_name, {"TLS certificate"}),
    (foreign_chain, {"TLS certificate"}),
    (no_link_authority, {"link authority"}),
    (full_disk, {"disk space"}),
    (offline_without_collateral, {"collateral"}),
    (foreign_address, {"ports"}),
]


@pytest.mark.parametrize(("breaks", "failing"), BROKEN, ids=[breaks.__name__ for breaks, _ in BROKEN])
def test_what_is_broken_fails_with_a_remedy_and_nothing_else_does(
    ward: Ward, breaks: Callable[[Ward], None], failing: set[str]
) -> None:
    breaks(ward)
    found = dict(examine(ward.patient, CHECKS))
    assert {name for name, each in found.items() if each.verdict is Verdict.FAIL} == failing
    assert all(found[name].remedy for name in failing)
    assert list(found) == NAMES


def test_a_journal_that_other_software_changed_fails(ward: Ward) -> None:
    rollback_journal(ward)
    assert ward.finding("durability")[0] is Verdict.FAIL


def test_a_clock_that_stands_still_steps_or_was_set_back_fails(ward: Ward) -> None:
    now = time.time()
    assert ward.finding("clock", wall=lambda: now)[0] is Verdict.FAIL
    ticks = iter([0.0, 100.0])
    assert ward.finding("clock", wall=lambda: next(ticks))[0] is Verdict.FAIL
    verdict, found, remedy = ward.finding("clock", wall=lambda: time.time() - 3600)
    assert verdict is Verdict.FAIL
    assert "behind the audit log" in found
    assert "accept-clock" in remedy


@pytest.mark.parametrize("kept", [False, None])
def test_a_clock_that_nobody_keeps_is_a_warning(ward: Ward, kept: bool | None) -> None:
    assert ward.finding("clock synchronization", synchronized=lambda: kept)[0] is Verdict.WARN


def test_swap_and_a_nearly_full_disk_are_warnings(ward: Ward, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "swaps").write_text("Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n")
    assert ward.finding("swap", proc=tmp_path / "proc")[0] is Verdict.WARN
    (tmp_path / "proc" / "swaps").write_text("Filename Type Size Used Priority\n")
    assert ward.finding("swap", proc=tmp_path / "proc")[0] is Verdict.PASS
    assert ward.finding("disk space", free=lambda path: 500 << 20)[0] is Verdict.WARN


def test_another_process_on_the_port_fails_and_is_told_apart_from_this_service(ward: Ward) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        text = ward.place.config.read_text()
        ward.place.config.write_text(text.replace("[serving]\n", f'[serving]\nlisten = "127.0.0.1:{port}"\n'))
        ward.reload()

        def hang_up() -> None:
            connection, _ = stranger.accept()
            connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        verdict, found, _ = ward.finding("ports")
        assert (verdict, f"127.0.0.1:{port} is another process's" in found) == (Verdict.FAIL, True)
    assert ward.finding("ports")[0] is Verdict.PASS


def test_the_doctor_works_beside_the_running_service_and_knows_its_ports(ward: Ward) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = one.getsockname()[1], two.getsockname()[1]
    text = ward.place.config.read_text()
    listen = f'[serving]\nlisten = "127.0.0.1:{ports[0]}"\nmetrics = "127.0.0.1:{ports[1]}"\n'
    ward.place.config.write_text(text.replace("[serving]\n", listen))
    ward.reload()
    with ward.place.service():
        found = dict(examine(ward.patient, CHECKS))
        assert (found["ports"].verdict, found["ports"].found) == (Verdict.PASS, "gRPC: this service listens")
        assert [name for name, each in found.items() if each.verdict is Verdict.FAIL] == []


def test_a_check_that_raises_or_hangs_fails_alone_and_quotes_nothing() -> None:
    never = threading.Event()

    def raises(patient: Patient) -> Any:
        raise ValueError("SENTINEL")

    def hangs(patient: Patient) -> Any:
        never.wait(30)

    checks = [
        Check("raises", raises, "a"),
        Check("hangs", hangs, "b"),
        Check("fine", lambda patient: passed("ok"), "c"),
    ]
    found = dict(examine(Patient(Path("/nowhere")), checks, seconds=0.1))
    never.set()
    assert [each.verdict for each in found.values()] == [Verdict.FAIL, Verdict.FAIL, Verdict.PASS]
    assert found["raises"].found.startswith("ValueError at test_doctor.py")
    assert found["hangs"].found == "no answer within 0.1 s"


def as_garbage(path: Path) -> None:
    path.write_bytes(b"SENTINEL = [\x00\xff SENTINEL" * 40)


def as_nothing(path: Path) -> None:
    path.write_bytes(b"")


def as_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def as_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [as_garbage, as_nothing, as_a_folder, as_a_loop, as_a_pipe])
def test_a_home_of_which_nothing_is_left_as_it_was_is_examined_to_the_end(
    ward: Ward, spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    for path in [*ward.place.home.iterdir(), ward.place.folder / "policy.toml"]:
        if not path.is_dir():
            spoil(path)
    began = time.monotonic()
    found = examine(replace(ward.patient, proc=tmp_path / "no-proc"), CHECKS, seconds=1.5)
    assert time.monotonic() - began < 10
    assert [name for name, _ in found] == NAMES
    verdicts = {name: each.verdict for name, each in found}
    for name in ("root key", "audit log", "TLS certificate", "link authority", "policy", "swap"):
        assert verdicts[name] is not Verdict.PASS, name
    told = repr(found)
    assert "SENTINEL" not in told
    assert "Traceback" not in told
    assert all(each.remedy for _, each in found if each.verdict is not Verdict.PASS)


def test_the_command_exits_1_where_something_fails_and_changes_nothing(ward: Ward) -> None:
    def call(*arguments: str) -> tuple[int, Any]:
        done = CliRunner().invoke(main, ["doctor", *arguments, "--json"])
        return done.exit_code, json.loads(done.stdout)

    before = sorted(path.name for path in ward.place.home.iterdir())
    code, document = call("--config", str(ward.place.config))
    assert (code, [each["check"] for each in document]) == (0, NAMES)
    (ward.place.home / "link-ca.key").unlink()
    code, document = call("--home", str(ward.place.home))
    assert code == 1
    assert {each["check"] for each in document if each["verdict"] == "fail"} == {"root key"}
    assert "link-ca.key" not in {path.name for path in ward.place.home.iterdir()}  # the doctor makes none
    assert set(before) - {"link-ca.key"} <= {path.name for path in ward.place.home.iterdir()} | {
        "state.db-wal",
        "state.db-shm",
    }
    code, document = call("--home", str(ward.place.folder / "nothing"))
    assert code == 1
    assert not (ward.place.folder / "nothing").exists()
    (ward.place.config).write_text("colour = 'red'\n")
    code, document = call("--config", str(ward.place.config), "--home", str(ward.place.home))
    assert document[0]["verdict"] == "fail"
