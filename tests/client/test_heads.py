"""Audit heads that come with sessions: held against all before, by every process of a user, and given to an auditor."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import stip
from stip import heads
from stip.cli import group
from stip.heads import HeadMemory, remembered
from stip.profile import Profile
from stip_protocol.attestation.verifier import Status
from stip_protocol.documents import Signed
from stip_protocol.errors import AuditLogForked, ConfigurationError, SignatureInvalid
from stip_protocol.heads import Heads
from stip_protocol.release import AuditHead, service_id

SERVICE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def head(sequence: int, *, fill: int | None = None, at: int | None = None, key: Ed25519PrivateKey = SERVICE) -> bytes:
    digest = bytes([sequence % 251 if fill is None else fill]) * 32
    return Signed.sign(AuditHead(sequence=sequence, hash=digest, at=sequence if at is None else at), key).to_bytes()


@pytest.fixture
def memory(tmp_path: Path) -> HeadMemory:
    return HeadMemory(tmp_path / "heads", SERVICE.public_key())


def kept(memory: HeadMemory) -> list[int]:
    (found,) = remembered(memory.path.parent)
    return [each.sequence for each in found.heads]


# -- what is remembered -----------------------------------------------------------------------------------------------


def test_each_head_is_kept_once_in_a_file_of_the_owners_own(memory: HeadMemory) -> None:
    for sequence in (3, 5, 5, 4, 9):
        assert memory.check(head(sequence, at=7)).sequence == sequence
    assert kept(memory) == [3, 5, 4, 9]
    assert stat.S_IMODE(memory.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(memory.path.parent.stat().st_mode) == 0o700
    assert memory.path.stem == service_id(SERVICE.public_key()).hex()


def test_two_hashes_of_one_entry_are_a_fork_and_nothing_is_accepted_any_more(memory: HeadMemory) -> None:
    memory.check(head(5))
    with pytest.raises(AuditLogForked, match="entry 5 has two hashes") as caught:
        memory.check(head(5, fill=200))
    assert str(memory.path) in caught.value.message
    assert "stip audit-heads export" in caught.value.message
    with pytest.raises(AuditLogForked):
        memory.check(head(6))
    assert kept(memory) == [5, 5]
    memory.path.unlink()
    assert memory.check(head(6)).sequence == 6


def test_a_log_that_goes_back_was_cut(memory: HeadMemory) -> None:
    memory.check(head(50))
    with pytest.raises(AuditLogForked, match="went back from entry 50 to 49"):
        memory.check(head(49, at=51))


def test_a_head_by_another_key_is_refused_and_not_kept(memory: HeadMemory) -> None:
    memory.check(head(1))
    with pytest.raises(SignatureInvalid):
        memory.check(head(2, key=Ed25519PrivateKey.generate()))
    assert kept(memory) == [1]


def test_a_long_memory_thins_out_and_forgets_neither_the_first_nor_the_newest(
    memory: HeadMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 32
    monkeypatch.setattr(heads, "KEPT", most)
    for sequence in range(1, most + 2):
        memory.check(head(sequence))
    found = kept(memory)
    assert len(found) == most - most // 4 + 1
    assert (found[0], found[-1]) == (1, most + 1)
    with pytest.raises(AuditLogForked):
        memory.check(head(1, fill=200))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", Heads(bytes(32), ()).to_json(),
                                     Heads(service_id(SERVICE.public_key()), (b"junk",)).to_json(),
                                     Heads(service_id(SERVICE.public_key()), (head(1, key=Ed25519PrivateKey.generate()),)).to_json()])  # fmt: skip  # noqa: E501
def test_a_damaged_file_is_named_and_not_overwritten(memory: HeadMemory, content: bytes) -> None:
    memory.path.parent.mkdir()
    memory.path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=memory.path.name):
        memory.check(head(1))
    assert memory.path.read_bytes() == content


def a_file_for_a_folder(memory: HeadMemory) -> None:
    memory.path.parent.rename(memory.path.parent.with_name("away"))
    memory.path.parent.write_bytes(b"")


def a_folder(memory: HeadMemory) -> None:
    memory.path.unlink()
    memory.path.mkdir()


def a_link_to_what_never_ends(memory: HeadMemory) -> None:
    memory.path.unlink()
    memory.path.symlink_to("/dev/zero")


@pytest.mark.parametrize("spoil", [a_file_for_a_folder, a_folder, a_link_to_what_never_ends])
def test_a_file_that_cannot_be_used_refuses_by_name(memory: HeadMemory, spoil: Callable[[HeadMemory], None]) -> None:
    memory.check(head(1))
    spoil(memory)
    with pytest.raises(ConfigurationError, match="audit heads"):
        memory.check(head(2))


def test_a_full_disk_refuses_and_loses_nothing(memory: HeadMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.check(head(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ConfigurationError, match="No space left"):
            memory.check(head(2))
    assert kept(memory) == [1]
    memory.check(head(2))
    assert kept(memory) == [1, 2]


def test_a_link_is_replaced_and_what_it_leads_to_is_not_written(memory: HeadMemory, tmp_path: Path) -> None:
    memory.check(head(1))
    elsewhere = tmp_path / "elsewhere"
    memory.path.rename(elsewhere)
    memory.path.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    memory.check(head(2))
    assert elsewhere.read_bytes() == before
    assert not memory.path.is_symlink()
    assert kept(memory) == [1, 2]


def test_what_a_killed_process_left_half_written_is_written_anew(memory: HeadMemory) -> None:
    memory.check(head(1))
    memory.path.with_name(memory.path.name + ".partial").write_bytes(b"half of it")
    memory.check(head(2))
    assert kept(memory) == [1, 2]


MANY = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from stip.heads import HeadMemory
from stip_protocol.documents import Signed
from stip_protocol.release import AuditHead
key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
memory = HeadMemory(Path(sys.argv[1]), key.public_key())
for sequence in range(int(sys.argv[2]), 41, 2):
    memory.check(Signed.sign(AuditHead(sequence=sequence, hash=bytes(32), at=7), key).to_bytes())
"""


