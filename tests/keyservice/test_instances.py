"""Instances on the way in: only a whole one, signed by this developer, with secrets for this key service."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stip_keyservice.home import Home
from stip_keyservice.service import instances, users, vault
from stip_keyservice.service.store import Store
from stip_protocol.errors import InstanceRefused, IntegrityError, ManifestMismatch, StipError
from stip_protocol.leakage import REPORT_LIMIT
from stip_protocol.manifest import SIGNING
from stip_protocol.release import Grant

from .conftest import MadeInstance, cell, make_instance


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.open(tmp_path / "home")


@pytest.fixture
def made(tmp_path: Path, home: Home) -> MadeInstance:
    return make_instance(tmp_path / "instance", home, measured=[cell("server", "A", token_top1=0.1)])


def inspect(directory: Path, home: Home) -> instances.Inspected:
    return instances.inspect(directory, home.developer.public_key(), home.sealing)


def append(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        with (directory / name).open("ab") as file:
            file.write(b"\0")

    return change


def flip(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        data[len(data) // 2] ^= 1
        (directory / name).write_bytes(data)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


DAMAGE: list[tuple[Callable[[Path], None], str, str]] = [
    (flip("manifest.json"), "a manifest changed after signing", "signature_invalid"),
    (flip("manifest.json.sig"), "a changed signature", "signature_invalid"),
    (remove("manifest.json"), "no manifest", "manifest_mismatch"),
    (remove("manifest.json.sig"), "no signature", "manifest_mismatch"),
    (flip("server/model.safetensors"), "a changed tensor", "manifest_mismatch"),
    (append("server/model.safetensors"), "a longer server file", "manifest_mismatch"),
    (remove("server/config.json"), "a missing server file", "manifest_mismatch"),
    (lambda directory: (directory / "server" / "x").touch(), "an unlisted server file", "manifest_mismatch"),
    (flip("enclave/embedding.sealed"), "a changed enclave part", "manifest_mismatch"),
    (flip("client/tokenizer.json"), "a changed tokenizer", "manifest_mismatch"),
    (flip("client/manifest.json"), "a changed client manifest", "signature_invalid"),
    (remove("certificate.json"), "no certificate", "manifest_mismatch"),
    (flip("certificate.json"), "a changed certificate", "manifest_mismatch"),
    (flip("leakage.json"), "a changed leakage report", "manifest_mismatch"),
    (append("leakage.json"), "a longer leakage report", "manifest_mismatch"),
    (remove("leakage.json"), "no leakage report where the manifest sums one up", "manifest_mismatch"),
    (lambda directory: os.truncate(directory / "leakage.json", REPORT_LIMIT + 1), "a huge report", "manifest_mismatch"),
    (lambda directory: (directory / SIGNING).mkdir(), "an interrupted signing", "manifest_mismatch"),
    (remove("secrets.sealed"), "no secrets", "manifest_mismatch"),
    (flip("secrets.sealed"), "changed secrets", "sealed_part_invalid"),
]


@pytest.mark.parametrize(
    ("damage", "code"), [(one, code) for one, _, code in DAMAGE], ids=[name for _, name, _ in DAMAGE]
)
def test_refuses_an_instance_with(made: MadeInstance, home: Home, damage: Callable[[Path], None], code: str) -> None:
    inspect(made.directory, home)
    damage(made.directory)
    with pytest.raises(StipError) as caught:
        inspect(made.directory, home)
    assert caught.value.code == code


@pytest.mark.parametrize("lay", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_refuses_a_leakage_report_that_the_manifest_does_not_sum_up(
    tmp_path: Path, home: Home, lay: Callable[[Path], None]
) -> None:
    made = make_instance(tmp_path / "instance", home)
    inspect(made.directory, home)
    lay(made.directory / "leakage.json")
    with pytest.raises(ManifestMismatch, match=r"leakage\.json"):
        inspect(made.directory, home)


@pytest.mark.parametrize(
    "other", [{"instance": "0" * 32}, {"epoch": 1}, {"preset": "paper"}, {"manifest_digest": bytes(32)}]
)
def test_refuses_secrets_of_another_manifest(tmp_path: Path, home: Home, other: dict[str, Any]) -> None:
    made = make_instance(tmp_path / "instance", home, secrets_of=other)
    with pytest.raises(StipError, match="secrets"):
        inspect(made.directory, home)


def test_refuses_another_developers_instance_and_secrets_for_another_service(
    tmp_path: Path, made: MadeInstance, home: Home
) -> None:
    stranger = Home.open(tmp_path / "stranger")
    with pytest.raises(StipError) as caught:
        instances.inspect(made.directory, stranger.developer.public_key(), home.sealing)
    assert caught.value.code == "signature_invalid"
    with pytest.raises(StipError) as caught:
        instances.inspect(made.directory, home.developer.public_key(), stranger.sealing)
    assert caught.value.code == "sealed_part_invalid"


def test_an_instance_is_added_once_and_removal_destroys_its_grant(made: MadeInstance, home: Home) -> None:
    inspected = inspect(made.directory, home)
    store = Store(home.database)
    with store.write() as db:
        alice = users.add(db, "alice", bytes(32), budget=1, now=1)
        instance = instances.add(db, inspected, storage_key=home.storage_key, owner=alice, now=1)
        assert (instance.kind, instance.members) == ("dedicated", (alice.id,))
        with pytest.raises(InstanceRefused):
            instances.allow(db, made.id, alice)
    with pytest.raises(InstanceRefused), store.write() as db:
        instances.add(db, inspected, storage_key=home.storage_key, owner=None, now=2)
    with store.write() as db:
        assert instances.remove(db, made.id, now=3).sealed_grant is None
    with store.read() as db:
        assert instances.everything(db) == []
        assert [one.id for one in instances.everything(db, removed=True)] == [made.id]
    with pytest.raises(InstanceRefused), store.write() as db:
        instances.remove(db, made.id, now=4)
    with pytest.raises(InstanceRefused), store.write() as db:
        instances.allow(db, made.id, users.by_name(db, "alice"))
    with pytest.raises(InstanceRefused), store.write() as db:
        instances.add(db, inspected, storage_key=home.storage_key, owner=None, now=4)
    store.close()


def test_a_removed_grant_is_in_no_file_of_the_home_even_while_the_service_runs(made: MadeInstance, home: Home) -> None:
    running, store = Store(home.database), Store(home.database)
    with store.write() as db:
        grant = instances.add(db, inspect(made.directory, home), storage_key=home.storage_key, owner=None, now=1)
    sealed = grant.sealed_grant or b""
    with running.read() as db:
        assert instances.by_id(db, made.id).sealed_grant == sealed

    def kept() -> list[str]:
        return [path.name for path in home.path.iterdir() if sealed in path.read_bytes()]

    assert kept()
    with store.write() as db:
        instances.remove(db, made.id, now=3)
    store.forget()
    assert not kept()
    store.close()
    running.close()


def test_a_stored_grant_opens_only_in_its_row_under_its_key(made: MadeInstance, home: Home) -> None:
    grant = inspect(made.directory, home).grant
    locked = vault.lock(grant, home.storage_key)
    assert vault.unlock(locked, home.storage_key, instance=grant.instance, epoch=grant.epoch) == grant
    assert grant.part_key not in locked
    for key, instance, epoch, data in (
        (bytes(32), grant.instance, 0, locked),
        (home.storage_key, "0" * 32, 0, locked),
        (home.storage_key, grant.instance, 1, locked),
        (home.storage_key, grant.instance, 0, locked[:-1] + bytes([locked[-1] ^ 1])),
        (home.storage_key, grant.instance, 0, b""),
    ):
        with pytest.raises(IntegrityError):
            vault.unlock(data, key, instance=instance, epoch=epoch)


def test_secrets_stay_out_of_every_repr(made: MadeInstance, home: Home) -> None:
    inspected = inspect(made.directory, home)
    for shown in (repr(inspected), repr(home), repr(inspected.grant)):
        for secret in (inspected.grant.part_key, home.storage_key, made.root):
            assert secret.hex() not in shown
            assert repr(secret)[2:-1] not in shown
    assert isinstance(inspected.grant, Grant)
