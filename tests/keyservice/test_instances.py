"""Instances on the way in: only a whole one, signed by this developer, with secrets for this key service."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from stip_keyservice.home import Home
from stip_keyservice.rootkey.ring import SoftwareRoot
from stip_keyservice.service import instances, users
from stip_keyservice.service.state.schema import data_keys, grants
from stip_keyservice.service.state.store import Store
from stip_keyservice.service.vault import Vault, open_vault
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
    store, vault = Store(home.database), open_vault(home)
    with store.write() as db:
        alice = users.add(db, "alice", bytes(32), budget=1, now=1)
        instance = instances.add(db, inspected, vault=vault, domain=alice.domain, now=1)
        assert (instance.kind, instances.users_of(db, instance)) == ("dedicated", (alice.id,))
        with pytest.raises(InstanceRefused):
            instances.allow(db, made.id, alice)
    with pytest.raises(InstanceRefused), store.write() as db:
        instances.add(db, inspected, vault=vault, domain=None, now=2)
    with store.write() as db:
        assert instances.remove(db, vault, made.id, now=3).removed
    with pytest.raises(IntegrityError), store.read() as db:
        instances.grant(db, vault, made.id, 0)
    with store.read() as db:
        assert instances.everything(db) == []
        assert [one.id for one in instances.everything(db, removed=True)] == [made.id]
    with pytest.raises(InstanceRefused), store.write() as db:
        instances.remove(db, vault, made.id, now=4)
    with pytest.raises(InstanceRefused), store.write() as db:
        instances.allow(db, made.id, users.by_name(db, "alice"))
    with pytest.raises(InstanceRefused), store.write() as db:
        instances.add(db, inspected, vault=vault, domain=None, now=4)
    store.close()


def test_a_removed_grant_is_in_no_file_of_the_home_even_while_the_service_runs(made: MadeInstance, home: Home) -> None:
    running, store, vault = Store(home.database), Store(home.database), open_vault(home)
    with store.write() as db:
        instances.add(db, inspect(made.directory, home), vault=vault, domain=None, now=1)
    with running.read() as db:
        gone = (db.execute(select(grants.c.sealed)).scalar_one(), db.execute(select(data_keys.c.wrapped)).scalar_one())

    def kept() -> list[str]:
        return [path.name for path in home.path.iterdir() if any(one in path.read_bytes() for one in gone)]

    assert kept()
    with store.write() as db:
        instances.remove(db, vault, made.id, now=3)
    store.forget()
    assert not kept()
    store.close()
    running.close()


def test_a_stored_grant_opens_only_in_its_row_under_its_key(made: MadeInstance, home: Home) -> None:
    inspected = inspect(made.directory, home)
    store, vault = Store(home.database), open_vault(home)
    with store.write() as db:
        instances.add(db, inspected, vault=vault, domain="acme", now=1)
        (row,) = db.execute(select(grants)).all()
        assert instances.grant(db, vault, made.id, 0) == inspected.grant
        assert inspected.grant.part_key not in row.sealed
        other = vault.make(db, "domain/other", parent=None, now=1)
        for sealed, key, at in (
            (row.sealed, row.data_key, ["grant", "0" * 32, 0]),
            (row.sealed, row.data_key, ["grant", made.id, 1]),
            (row.sealed, other, ["grant", made.id, 0]),
            (row.sealed[:-1] + bytes([row.sealed[-1] ^ 1]), row.data_key, ["grant", made.id, 0]),
            (b"", row.data_key, ["grant", made.id, 0]),
        ):
            with pytest.raises(IntegrityError):
                vault.open(db, key, sealed, list(at))
        with pytest.raises(IntegrityError):
            instances.grant(db, Vault(SoftwareRoot(bytes(32))), made.id, 0)
    store.close()


def test_a_shredded_domain_takes_its_grants_along(made: MadeInstance, home: Home) -> None:
    store, vault = Store(home.database), open_vault(home)
    with store.write() as db:
        instances.add(db, inspect(made.directory, home), vault=vault, domain="acme", now=1)
        vault.destroy(db, vault.find(db, "domain/acme") or b"", now=2)
        with pytest.raises(IntegrityError, match="destroyed"):
            instances.grant(db, vault, made.id, 0)
    store.close()


def test_secrets_stay_out_of_every_repr(made: MadeInstance, home: Home) -> None:
    inspected = inspect(made.directory, home)
    for shown in (repr(inspected), repr(home), repr(inspected.grant)):
        for secret in (inspected.grant.part_key, home.root.material(), made.root):
            assert secret.hex() not in shown
            assert repr(secret)[2:-1] not in shown
    assert isinstance(inspected.grant, Grant)
