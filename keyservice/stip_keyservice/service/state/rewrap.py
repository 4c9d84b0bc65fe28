"""Moving everything under a new root key, in steps of which each is whole or did not happen.

    1  a new root key is handed to its provider
    2  home.toml: both root keys, each also wrapped under the other
    3  the database: all top-level data keys, in one transaction, with an audit entry
    4  the home's private keys, file by file
    5  home.toml: the new root key alone; recovery shares open it; the former is retired
    6  the former provider destroys what it kept
    7  home.toml: nothing is retired any more

From 2 to 5 either provider opens everything, because each root key opens the other; before that the former does, after
that the new one. A rewrap that was interrupted goes on where it stopped. Replicas may run meanwhile: they ask their
home again when they meet a root key that they do not hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stip_keyservice.home import Home, locked
from stip_keyservice.rootkey import files, providers, settings
from stip_keyservice.rootkey.ring import SoftwareRoot
from stip_keyservice.rootkey.settings import HomeSettings, RootKeySettings, write_private
from stip_keyservice.service.auditlog import AuditLog, Trail
from stip_keyservice.service.state import recovery
from stip_keyservice.service.state.store import Store
from stip_keyservice.service.vault import Vault
from stip_protocol.errors import ConfigurationError, IntegrityError


@dataclass(frozen=True)
class Rewrapped:
    """What a rewrap did, or what was left of it to do."""

    identity: str
    """Of the root key that is present now."""
    kind: str
    data_keys: int
    files: int
    former: str
    """What became of the former one, and what is left to the operator."""


def rewrap(home: Home, store: Store, audit: AuditLog, to: RootKeySettings | None, *, now: int) -> Rewrapped:
    """Move everything under a new root key kept by `to`; without it, go on with a rewrap that was interrupted.

    Raises `ConfigurationError` where there is nothing to go on with, or something else to finish first; what the
    providers raise; `Unavailable`.
    """
    with locked(home.path):
        found = settings.load(home.path)
        if to is not None and (found.rewrap is not None or found.retired is not None):
            raise ConfigurationError("root key: an interrupted rewrap comes first; run `root-key rewrap` without --to")
        if to is None and found.rewrap is None:
            return _retired(home.path, found, 0, 0)
        ring = _both(home, found, to)
        configured = settings.load(home.path)
        data_keys = _move_database(store, audit, ring, now)
        moved = _move_files(home.path, ring)
        _require_moved(home.path, store, ring)
        _flip(home.path, configured, ring)
        return _retired(home.path, settings.load(home.path), data_keys, moved)


def _both(home: Home, found: HomeSettings, to: RootKeySettings | None) -> SoftwareRoot:
    """Both root keys; the new one wraps. Steps 1 and 2, where they were not done before."""
    recovery.present(home.path, home.root)
    present = home.root.material()
    if found.rewrap is None:
        assert to is not None
        following = providers.new_root_key()
        kept = providers.keep(to, home.path, following)
        named = found.root_key.model_copy(update={"id": home.root.id.hex()})
        linked = providers.link(present, following, kept)
        settings.store(home.path, found.model_copy(update={"root_key": named, "rewrap": linked}))
    else:
        following = providers.through(found.rewrap, present)
    return SoftwareRoot(following, present)


def _move_database(store: Store, audit: AuditLog, ring: SoftwareRoot, now: int) -> int:
    vault = Vault(ring)
    with store.write() as db:
        if vault.root_id(db) == ring.id:
            return 0
        moved = vault.rewrap(db, ring)
        audit.append(db, Trail("root_key_rewrapped", now, {"detail": ring.id.hex()}))
    return moved


def _move_files(home: Path, ring: SoftwareRoot) -> int:
    moved = 0
    for path in files.present(home):
        data = path.read_bytes()
        if not files.is_plain(data) and files.sealed_under(data) != ring.id:
            write_private(path, files.seal(ring, path.name, files.unseal(ring, path.name, data)))
            moved += 1
    return moved


def _require_moved(home: Path, store: Store, ring: SoftwareRoot) -> None:
    """The new root key alone opens everything. Raises `IntegrityError`."""
    alone = SoftwareRoot(ring.material())
    for path in files.present(home):
        files.unseal(alone, path.name, path.read_bytes())
    vault = Vault(alone)
    with store.read() as db:
        if vault.root_id(db) != ring.id:
            raise IntegrityError("state: another process moved the data keys back")
        for row in vault.everything(db):
            vault.try_key(db, row.id)


def _flip(home: Path, configured: HomeSettings, ring: SoftwareRoot) -> None:
    assert configured.rewrap is not None
    update = {
        "root_key": configured.rewrap.next,
        "rewrap": None,
        "retired": configured.root_key,
        "recovery": configured.recovery and providers.keep(configured.recovery, home, ring.material()),
    }
    settings.store(home, configured.model_copy(update=update))


def _retired(home: Path, configured: HomeSettings, data_keys: int, moved: int) -> Rewrapped:
    """Steps 6 and 7. A former provider that does not answer is left to the operator: it may be why this is done."""
    if configured.retired is None:
        raise ConfigurationError("root key: no rewrap was interrupted; say what is to keep the new one (--to)")
    try:
        former = providers.provider(configured.retired, home).discard()
    except ConfigurationError as error:
        former = f"the {configured.retired.kind} does not answer ({error.message}): destroy what it holds yourself"
    settings.store(home, configured.model_copy(update={"retired": None}))
    return Rewrapped(configured.root_key.id or "", configured.root_key.kind, data_keys, moved, former)
