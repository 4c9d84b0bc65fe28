"""An exported audit log: it verifies with nothing but the public key, and whatever is done to it shows."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from stip_keyservice.cli import main
from stip_keyservice.service import auditexport, auditlog
from stip_keyservice.service.auditlog import AuditEntry, AuditLog, KnownHead, Trail
from stip_keyservice.service.state.store import Store
from stip_protocol.documents import Signed
from stip_protocol.errors import AuditLogForked, ConfigurationError, IntegrityError, StipError
from stip_protocol.heads import Heads
from stip_protocol.release import AuditHead, service_id

KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key()
ENTRIES = 6


def fill(path: Path, *, entries: int = ENTRIES, first: int = 100) -> tuple[Store, list[Signed]]:
    store = Store(path)
    log, heads = AuditLog(store, KEY), []
    for number in range(entries):
        with store.write() as db:
            heads.append(log.append(db, Trail("renewal", first + number, {"handle": bytes(16), "tokens": number})))
    return store, heads


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[tuple[Path, list[Signed]]]:
    store, heads = fill(tmp_path / "state.db")
    auditexport.write(store, PUBLIC, tmp_path / "audit.jsonl", now=1000)
    yield tmp_path / "audit.jsonl", heads
    store.close()


Lines = list[dict[str, Any]]


def entry_of(lines: Lines, number: int) -> bytes:
    return base64.b64decode(lines[number]["entry"])


def put(lines: Lines, number: int, entry: bytes) -> Lines:
    lines[number] = {"entry": base64.b64encode(entry).decode()}
    return lines


def edited(lines: Lines) -> Lines:
    entry = AuditEntry.from_bytes(entry_of(lines, 3)).model_copy(update={"tokens": 999})
    return put(lines, 3, entry.to_bytes())


def with_foreign_head(lines: Lines) -> Lines:
    signed = Signed.from_bytes(base64.b64decode(lines[-1]["head"]))
    head = AuditHead.from_bytes(signed.payload)
    forged = Signed.sign(head, Ed25519PrivateKey.generate()).to_bytes()
    return [*lines[:-1], lines[-1] | {"head": base64.b64encode(forged).decode()}]


TAMPERING: dict[str, Callable[[Lines], Lines]] = {
    "an edited entry": edited,
    "an entry that is no entry": lambda lines: put(lines, 3, b"\xa0"),
    "an entry that is not base64": lambda lines: [*lines[:3], {"entry": "%"}, *lines[4:]],
    "a removed entry": lambda lines: lines[:3] + lines[4:],
    "a removed first entry": lambda lines: lines[:1] + lines[2:],
    "two entries swapped": lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
    "an entry twice": lambda lines: [*lines[:3], lines[2], *lines[3:]],
    "the last entries cut off": lambda lines: lines[:4] + lines[-1:],
    "the head cut off": lambda lines: lines[:-1],
    "a head by another key": with_foreign_head,
    "no head": lambda lines: [*lines[:-1], lines[-1] | {"head": None}],
    "a wrong count": lambda lines: [*lines[:-1], lines[-1] | {"entries": 5}],
    "more after the head": lambda lines: [*lines, lines[1]],
    "another service's header": lambda lines: [lines[0] | {"service": "00" * 32}, *lines[1:]],
    "another format": lambda lines: [lines[0] | {"format": "stip/other"}, *lines[1:]],
    "another major version": lambda lines: [lines[0] | {"version": [2, 0]}, *lines[1:]],
    "no header": lambda lines: lines[1:],
    "a line that is something else": lambda lines: [*lines[:3], {"entry": "", "more": 1}, *lines[3:]],
    "a line too long": lambda lines: [*lines[:3], {"entry": "A" * 10_000}, *lines[3:]],
}


def test_an_export_verifies_with_the_public_key_alone(exported: tuple[Path, list[Signed]]) -> None:
    path, heads = exported
    kept = [KnownHead("kept", head) for head in heads]
    found = auditexport.verify_file(path, PUBLIC, kept)
    assert (found.head.sequence, found.service, found.exported_at) == (ENTRIES, service_id(PUBLIC), 1000)
    assert [entry.tokens for entry in auditexport.entries_of(path)] == list(range(ENTRIES))
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("tampering", TAMPERING.values(), ids=TAMPERING.keys())
def test_verification_of_an_export_detects(
    exported: tuple[Path, list[Signed]], tampering: Callable[[Lines], Lines]
) -> None:
    path, _ = exported
    lines = tampering([json.loads(line) for line in path.read_bytes().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(StipError) as caught:
        auditexport.verify_file(path, PUBLIC)
    assert caught.value.code in ("integrity_violated", "signature_invalid", "version_unsupported")


def test_bytes_that_are_no_lines_are_refused(exported: tuple[Path, list[Signed]]) -> None:
    path, _ = exported
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(IntegrityError):
            auditexport.verify_file(path, PUBLIC)
    path.write_bytes(b"[1]\n" + whole)
    with pytest.raises(IntegrityError):
        auditexport.verify_file(path, PUBLIC)


def test_a_truncated_log_and_a_forked_log_are_told_apart_in_a_database_and_in_an_export(tmp_path: Path) -> None:
    long, heads = fill(tmp_path / "long.db")
    short, _ = fill(tmp_path / "short.db", entries=4)
    other, _ = fill(tmp_path / "other.db", first=200)
    known = [KnownHead("head 1 of alice.json", heads[-1])]
    for store, name in ((short, "short"), (other, "other")):
        auditexport.write(store, PUBLIC, tmp_path / name, now=1)
    auditlog.verify(long, PUBLIC, heads=known)
    for check in (
        lambda: auditlog.verify(short, PUBLIC, heads=known),
        lambda: auditexport.verify_file(tmp_path / "short", PUBLIC, known),
    ):
        with pytest.raises(IntegrityError, match=r"head 1 of alice\.json's 6") as truncated:
            check()
        assert not isinstance(truncated.value, AuditLogForked)
    for check in (
        lambda: auditlog.verify(other, PUBLIC, heads=known),
        lambda: auditexport.verify_file(tmp_path / "other", PUBLIC, known),
    ):
        with pytest.raises(AuditLogForked, match=r"entry 6: another hash than the head 1 of alice\.json"):
            check()
    for store in (long, short, other):
        store.close()


def test_an_export_never_replaces_a_file_and_leaves_none_behind_where_the_log_does_not_hold(tmp_path: Path) -> None:
    store, _ = fill(tmp_path / "state.db")
    (tmp_path / "there").write_text("mine")
    with pytest.raises(ConfigurationError):
        auditexport.write(store, PUBLIC, tmp_path / "there", now=1)
    assert (tmp_path / "there").read_text() == "mine"
    with store.write() as db:
        db.exec_driver_sql("DELETE FROM audit WHERE sequence > 4")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(IntegrityError):
        auditexport.write(store, PUBLIC, tmp_path / "new", now=1)
    assert sorted(tmp_path.iterdir()) == before
    store.close()


def test_an_empty_log_exports_and_verifies(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    auditexport.write(store, PUBLIC, tmp_path / "empty", now=1)
    assert auditexport.verify_file(tmp_path / "empty", PUBLIC).head.sequence == 0
    store.close()


def test_entries_whose_time_goes_back_are_refused_unless_the_clock_was_accepted(tmp_path: Path) -> None:
    store, _ = fill(tmp_path / "state.db", entries=2, first=1000)
    log = AuditLog(store, KEY)
    accepted = log.accept_clock(now=500, reason="the clock was ahead for an hour")
    assert (accepted.at, accepted.detail) == (500, "from 1001: the clock was ahead for an hour")
    assert auditlog.verify(store, PUBLIC).at == 500
    with pytest.raises(ConfigurationError):
        log.accept_clock(now=500, reason="nothing to accept")
    forged = AuditEntry(sequence=4, at=400, event="renewal", code="granted")
    entries = [entry.to_bytes() for entry in (*log.latest(3), forged)]
    with pytest.raises(IntegrityError, match="time of audit entry 4"):
        auditlog.follow([auditlog.StoredEntry(entry) for entry in entries], PUBLIC)
    store.close()


def test_the_commands_export_verify_offline_and_hold_heads_against_the_log(tmp_path: Path) -> None:
    runner, home = CliRunner(), tmp_path / "home"

    def call(*arguments: str, code: int = 0) -> Any:
        done = runner.invoke(main, ["audit-log", *arguments, "--json"])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    added = runner.invoke(main, ["keys", "show", "--home", str(home)])
    assert added.exit_code == 0, added.output
    added = runner.invoke(main, ["users", "add", "alice", "--public-key", key, "--budget", "5", "--home", str(home)])
    assert added.exit_code == 0, added.output
    call("head", "--out", str(tmp_path / "head"), "--home", str(home))
    export, public = tmp_path / "audit.jsonl", home / "service.pub"
    assert call("export", str(export), "--home", str(home))["entries"] == 1
    (entry,) = call("list", "--export", str(export))
    assert entry["event"] == "user_added"
    offline = ("verify", "--export", str(export), "--public-key", str(public))
    assert call(*offline)["known_heads"] == 0
    kept = Heads(
        bytes.fromhex(json.loads(export.read_text().splitlines()[0])["service"]), ((tmp_path / "head").read_bytes(),)
    )
    (tmp_path / "alice.json").write_bytes(kept.to_json())
    heads = ("--heads", str(tmp_path / "alice.json"))
    assert call(*offline, *heads)["known_heads"] == 1
    assert call("verify", *heads, "--home", str(home))["known_heads"] == 1
    (tmp_path / "bob.json").write_bytes(Heads(bytes(32), kept.heads).to_json())
    refused = call("verify", "--heads", str(tmp_path / "bob.json"), "--home", str(home), code=2)
    assert refused["error"]["code"] == "configuration_invalid"
    assert runner.invoke(main, ["audit-log", "verify", "--export", str(export)]).exit_code == 2
    call("accept-clock", "--reason", "not behind", "--home", str(home), code=2)
