"""Rewrapping, recovery, shredding: what opens what, at every moment and afterwards."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stip_keyservice.home import Home
from stip_keyservice.rootkey import files, settings
from stip_keyservice.rootkey.providers import fetch, through
from stip_keyservice.rootkey.ring import SoftwareRoot
from stip_keyservice.rootkey.settings import FileSettings, GramineSettings
from stip_keyservice.service import instances, users
from stip_keyservice.service.auditlog import AuditLog, verify
from stip_keyservice.service.shredding import shred_instance, shred_user
from stip_keyservice.service.state import recovery
from stip_keyservice.service.state.rewrap import Rewrapped, rewrap
from stip_keyservice.service.state.store import Store
from stip_keyservice.service.vault import Vault, open_vault
from stip_protocol.errors import ConfigurationError, IntegrityError, StipError, Unavailable
from stip_protocol.release import Grant

from ..services.kills import died
from ..services.softhsm import Token
from .conftest import MadeInstance, make_instance
from .place import Place


@dataclass
class Kept:
    """A home with a shared instance, one dedicated to a domain of two, and one dedicated to a user alone."""

    home: Path
    shared: MadeInstance
    dedicated: MadeInstance
    own: MadeInstance
    alice: str

    def open(self) -> tuple[Home, Store]:
        home = Home.open(self.home)
        return home, Store(home.database)

    def grants(self) -> dict[str, Grant]:
        """Of every instance, opened as the service opens it."""
        home, store = self.open()
        with store.read() as db:
            found = {
                one.id: instances.grant(db, open_vault(home), one.id, 0)
                for one in (self.shared, self.dedicated, self.own)
            }
        store.close()
        return found

    def rewrap(self, to: settings.RootKeySettings | None) -> Rewrapped:
        home, store = self.open()
        try:
            return rewrap(home, store, AuditLog(store, home.service), to, now=2)
        finally:
            store.close()


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    home = Home.open(tmp_path / "home")
    made = [make_instance(tmp_path / f"made{number}", home) for number in range(3)]
    store, vault = Store(home.database), open_vault(home)
    home.tls("localhost")
    with store.write() as db:
        alice = users.add(db, "alice", os.urandom(32), budget=10, now=1)
        for one, domain in zip(made, (None, "acme", alice.domain), strict=True):
            inspected = instances.inspect(one.directory, home.developer.public_key(), home.sealing)
            instances.add(db, inspected, vault=vault, domain=domain, now=1)
    store.close()
    return Kept(home.path, *made, alice.id)


def everything(home: Path, root: SoftwareRoot, store: Store) -> None:
    """Raises where a root key does not open all that the home and the database hold."""
    report = recovery.rehearse(home, root, store)
    recovery.require_whole(report)
    assert {one.what: one.there for one in report}["grants"] == 3


def test_after_a_rewrap_the_new_root_key_opens_everything_and_the_former_nothing(kept: Kept) -> None:
    former, before = Home.open(kept.home).root.material(), kept.grants()
    done = kept.rewrap(FileSettings(path="next.key"))
    assert (done.kind, done.data_keys, done.files) == ("file", 3, 6)
    assert kept.grants() == before
    assert not (kept.home / "root.key").exists()
    home, store = kept.open()
    assert home.root.material() != former
    report = recovery.rehearse(kept.home, SoftwareRoot(former), store)
    assert [one.what for one in report if one.opens and one.what != "audit log"] == []
    everything(kept.home, SoftwareRoot((kept.home / "next.key").read_bytes()), store)
    assert verify(store, home.service.public_key()).sequence == 1
    store.close()


def test_a_replica_that_holds_the_former_root_key_goes_on_and_makes_keys_under_the_new_one(kept: Kept) -> None:
    replica, store = kept.open()
    vault = open_vault(replica)
    kept.rewrap(FileSettings(path="next.key"))
    with store.write() as db:
        assert instances.grant(db, vault, kept.own.id, 0)
        vault.make(db, "domain/new", parent=None, now=3)
    replica.tls("other.example")
    everything(kept.home, SoftwareRoot((kept.home / "next.key").read_bytes()), store)
    store.close()


def test_a_replica_whose_home_was_left_behind_makes_no_key_that_nobody_opens(kept: Kept, tmp_path: Path) -> None:
    shutil.copytree(kept.home, tmp_path / "elsewhere")
    left_behind = Home.open(tmp_path / "elsewhere")
    kept.rewrap(FileSettings(path="next.key"))
    _, store = kept.open()
    with pytest.raises(IntegrityError, match="root key that this home does not have"), store.write() as db:
        open_vault(left_behind).make(db, "domain/new", parent=None, now=3)
    store.close()


def test_a_rewrap_goes_from_any_provider_to_any_other(kept: Kept, softhsm: Token, tmp_path: Path) -> None:
    before = kept.grants()
    keys = tmp_path / "enclave"
    keys.mkdir()
    for name in ("_sgx_mrenclave", "_sgx_mrsigner"):
        (keys / name).write_bytes(os.urandom(16))
    token = {"module": softhsm.module, "token": softhsm.label, "pin_file": str(softhsm.pin_file)}
    for step, to in enumerate(
        (
            GramineSettings(keys=str(keys)),
            GramineSettings(key="_sgx_mrsigner", keys=str(keys)),
            settings.Pkcs11Settings(**token, label="rewrapped"),
            FileSettings(path="last.key"),
        )
    ):
        done = kept.rewrap(to)
        assert kept.grants() == before
        if to.kind == "gramine" and to.key == "_sgx_mrsigner":
            (keys / "_sgx_mrenclave").write_bytes(os.urandom(16))  # the enclave is upgraded
            assert kept.grants() == before
        assert step != 3 or "destroyed" in done.former
    home, store = kept.open()
    assert verify(store, home.service.public_key()).sequence == 4
    store.close()


def test_a_former_provider_that_is_gone_keeps_nobody_from_finishing(kept: Kept, tmp_path: Path) -> None:
    token = tmp_path / "token"
    kept.rewrap(FileSettings(path=str(token)))
    configured = settings.load(kept.home)
    gone = settings.Pkcs11Settings(module="/gone.so", token="gone")
    settings.store(kept.home, configured.model_copy(update={"retired": gone}))
    assert "destroy what it holds yourself" in kept.rewrap(None).former
    with pytest.raises(ConfigurationError, match="no rewrap was interrupted"):
        kept.rewrap(None)


def test_a_root_key_that_was_rewrapped_meanwhile_is_handed_to_nobody(kept: Kept) -> None:
    before, store = kept.open()
    kept.rewrap(FileSettings(path="next.key"))
    found = settings.load(kept.home)
    for act in (
        lambda: recovery.recover(kept.home, before.root, FileSettings(path="third.key")),
        lambda: rewrap(before, store, AuditLog(store, before.service), FileSettings(path="third.key"), now=3),
    ):
        with pytest.raises(Unavailable, match="another process rewrapped"):
            act()
    assert settings.load(kept.home) == found
    assert not (kept.home / "third.key").exists()
    store.close()


def test_shares_of_a_root_key_that_was_rewrapped_meanwhile_are_not_made(
    placed: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Home.open(placed.home)
    placed.call_here("root-key", "rewrap", "--to", "file")
    monkeypatch.setattr(Home, "open", lambda path: opened)  # what the command opened before the other one was through
    out = placed.folder / "shares"
    made = ["--threshold", "2", "--shares", "3", "--out", str(out)]
    assert placed.call_here("root-key", "shares", "create", *made, code=1)["error"]["code"] == "unavailable"
    assert settings.load(placed.home).recovery is None
    assert not out.exists()


# A rewrap that is killed ---------------------------------------------------------------------------------------------


def killed(kept: Kept, at: int) -> bool:
    """A rewrap that is killed at the `at`-th point; False where there were fewer."""

    def run() -> None:
        home, store = kept.open()
        rewrap(home, store, AuditLog(store, home.service), FileSettings(path="next.key"), now=2)

    return died(run, at)


def alone(home: Path) -> Iterator[SoftwareRoot]:
    """What each of the two providers opens without the other."""
    configured = settings.load(home)
    for keeper in (configured.root_key, configured.rewrap and configured.rewrap.next):
        if keeper is None:
            continue
        try:
            key = fetch(keeper, home)
        except ConfigurationError:
            continue
        others = [] if configured.rewrap is None else [through(configured.rewrap, key)]
        yield SoftwareRoot(key, *others)


def test_a_rewrap_killed_at_any_point_leaves_everything_open_and_goes_on(kept: Kept, tmp_path: Path) -> None:
    before = kept.grants()
    pristine = tmp_path / "pristine"
    shutil.copytree(kept.home, pristine)
    met, at = set(), 0
    while True:
        shutil.rmtree(kept.home)
        shutil.copytree(pristine, kept.home)
        if not killed(kept, at):
            break
        configured = settings.load(kept.home)
        _, store = kept.open()
        roots = list(alone(kept.home))
        assert len(roots) == (2 if configured.rewrap else 1)
        for root in roots:
            everything(kept.home, root, store)
        store.close()
        met.add((configured.rewrap is not None, configured.retired is not None))
        if configured.rewrap is not None or configured.retired is not None:
            with pytest.raises(ConfigurationError, match="interrupted rewrap comes first"):
                kept.rewrap(FileSettings(path="third.key"))
            kept.rewrap(None)
        elif not (kept.home / "next.key").exists():
            kept.rewrap(FileSettings(path="next.key"))
        assert kept.grants() == before
        at += 1
    assert at > 20
    assert met == {(False, False), (True, False), (False, True)}


# Shares --------------------------------------------------------------------------------------------------------------


def made_shares(place: Place, name: str = "shares") -> list[str]:
    folder = place.folder / name
    place.call_here("root-key", "shares", "create", "--threshold", "2", "--shares", "3", "--out", str(folder))
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    return [str(path) for path in sorted(folder.iterdir())]


def options(paths: list[str]) -> list[str]:
    return [word for path in paths for word in ("--share", path)]


def fingerprint(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.iterdir() if not path.name.startswith("state.db-")}


@pytest.fixture
def placed(place: Place) -> Place:
    home = Home.open(place.home)
    for number, dedicated in enumerate((True, False)):
        made = make_instance(place.folder / f"made{number}", home)
        if number == 0:
            place.call_here("users", "add", "alice", "--public-key", os.urandom(32).hex(), "--budget", "10")
        whom = ["--dedicated-to", "alice"] if dedicated else ["--shared"]
        place.call_here("instances", "add", str(made.directory), *whom)
    return place


def test_a_rehearsal_opens_everything_with_real_shares_and_changes_nothing(placed: Place) -> None:
    paths = made_shares(placed)
    before = fingerprint(placed.home)
    shown = placed.call_here("recover", "--dry-run", *options(paths[1:]))
    checks = {one["what"]: (one["there"], one["opens"]) for one in shown["checks"]}
    assert checks["grants"] == (2, 2)
    assert checks["data keys under the root key"] == (2, 2)
    assert checks["data keys under data keys"] == (1, 1)
    assert all(there == opens for there, opens in checks.values())
    assert {"developer.key", "service.key", "sealing.key", "link-ca.key", "tls-ca.key"} < set(checks)
    assert fingerprint(placed.home) == before


def test_a_rehearsal_says_what_does_not_open(placed: Place) -> None:
    paths = made_shares(placed)
    key = placed.home / "sealing.key"
    key.write_bytes(key.read_bytes()[:-1] + b"x")
    with sqlite3.connect(placed.home / "state.db") as db:
        db.execute("UPDATE grants SET sealed = x'00' WHERE instance = (SELECT min(instance) FROM grants)")
    db.close()
    shown = placed.call_here_raw("recover", "--dry-run", *options(paths[:2]), code=1)
    assert "2 do not open" in shown
    assert "sealing.key: altered" in shown
    assert "stored grant" in shown


def test_a_home_whose_provider_is_lost_comes_back_by_shares_and_not_by_too_few(placed: Place) -> None:
    paths = made_shares(placed)
    (placed.home / "root.key").unlink()
    assert placed.call_here("home", "show", code=2)["error"]["code"] == "configuration_invalid"
    for given in ([], paths[:1], [paths[0], paths[0]]):
        placed.call_here("recover", "--to", "file", *options(given), code=2)
    placed.call_here("recover", "--to", "file", "--key-file", str(placed.folder / "new.key"), *options(paths[:2]))
    assert placed.call_here("state", "check")["audit_entries"] == 5
    listed = placed.call_here("audit-log", "list")
    assert [entry["event"] for entry in listed][-2:] == ["recovery_shares_made", "recovered"]


def test_shares_stay_good_when_the_root_key_is_rewrapped_and_new_ones_replace_them(placed: Place) -> None:
    first = made_shares(placed)
    placed.call_here("root-key", "rewrap", "--to", "file")
    placed.call_here("recover", "--dry-run", *options(first[:2]))
    second = made_shares(placed, "second")
    refused = placed.call_here("recover", "--dry-run", *options(first[:2]), code=2)
    assert "another recovery key" in refused["error"]["message"]
    assert (
        "several sets"
        in placed.call_here("recover", "--dry-run", *options([first[0], second[1]]), code=2)["error"]["message"]
    )
    placed.call_here("recover", "--dry-run", *options(second[:2]))


def test_an_enclave_that_was_upgraded_takes_its_home_over_by_shares(placed: Place) -> None:
    keys = placed.folder / "enclave"
    keys.mkdir()
    (keys / "_sgx_mrenclave").write_bytes(os.urandom(16))
    gramine = ["--sealing-keys", str(keys)]
    paths = made_shares(placed)
    placed.call_here("root-key", "rewrap", "--to", "gramine", *gramine)
    (keys / "_sgx_mrenclave").write_bytes(os.urandom(16))
    assert placed.call_here("state", "check", code=1)["error"]["code"] == "integrity_violated"
    placed.call_here("recover", "--to", "gramine", *gramine, *options(paths[:2]))
    placed.call_here("state", "check")
    placed.call_here("root-key", "rewrap", "--to", "gramine", *gramine)
    placed.call_here("state", "check")


def test_a_home_without_shares_says_how_to_make_them(placed: Place) -> None:
    refused = placed.call_here("recover", "--dry-run", code=2)
    assert "root-key shares create" in refused["error"]["message"]
    assert placed.call_here_raw("recover", code=2)
    assert placed.call_here_raw("recover", "--dry-run", "--to", "file", code=2)


def test_a_rewrap_can_end_in_shares_alone(placed: Place) -> None:
    paths = made_shares(placed)
    placed.call_here("root-key", "rewrap", "--to", "shares")
    assert "nobody to ask" in placed.call_here("state", "check", code=2)["error"]["message"]
    placed.call_here("recover", "--to", "file", "--key-file", str(placed.folder / "again.key"), *options(paths[:2]))
    placed.call_here("state", "check")


# Shredding -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(kept: Kept, tmp_path: Path) -> Path:
    """The database as a backup has it, from before."""
    shutil.copy(kept.home / "state.db", tmp_path / "backup.db")
    return tmp_path / "backup.db"


def opens(path: Path, root: SoftwareRoot, instance: str) -> bool:
    store = Store(path)
    try:
        with store.read() as db:
            instances.grant(db, Vault(root), instance, 0)
    except StipError:
        return False
    finally:
        store.close()
    return True


def test_a_shredded_user_is_in_no_backup_once_the_root_key_was_rewrapped(kept: Kept, copied: Path) -> None:
    home, store = kept.open()
    with store.write() as db:
        shred_user(db, open_vault(home), users.by_id(db, kept.alice), now=2)
    store.forget()
    store.close()
    assert not opens(kept.home / "state.db", home.root, kept.own.id)
    assert opens(copied, home.root, kept.own.id), "the backup opens as long as the root key is the former"
    kept.rewrap(FileSettings(path="next.key"))
    present = Home.open(kept.home).root
    assert not opens(copied, present, kept.own.id)
    assert opens(kept.home / "state.db", present, kept.shared.id)
    assert opens(kept.home / "state.db", present, kept.dedicated.id)


@pytest.mark.parametrize("which", ["shared", "dedicated"])
def test_a_shredded_instance_is_in_no_backup_not_even_beside_the_present_database(
    kept: Kept, copied: Path, which: str
) -> None:
    one, other = (kept.shared, kept.dedicated) if which == "shared" else (kept.dedicated, kept.shared)
    home, store = kept.open()
    with store.write() as db:
        shred_instance(db, open_vault(home), one.id, now=2)
        assert instances.by_id(db, one.id).removed
    store.forget()
    store.close()
    kept.rewrap(FileSettings(path="next.key"))
    present = Home.open(kept.home).root
    assert not opens(copied, present, one.id)
    # Whoever has both databases puts today's wrapped keys of the domain into yesterday's backup.
    with sqlite3.connect(copied) as db:
        db.execute("ATTACH ? AS now", (str(kept.home / "state.db"),))
        db.execute(
            "UPDATE data_keys SET wrapped = coalesce((SELECT wrapped FROM now.data_keys n WHERE n.id = data_keys.id), "
            "wrapped) WHERE EXISTS (SELECT 1 FROM now.data_keys n WHERE n.id = data_keys.id AND n.wrapped IS NOT NULL)"
        )
    db.close()
    assert not opens(copied, present, one.id)
    assert opens(kept.home / "state.db", present, other.id)


def test_a_domains_other_instances_survive_when_one_is_shredded(kept: Kept, tmp_path: Path) -> None:
    home, store = kept.open()
    second = make_instance(tmp_path / "second", home)
    with store.write() as db:
        inspected = instances.inspect(second.directory, home.developer.public_key(), home.sealing)
        instances.add(db, inspected, vault=open_vault(home), domain="acme", now=1)
        shred_instance(db, open_vault(home), kept.dedicated.id, now=2)
        assert instances.grant(db, open_vault(home), second.id, 0) == inspected.grant
        assert open_vault(home).find(db, "domain/acme")
    store.close()


def test_an_instance_is_shredded_by_hand_and_once_more(placed: Place) -> None:
    (one, other) = (found["id"] for found in placed.call_here("instances", "list"))
    for _ in range(2):
        shown = placed.call_here("instances", "shred", one, "--yes")
        assert shown["removed"]
    assert placed.call_here("instances", "shred", "0" * 32, "--yes", code=1)["error"]["code"] == "instance_refused"
    assert [found["id"] for found in placed.call_here("instances", "list")] == [other]
    placed.call_here("state", "check")
    events = [entry["event"] for entry in placed.call_here("audit-log", "list")]
    assert events[-3:] == ["instance_shredded"] * 3


def test_no_file_of_a_home_holds_a_private_key_as_it_is(kept: Kept) -> None:
    home = Home.open(kept.home)
    raw = [home.service.private_bytes_raw(), home.developer.private_bytes_raw(), home.sealing.private_bytes_raw()]
    for path in kept.home.iterdir():
        data = path.read_bytes()
        assert b"PRIVATE KEY" not in data, path.name
        assert not any(key in data for key in raw), path.name
    assert all(files.sealed_under(path.read_bytes()) == home.root.id for path in files.present(kept.home))
