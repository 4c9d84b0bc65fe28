"""The folder in which an instance is made: only its owner's, only for what was written there, and never lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from stip_keyservice.protect.instance import Protected, protect
from stip_keyservice.protect.storage.workspace import JOURNAL, PARTS, RECORD, claimed
from stip_keyservice.protect.storage.writer import DigestedFile
from stip_protocol.errors import ConfigurationError
from stip_protocol.manifest import check_files, file_digest

from .conftest import Case

DEVELOPER, SEALING = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
Checkpoints = Callable[[Case], Path]


class Interrupted(BaseException):
    """Stands for what ends a process but not its files."""


class Usage(NamedTuple):
    """As of shutil.disk_usage."""

    total: int
    used: int
    free: int


def call(model: Path, out: Path, **options: Any) -> Protected:
    arguments: dict[str, Any] = {
        "preset": "hardened",
        "developer": DEVELOPER,
        "seal_to": SEALING.public_key(),
        "restart_key": SEALING,
        "samples": 1,
    }
    return protect(model, out, **(arguments | options))


def interrupted(model: Path, out: Path) -> Path:
    """A protection that ends when its tensors are written; gives its folder."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "certificate":
            raise Interrupted

    with pytest.raises(Interrupted):
        call(model, out, progress=progress)
    return out.with_name(out.name + ".partial")


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): file_digest(path).sha256 for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def model(checkpoint_of: Checkpoints, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(checkpoint_of(Case("llama", tied=False)), tmp_path / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "out.partial"


def test_the_folder_is_its_owners_alone(out: Path, partial: Path) -> None:
    with claimed(out):
        assert partial.stat().st_mode & 0o777 == 0o700


def test_a_link_to_a_finished_instance_is_refused_and_the_instance_stays(
    model: Path, out: Path, partial: Path, tmp_path: Path
) -> None:
    call(model, tmp_path / "finished")
    before = contents(tmp_path / "finished")
    partial.symlink_to(tmp_path / "finished")
    with pytest.raises(ConfigurationError, match=r"out\.partial, a link, allowed: no link"):
        call(model, out)
    assert contents(tmp_path / "finished") == before


@pytest.mark.parametrize("name", [*PARTS, JOURNAL, RECORD])
def test_a_link_in_the_place_of_one_of_its_own_is_refused(out: Path, partial: Path, tmp_path: Path, name: str) -> None:
    partial.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    if name in PARTS:
        victim.mkdir()
        (victim / "config.json").write_text("precious")
    else:
        victim.write_text("precious")
    (partial / name).symlink_to(victim)
    before = contents(tmp_path)
    with pytest.raises(ConfigurationError, match=f"{name}, a link"), claimed(out):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(out: Path, partial: Path, mode: int) -> None:
    partial.mkdir()
    partial.chmod(mode)
    says = f"with mode {mode:04o}, allowed: one that others cannot write"
    with pytest.raises(ConfigurationError, match=says), claimed(out):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_folder_of_another_user_is_refused(out: Path, partial: Path) -> None:
    partial.mkdir(mode=0o700)
    os.chown(partial, 12345, -1)
    with pytest.raises(ConfigurationError, match="of user 12345, allowed: a folder of your own"), claimed(out):
        pass


def test_a_signed_instance_without_a_record_is_refused_and_stays(
    model: Path, out: Path, partial: Path, tmp_path: Path
) -> None:
    call(model, tmp_path / "finished")
    (tmp_path / "finished").rename(partial)
    before = contents(partial)
    with pytest.raises(ConfigurationError, match=r"with 'manifest\.json\.sig' in it"):
        call(model, out)
    assert contents(partial) == before


@pytest.mark.parametrize("planted", ["server/evil.py", "enclave/more.sealed", "client/more.json", "more", "server/d/"])
def test_a_file_that_protection_did_not_write_is_never_signed(
    model: Path, out: Path, partial: Path, planted: str
) -> None:
    def plant(stage: str, done: int, total: int) -> None:
        if stage == "certificate" and not done:
            if planted.endswith("/"):
                (partial / planted).mkdir()
            else:
                (partial / planted).write_text("x")

    with pytest.raises(ConfigurationError, match=f"got '{planted.rstrip('/')}' added, removed or replaced"):
        call(model, out, progress=plant)
    assert not out.exists()
    call(model, out)
    assert not (out / planted).exists()


def test_a_file_that_is_changed_after_it_was_written_does_not_match_its_manifest(
    model: Path, out: Path, partial: Path
) -> None:
    written: list[str] = []

    def change(stage: str, done: int, total: int) -> None:
        if stage == "certificate" and done == total:
            path = partial / "server" / "config.json"
            written.append(file_digest(path).sha256)
            path.write_text(path.read_text() + " ")

    result = call(model, out, progress=change)
    assert result.manifest.server["config.json"].sha256 == written[0]
    assert file_digest(out / "server" / "config.json").sha256 != written[0]


def test_a_full_disk_takes_nothing_from_a_run_that_goes_on(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupted(model, out)
    (partial / "enclave" / "head.sealed").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 1000))
        with pytest.raises(ConfigurationError, match=r"free disk space: .*out\.partial is kept: run"):
            call(model, out)
    kept = (partial / "server" / "model.safetensors").stat().st_ino
    call(model, out)
    assert (out / "server" / "model.safetensors").stat().st_ino == kept


def test_a_source_that_fails_to_read_takes_nothing_that_is_finished(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupted(model, out)
    (partial / "enclave" / "head.sealed").unlink()

    def fail(*arguments: Any) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(ConfigurationError, match=r"Input/output error; .*out\.partial is kept: run"):
            call(model, out)
    kept = (partial / "server" / "model.safetensors").stat().st_ino
    call(model, out)
    assert (out / "server" / "model.safetensors").stat().st_ino == kept


def test_a_disk_that_is_full_at_once_is_said_in_one_line_and_leaves_nothing(
    model: Path, out: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match=r"No space left on device \[conf"):
        call(model, out)
    assert not partial.exists()


def test_a_disk_that_is_full_in_the_client_part_is_not_taken_for_a_wrong_source(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DigestedFile._store

    def full(file: DigestedFile, data: bytes | memoryview) -> None:
        if "client" in str(file._path):
            raise OSError(28, "No space left on device")
        store(file, data)

    monkeypatch.setattr(DigestedFile, "_store", full)
    with pytest.raises(ConfigurationError, match=r"out .*: No space left on device; .*out\.partial is kept") as caught:
        call(model, out)
    assert caught.value.code == ConfigurationError.code


def test_a_link_or_a_root_as_the_place_of_an_instance_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for out, says in ((tmp_path / "link", "link, a link"), (Path("/"), "got /"), (tmp_path / "..", "a folder with")):
        with pytest.raises(ConfigurationError, match=says):
            call(model, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "model"]


def test_a_mount_point_is_refused_before_any_work(model: Path) -> None:
    with pytest.raises(ConfigurationError, match="/proc, a mount point"):
        call(model, Path("/proc"))


def test_the_current_folder_is_taken_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with claimed(Path()) as workspace:
        assert workspace.folder == tmp_path / "here.partial"


def test_a_rename_that_fails_loses_nothing(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target == out:
            raise OSError(1, "Operation not permitted")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(ConfigurationError, match=r"Operation not permitted; .*out\.partial is kept"):
            call(model, out)
    kept = (out.with_name("out.partial") / "server" / "model.safetensors").stat().st_ino
    call(model, out)
    assert (out / "server" / "model.safetensors").stat().st_ino == kept


@pytest.fixture
def untidied(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An instance whose run ended right after the rename."""
    rename = Path.rename

    def end(path: Path, target: Path) -> Path:
        done = rename(path, target)
        if target == out:
            raise Interrupted
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", end)
        with pytest.raises(Interrupted):
            call(model, out)
    assert {RECORD, JOURNAL} <= {path.name for path in out.iterdir()}
    return out


def test_a_run_that_ended_after_the_rename_is_finished_by_the_next(model: Path, untidied: Path) -> None:
    before = {name: digest for name, digest in contents(untidied).items() if name not in (RECORD, JOURNAL)}
    result = call(model, untidied)
    assert contents(untidied) == before
    assert result.certificate.passed
    assert result.manifest_digest.hex() == before["manifest.json"]
    check_files(untidied / "server", result.manifest.server)
    with pytest.raises(ConfigurationError, match="which is not empty"):
        call(model, untidied)


def test_another_call_leaves_a_published_instance_alone(model: Path, untidied: Path) -> None:
    before = contents(untidied)
    with pytest.raises(ConfigurationError, match="epoch: got 3, allowed: 0"):
        call(model, untidied, epoch=3)
    assert contents(untidied) == before


def test_everything_that_is_published_was_seen_onto_the_disk(
    model: Path, out: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[Path] = set()
    fsync = os.fsync

    def see(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.add(path.with_name(path.name.removesuffix(".partial")) if path.is_file() else path)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", see)
    call(model, out)
    assert {out, out.parent} <= synced
    below = {path.relative_to(folder) for folder in (out, partial) for path in synced if path.is_relative_to(folder)}
    assert {path.relative_to(out) for path in out.rglob("*")} <= below


def test_a_record_is_of_no_use_in_another_place(model: Path, out: Path, tmp_path: Path) -> None:
    partial = interrupted(model, out)
    shutil.copytree(partial, tmp_path / "other.partial")
    with pytest.raises(ConfigurationError, match=r"out: got .*other, allowed: .*out, as in the run"):
        call(model, tmp_path / "other")
    copy = Path(shutil.copytree(partial, tmp_path / "copy"))
    partial.rename(tmp_path / "before")
    copy.rename(partial)
    with pytest.raises(ConfigurationError, match="folder: got another, allowed: the same"):
        call(model, out)


def test_stray_folders_and_links_are_cleared_and_links_not_followed(model: Path, out: Path, tmp_path: Path) -> None:
    partial = interrupted(model, out)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine").write_text("precious")
    (partial / "server" / "stray" / "deeper").mkdir(parents=True)
    (partial / "server" / "stray" / "deeper" / "file").write_text("x")
    (partial / "server" / "link").symlink_to(tmp_path / "victim")
    (partial / "stray").mkdir()
    call(model, out)
    assert (tmp_path / "victim" / "mine").read_text() == "precious"
    assert not list(out.rglob("*stray*"))
    assert not (out / "server" / "link").exists()
