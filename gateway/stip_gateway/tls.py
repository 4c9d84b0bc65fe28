"""The operator's TLS folder: an authority, and the certificates of gateway and model servers.

    FOLDER/                mode 0700
      operator-ca.pem      what every part of the operator trusts
      operator-ca.key      issues; stays on the administrator's machine
      <name>.pem           a certificate, followed by the authority's
      <name>.key           its private key

Keys have mode 0600. Nothing that exists is replaced, except a certificate by `renew`, over the same key.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from stip_protocol.durable import sync_folder, write_atomically
from stip_protocol.errors import ConfigurationError
from stip_protocol.runtime.authority import (
    Authority,
    TlsIdentity,
    Use,
    generate_key,
    issue_certificate,
    make_authority,
    names_of,
    private_pem,
    read_certificate,
    read_private,
    uses_of,
)
from stip_protocol.runtime.files import read_file

AUTHORITY = "operator-ca"
LIST_LIMIT = 4096
"""Certificates in one folder."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Listed:
    """One certificate of the folder, for people to read."""

    name: str
    kind: str
    """`authority`, or what it is good for: `server`, `client`, `client, server`, `nothing`."""
    names: tuple[str, ...]
    ends: datetime
    days_left: int
    """Whole days; negative where it has expired."""
    problem: str
    """What is wrong with it besides its age, or nothing."""


def create(folder: Path, *, subject: str, life: timedelta) -> Path:
    """Make the folder and its authority. Raises `ConfigurationError` where there is an authority."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_free(folder, AUTHORITY)
        key = generate_key()
        return _store(folder, AUTHORITY, TlsIdentity(private_pem(key), make_authority(key, subject, life=life)))
    except OSError as error:
        raise _unusable(folder, error) from None


def issue(folder: Path, name: str, *, names: Sequence[str], uses: Collection[Use], life: timedelta) -> Path:
    """Issue `<name>.pem` over a fresh key. Raises `ConfigurationError`, also where there is one of that name."""
    if not _NAME.fullmatch(name) or name == AUTHORITY:
        raise ConfigurationError.because("name", ascii(name)[:80], f"letters, digits, . _ -, and not {AUTHORITY}")
    authority = _authority(folder)
    try:
        _require_free(folder, name)
        key = generate_key()
        chain = issue_certificate(
            authority, key.public_key(), names=names or [name], uses=uses, common_name=name, life=life
        )
        return _store(folder, name, TlsIdentity(private_pem(key), chain))
    except OSError as error:
        raise _unusable(folder, error) from None


def renew(folder: Path, name: str, *, life: timedelta) -> Path:
    """Replace `<name>.pem` by one with the same key, names and uses, and a new term. Raises `ConfigurationError`.

    Whoever holds the old certificate keeps it to its end: a key that leaked wants another name, or another authority.
    """
    authority = _authority(folder)
    path = folder / f"{name}.pem"
    key = read_private(read_file(path.with_suffix(".key"), field="private key"), f"{name}.key")
    old = Authority.load(key, read_file(path, field="certificate"), path.name).certificate
    if old.issuer != authority.certificate.subject:
        raise ConfigurationError.because(path.name, "a certificate of another authority", f"one of {AUTHORITY}.pem")
    chain = issue_certificate(
        authority,
        key.public_key(),
        names=sorted(str(one.value) for one in names_of(old)),
        uses=uses_of(old),
        common_name=name,
        life=life,
    )
    try:
        write_atomically(path, chain)
        sync_folder(folder)
    except OSError as error:
        raise _unusable(folder, error) from None
    return path


def listed(folder: Path) -> list[Listed]:
    """Every certificate of the folder, the one that ends first in front. Raises `ConfigurationError`."""
    paths = sorted(folder.glob("*.pem"))
    if not 0 < len(paths) <= LIST_LIMIT:
        raise ConfigurationError.because(f"certificates in {folder}", len(paths), f"1 to {LIST_LIMIT}")
    authority = read_certificate(read_file(folder / f"{AUTHORITY}.pem", field="authority"), f"{AUTHORITY}.pem")
    return sorted((_listed(path, authority) for path in paths), key=lambda one: one.ends)


def _listed(path: Path, authority: x509.Certificate) -> Listed:
    certificate = read_certificate(read_file(path, field="certificate"), path.name)
    ends = certificate.not_valid_after_utc
    own = path.stem == AUTHORITY
    return Listed(
        name=path.stem,
        kind="authority" if own else ", ".join(sorted(uses_of(certificate))) or "nothing",
        names=tuple(sorted(str(one.value) for one in names_of(certificate))),
        ends=ends,
        days_left=(ends - datetime.now(UTC)) // timedelta(days=1),
        problem=_key_problem(path.with_suffix(".key")) or _chain_problem(certificate, authority),
    )


def _key_problem(key: Path) -> str:
    """A missing key is none: on a host that only trusts, or only serves, there is less than where it was made."""
    return "its key can be read by others: chmod go= " + key.name if key.exists() and key.stat().st_mode & 0o077 else ""


def _chain_problem(certificate: x509.Certificate, authority: x509.Certificate) -> str:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        return f"not issued by {AUTHORITY}.pem ({type(error).__name__})"
    return ""


def _authority(folder: Path) -> Authority:
    key = read_private(read_file(folder / f"{AUTHORITY}.key", field="authority"), f"{AUTHORITY}.key")
    return Authority.load(key, read_file(folder / f"{AUTHORITY}.pem", field="authority"), f"{AUTHORITY}.pem")


def _require_free(folder: Path, name: str) -> None:
    for path in (folder / f"{name}.key", folder / f"{name}.pem"):
        if path.exists():
            raise ConfigurationError.because(str(path), "a file", "a free name: nothing is overwritten")


def _store(folder: Path, name: str, identity: TlsIdentity) -> Path:
    """Key first: a certificate that is there has its key."""
    path = folder / f"{name}.pem"
    write_atomically(path.with_suffix(".key"), identity.private_key, mode=0o600)
    write_atomically(path, identity.chain)
    sync_folder(folder)
    return path


def _unusable(folder: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"TLS folder {folder}: {error.strerror}", field="folder")