def test_processes_that_remember_at_once_lose_nothing(memory: HeadMemory) -> None:
    argv = [sys.executable, "-c", MANY, str(memory.path.parent)]
    workers = [subprocess.Popen([*argv, str(start)]) for start in (1, 2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert sorted(kept(memory)) == list(range(1, 41))


# -- with sessions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def watchful(profile: Profile, tmp_path: Path) -> Profile:
    """A profile that names the key service's key."""
    key = tmp_path / "service.pub"
    key.write_bytes(SERVICE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return profile.model_copy(update={"service_key": key, "audit_heads": tmp_path / "heads"})


async def test_a_session_brings_a_head_that_is_checked_and_kept(watchful: Profile, enclave: Any) -> None:
    enclave.opened = {"audit_head": head(7)}
    async with await stip.aconnect(watchful) as connection:
        assert connection.audit_log.status is Status.SKIPPED
        async with await connection.session():
            assert (connection.audit_log.status, connection.audit_log.got) == (Status.PASSED, "entry 7, one log")
        assert connection.verification.summary()["audit_log"] == "checked with every session"


async def test_a_session_over_another_log_is_refused_before_anything_is_asked(watchful: Profile, enclave: Any) -> None:
    enclave.opened = {"audit_head": head(7)}
    async with await stip.aconnect(watchful) as connection:
        async with await connection.session():
            pass
        enclave.opened = {"audit_head": head(7, fill=200)}
        with pytest.raises(AuditLogForked):
            await connection.session()
    assert enclave.turns == []


async def test_a_head_that_the_service_did_not_sign_refuses_the_session(watchful: Profile, enclave: Any) -> None:
    enclave.opened = {"audit_head": head(7, key=Ed25519PrivateKey.generate())}
    async with await stip.aconnect(watchful) as connection:
        with pytest.raises(SignatureInvalid):
            await connection.session()


@pytest.mark.parametrize("why", ["no service_key", "older version"])
async def test_a_check_that_cannot_be_made_is_said_to_be_skipped(
    watchful: Profile, profile: Profile, enclave: Any, why: str
) -> None:
    enclave.opened = {"audit_head": b"not looked at"} if why == "no service_key" else {}
    chosen = profile if why == "no service_key" else watchful
    async with await stip.aconnect(chosen) as connection, await connection.session():
        assert connection.audit_log.status is Status.SKIPPED
        assert why in connection.audit_log.got


def test_a_profile_reads_the_key_and_says_where_heads_are(make_profile: Callable[..., Path], enclave: Any) -> None:
    path = make_profile(enclave.port)
    assert Profile.load(path).memory() is None
    path.write_text(path.read_text() + 'service_key = "missing.pub"\n')
    with pytest.raises(ConfigurationError, match="service_key"):
        Profile.load(path).memory()


# -- the command ------------------------------------------------------------------------------------------------------


def invoked(*arguments: str) -> Any:
    return CliRunner().invoke(group, ["audit-heads", *arguments], standalone_mode=False)


def test_list_shows_each_service_and_whether_its_log_is_one(
    memory: HeadMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STIP_HOME", str(tmp_path))
    assert heads.folder() == memory.path.parent
    assert "no heads yet" in invoked("list").output
    memory.check(head(5))
    (told,) = json.loads(invoked("list", "--json").output)
    assert (told["service"], told["heads"], told["newest"]["sequence"], told["forked"]) == (
        memory.path.stem,
        1,
        5,
        None,
    )
    assert "one" in invoked("list").output
    with pytest.raises(AuditLogForked):
        memory.check(head(5, fill=200))
    shown = invoked("list")
    assert shown.return_value == 3
    assert "FORKED" in shown.output


def test_export_writes_what_an_auditor_reads(memory: HeadMemory, tmp_path: Path) -> None:
    memory.check(head(5))
    folder, out = str(memory.path.parent), tmp_path / "for-the-auditor.json"
    assert Heads.from_json(invoked("export", "--folder", folder).output.encode()).heads == (head(5),)
    invoked("export", memory.path.stem[:6], "--folder", folder, "--out", str(out))
    assert Heads.from_json(out.read_bytes()) == Heads(service_id(SERVICE.public_key()), (head(5),))
    for wrong in ("zz", ""):
        if not wrong:
            HeadMemory(memory.path.parent, Ed25519PrivateKey.generate().public_key())._write(Heads(bytes(32), ()))
        with pytest.raises(ConfigurationError, match="service"):
            raise invoked("export", wrong, "--folder", folder).exception
    assert os.path.exists(out)
