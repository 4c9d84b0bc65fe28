"""What another run takes over from an interrupted one, what it does again, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from stip_keyservice.protect.instance import Protected, protect
from stip_keyservice.protect.storage.journal import Journal
from stip_keyservice.protect.storage.resume import Inputs, Record
from stip_keyservice.protect.storage.workspace import claimed
from stip_protocol.errors import ConfigurationError
from stip_protocol.manifest import FileDigest, file_digest
from stip_protocol.secrets_file import InstanceSecrets, open_secrets

from .conftest import Case

DEVELOPER, SEALING = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
MODEL = Case("llama", tied=False)
LAYOUT = "ab" * 32
WHOLE = {"server/model.safetensors", "enclave/embedding.sealed", "enclave/head.sealed"}

Checkpoints = Callable[[Case], Path]


class Interrupted(BaseException):
    """Stands for what ends a process but not its files."""


def call(model: Path, out: Path, **options: Any) -> Protected:
    arguments: dict[str, Any] = {
        "preset": "hardened",
        "developer": DEVELOPER,
        "seal_to": SEALING.public_key(),
        "restart_key": SEALING,
        "samples": 1,
    }
    return protect(model, out, **(arguments | options))


def interrupted(model: Path, out: Path, **options: Any) -> Path:
    """A protection that ends when its tensors are written; gives its folder."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "certificate":
            raise Interrupted

    with pytest.raises(Interrupted):
        call(model, out, progress=progress, **options)
    return out.with_name(out.name + ".partial")


def secrets_of(partial: Path) -> InstanceSecrets:
    return Record.open((partial / "resume").read_bytes(), DEVELOPER, partial).secrets(SEALING, partial)


@pytest.fixture
def model(checkpoint_of: Checkpoints, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(checkpoint_of(MODEL), tmp_path / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_the_root_lies_on_the_disk_sealed_only(model: Path, out: Path) -> None:
    partial = interrupted(model, out)
    root = secrets_of(partial).root
    for path in partial.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert root not in content
        assert root.hex().encode() not in content
    call(model, out)
    assert open_secrets((out / "secrets.sealed").read_bytes(), SEALING).root == root


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncated, changed, Path.unlink])
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_listed_file_that_is_no_longer_what_it_was_is_done_again(
    model: Path, out: Path, name: str, damage: Callable[[Path], None]
) -> None:
    partial = interrupted(model, out)
    kept = {each: (partial / each).stat().st_ino for each in WHOLE - {name}}
    damage(partial / name)
    call(model, out)
    assert kept == {each: (out / each).stat().st_ino for each in kept}


