"""Recovery by shares: what they open, tried against everything a home and its database hold.

A rehearsal changes nothing. It opens each private key and compares it with its public half, each data key, each grant,
each canary, and walks the audit log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate
from sqlalchemy import Connection, select

from stip_keyservice.home import locked
from stip_keyservice.rootkey import files, providers, settings
from stip_keyservice.rootkey.ring import SoftwareRoot
from stip_keyservice.rootkey.settings import HomeSettings, RootKeySettings
from stip_keyservice.service import auditlog, instances
from stip_keyservice.service.state.schema import canaries, grants
from stip_keyservice.service.state.store import Store
from stip_keyservice.service.vault import Vault
from stip_protocol.errors import ConfigurationError, IntegrityError, StipError, Unavailable
from stip_protocol.runtime.files import read_ed25519


@dataclass(frozen=True)
class Checked:
    """One kind of thing, and how much of it is as it should be."""

    what: str
    there: int
    opens: int
    fault: str | None = None
    """Of the first that does not open."""

    @property
    def whole(self) -> bool:
        return self.there == self.opens


def unlock(home: Path, shares: Sequence[str]) -> SoftwareRoot:
    """The root key by shares, and amid a rewrap both. Raises `ConfigurationError`, `IntegrityError`."""
    configured = settings.load(home)
    key = providers.require_recovery(configured).open(shares)
    if configured.rewrap is None:
        return SoftwareRoot(key)
    return SoftwareRoot(key, providers.through(configured.rewrap, key))


def present(home: Path, root: SoftwareRoot) -> HomeSettings:
    """The settings of a home whose root key that is. To be asked under the home's lock by whoever hands it on: after a
    rewrap by another process a former root key would look kept, and open nothing. Raises `Unavailable`."""
    configured = settings.load(home)
    if configured.root_key.id not in (None, root.id.hex()):
        raise Unavailable("root key: another process rewrapped this home meanwhile; run the command again")
    return configured


def rehearse(home: Path, root: SoftwareRoot, store: Store) -> list[Checked]:
    """Open everything; what does not open is in the report. Raises `Unavailable`."""
    vault = Vault(root)
    report = [_each(path.name, [lambda path=path: _private_key(home, root, path)]) for path in files.present(home)]  # type: ignore[misc]
    with store.read() as db:
        keys = vault.everything(db)
        for what, below in (("data keys under the root key", False), ("data keys under data keys", True)):
            chosen = [row.id for row in keys if (row.parent is not None) == below]
            report.append(_each(what, [lambda key=key: vault.try_key(db, key) for key in chosen]))  # type: ignore[misc]
        report.append(_each("grants", _grants(db, vault)))
        report.append(_each("canaries", _canaries(db, vault)))
    report.append(_each("audit log", [lambda: _audit_log(home, store)]))
    return report


def recover(home: Path, root: SoftwareRoot, to: RootKeySettings) -> HomeSettings:
    """Hand the root key to another provider, where the one that kept it is gone. The root key stays as it is: nothing
    but `home.toml` changes. Raises what the provider raises."""
    with locked(home):
        configured = present(home, root)
        kept = providers.keep(to, home, root.material())
        changed = configured.model_copy(update={"root_key": kept})
        settings.store(home, changed)
    return changed


def _each(what: str, tries: Sequence[Callable[[], object]]) -> Checked:
    faults = [fault for attempt in tries if (fault := _fault(attempt)) is not None]
    return Checked(what, len(tries), len(tries) - len(faults), faults[0] if faults else None)


def _fault(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except StipError as error:
        return error.message
    return None


def _private_key(home: Path, root: SoftwareRoot, path: Path) -> None:
    try:
        key = load_pem_private_key(files.unseal(root, path.name, path.read_bytes()), None)
        certificate = path.with_suffix(".pem")
        if certificate.exists():
            public = load_pem_x509_certificate(certificate.read_bytes()).public_key()
            there = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        else:
            there = path.with_suffix(".pub").read_bytes()
    except (OSError, ValueError, TypeError):
        raise IntegrityError(f"{path.name}: it, or its public half, cannot be read") from None
    if key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) != there:
        raise IntegrityError(f"{path.name}: not the key of its public half")


def _grants(db: Connection, vault: Vault) -> list[Callable[[], object]]:
    rows = db.execute(select(grants.c.instance, grants.c.epoch)).all()
    return [lambda row=row: instances.grant(db, vault, row.instance, row.epoch) for row in rows]  # type: ignore[misc]


def _canaries(db: Connection, vault: Vault) -> list[Callable[[], object]]:
    return list(_canary_tries(db, vault))


def _canary_tries(db: Connection, vault: Vault) -> Iterator[Callable[[], object]]:
    joined = canaries.join(
        grants, (canaries.c.instance == grants.c.instance) & (canaries.c.epoch == grants.c.epoch), isouter=True
    )
    for row in db.execute(select(canaries, grants.c.data_key).select_from(joined)).all():
        place: list[object] = ["canary", row.instance, row.epoch, row.number]
        yield lambda row=row, place=place: vault.open(db, row.data_key or b"", row.sealed, place)  # type: ignore[misc]


def _audit_log(home: Path, store: Store) -> None:
    auditlog.verify(store, read_ed25519(home / "service.pub", field="service.pub"))


def require_whole(report: Sequence[Checked]) -> None:
    """Raises `IntegrityError` naming what does not open."""
    broken = [f"{one.what}: {one.fault}" for one in report if not one.whole]
    if broken:
        raise IntegrityError(f"recovery: {len(broken)} do not open; {'; '.join(broken)}")


def require_home(home: Path) -> None:
    """Raises `ConfigurationError` where there is nothing that shares could open."""
    if not files.present(home):
        raise ConfigurationError.because("home", f"{home}, which holds no keys", "a home, or its backup")