def test_what_no_journal_lists_is_removed(model: Path, out: Path) -> None:
    partial = interrupted(model, out)
    listed = (partial / "journal").read_bytes().splitlines(keepends=True)
    assert {json.loads(line)["name"] for line in listed} == WHOLE
    (partial / "journal").write_bytes(b"".join(listed[:1]))
    (partial / "server" / "model-00003-of-00003.safetensors.partial").write_bytes(b"torn")
    (partial / "enclave" / "positions.sealed").write_bytes(b"of nobody")
    first = json.loads(listed[0])["name"]
    kept = (partial / first).stat().st_ino
    others = {name: file_digest(partial / name) for name in WHOLE - {first} if name.startswith("enclave")}
    result = call(model, out)
    assert (out / first).stat().st_ino == kept
    assert {f"enclave/{name}" for name in result.manifest.enclave} <= WHOLE
    # Sealed anew, under another salt.
    assert all(file_digest(out / name) != digest for name, digest in others.items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"preset": "paper"}, "preset: got paper, allowed: hardened, as in the run that was interrupted; or remove"),
        ({"epoch": 3}, "epoch: got 3, allowed: 0"),
        ({"accept_tied_head": True}, "accept_tied_head: got True, allowed: False"),
        ({"accept_token_cipher": True}, "accept_token_cipher: got True, allowed: False"),
        ({"shard_bytes": 4000}, "shard_bytes: got 4000"),
        ({"seal_to": X25519PrivateKey.generate().public_key()}, "seal_to: got another, allowed: the same"),
        ({"developer": Ed25519PrivateKey.generate()}, "whose record this key service home cannot read"),
        ({"restart_key": X25519PrivateKey.generate()}, "whose record this key service home cannot read"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_call_is_refused_and_the_folder_stays(
    model: Path, out: Path, options: dict[str, Any], says: str
) -> None:
    partial = interrupted(model, out)
    before = sorted(partial.rglob("*"))
    with pytest.raises(ConfigurationError, match=says) as caught:
        call(model, out, **options)
    assert str(partial) in caught.value.message
    assert "remove" in caught.value.message
    assert sorted(partial.rglob("*")) == before
    call(model, out)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_source_that_was_written_to_is_refused(model: Path, out: Path, name: str) -> None:
    interrupted(model, out)
    data = (model / name).read_bytes()
    (model / name).write_bytes(data.replace(b'"temperature": 0.6', b'"temperature": 0.7').replace(b"acme/", b"emca/"))
    with pytest.raises(ConfigurationError, match="model: got another, allowed: the same"):
        call(model, out)


def test_another_version_is_refused(model: Path, out: Path) -> None:
    partial = interrupted(model, out)
    record = Record.open((partial / "resume").read_bytes(), DEVELOPER, partial)
    older = record.model_copy(update={"inputs": record.inputs.model_copy(update={"versions": "stip 0.0.1"})})
    (partial / "resume").write_bytes(older.signed(DEVELOPER))
    with pytest.raises(ConfigurationError, match=r"versions: got stip .*, allowed: stip 0\.0\.1"):
        call(model, out)


@given(data=st.data())
def test_a_damaged_record_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    secrets = InstanceSecrets(
        instance="ab" * 16, epoch=0, preset="paper", manifest_digest=bytes(32), root=bytes(range(32))
    )
    inputs = Inputs(
        model="cd" * 32,
        out="/out",
        folder=1,
        preset="paper",
        epoch=0,
        seal_to="ef" * 32,
        accept_tied_head=False,
        accept_token_cipher=False,
        shard_bytes=1,
    )
    record = Record.of(inputs, secrets, SEALING)
    signed = bytearray(record.signed(DEVELOPER))
    assert Record.open(bytes(signed), DEVELOPER, folder).secrets(SEALING, folder) == secrets
    assert repr(secrets.root) not in repr(record)
    signed[data.draw(st.integers(0, len(signed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ConfigurationError, match="cannot read"):
        Record.open(bytes(signed), DEVELOPER, folder)


def test_a_journal_that_somebody_else_wrote_lists_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"chosen by somebody else")
    other = Journal(tmp_path / "journal", tmp_path, bytes(32))
    other.add("file", file_digest(tmp_path / "file"), LAYOUT)
    assert other.listed
    assert not Journal(tmp_path / "journal", tmp_path, bytes(range(32))).listed


@given(cut=st.integers(0, 2000), flip=st.none() | st.integers(0, 2000))
def test_a_torn_or_changed_journal_lists_only_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int | None
) -> None:
    folder = tmp_path_factory.getbasetemp() / "journals"
    folder.mkdir(exist_ok=True)
    path = folder / "journal"
    path.unlink(missing_ok=True)
    digests = {name: FileDigest(sha256=name * 64, size=5) for name in "abc"}
    journal = Journal(path, folder, bytes(32))
    for name, digest in digests.items():
        journal.add(name, digest, LAYOUT)
    data = bytearray(path.read_bytes()[:cut])
    if flip is not None and flip < len(data):
        data[flip] ^= 1
    path.write_bytes(data)
    again = Journal(path, folder, bytes(32))
    assert again.listed.items() <= digests.items()
    again.add("d", FileDigest(sha256="d" * 64, size=5), LAYOUT)  # not behind a torn line
    assert Journal(path, folder, bytes(32)).listed == again.listed


def test_a_file_of_another_layout_is_not_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", tmp_path, bytes(32))
    for name in ("kept", "moved", "gone"):
        (tmp_path / name).write_bytes(b"content")
        journal.add(name, file_digest(tmp_path / name), LAYOUT)
    seen: list[int] = []
    journal.keep_whole({"kept": LAYOUT, "moved": "cd" * 32}, seen.append)
    assert journal.listed.keys() == {"kept"}
    assert seen == [7, 7, 7]


def test_two_processes_never_work_in_one_folder(model: Path, out: Path) -> None:
    with claimed(out), pytest.raises(ConfigurationError, match="in which a protection is at work"):
        call(model, out)
    call(model, out)


def test_a_folder_of_somebody_else_is_left_alone(model: Path, out: Path) -> None:
    partial = out.with_name("out.partial")
    partial.mkdir()
    (partial / "server").mkdir()
    (partial / "mine").write_text("precious")
    with pytest.raises(ConfigurationError, match="with 'mine' in it, allowed: none: move it away or remove it"):
        call(model, out)
    assert (partial / "mine").read_text() == "precious"


def test_a_folder_without_a_record_is_begun_anew(model: Path, out: Path) -> None:
    partial = interrupted(model, out)
    (partial / "resume").unlink()
    before = file_digest(partial / "server" / "model.safetensors")
    call(model, out)
    assert file_digest(out / "server" / "model.safetensors") != before


def test_a_full_disk_leaves_what_is_done(model: Path, out: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "enclave":
            raise OSError(28, "No space left on device")

    with pytest.raises(ConfigurationError, match=r"No space left on device; .*out\.partial is kept: run"):
        call(model, out, progress=progress)
    assert "server/model.safetensors" in (out.with_name("out.partial") / "journal").read_text()
    call(model, out)


def test_a_second_run_tells_what_it_checks_and_counts_on_from_there(model: Path, out: Path) -> None:
    partial = interrupted(model, out)
    sizes = {name: (partial / name).stat().st_size for name in WHOLE}
    (partial / "enclave" / "head.sealed").unlink()
    told: dict[str, list[tuple[int, int]]] = {}
    result = call(model, out, progress=lambda stage, *counts: told.setdefault(stage, []).append(counts))
    assert list(told) == ["keys", "check", "server", "enclave", "certificate"]
    assert told["check"][-1] == (sum(sizes.values()),) * 2
    assert told["server"] == [(told["server"][0][1],) * 2]
    done, total = told["enclave"][0]
    assert 0 < done < total == told["enclave"][-1][0]
    assert (result.stages["server"].nbytes, result.stages["enclave"].nbytes) == (0, total - done)
