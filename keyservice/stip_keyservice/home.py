"""The key service's home: the keys of the model developer's room, in files that only their owner reads.

    developer.key/.pub   Ed25519, signs manifests
    service.key/.pub     Ed25519, signs releases, leases and audit heads
    sealing.key/.pub     X25519, what instance secrets are sealed to
    link-ca.key/.pem     P-256 authority of link certificates
    tls-ca.key/.pem      P-256 authority of the key service's own server certificate
    tls.key/.pem         server certificate and its issuer
    root.key             the root key, 32 bytes, where nothing better keeps it
    home.toml            where the database is, and what keeps the root key (`stip_keyservice.rootkey.settings`)
    state.db             the store, where it is SQLite

The folder has mode 0700, its files 0600. What is missing is made on first use: each file appears whole or not
at all, and a lock keeps two processes from making two keys. Nothing that exists is ever replaced, except a
server certificate of our own authority that runs out. Private keys are PKCS #8 PEM wrapped under the root key
(`stip_keyservice.rootkey.files`), public keys SubjectPublicKeyInfo PEM.

A home is *sealed* once `home.toml` names its root key by id, which happens as soon as no key of ours lies there as
plain PEM. From then on a plain key of ours is refused (somebody else put it there), and no other root key is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self, TypeVar, cast

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509 import load_pem_x509_certificate
from sqlalchemy import URL, make_url

from stip_keyservice.certificates import issue_server_certificate, usable
from stip_keyservice.rootkey import files, providers, settings
from stip_keyservice.rootkey.ring import SoftwareRoot
from stip_keyservice.rootkey.settings import HomeSettings, write_private
from stip_protocol.errors import ConfigurationError, IntegrityError, Unavailable
from stip_protocol.runtime.authority import Authority, TlsIdentity, generate_key, make_authority

HOME_VARIABLE = "STIP_KEYSERVICE_HOME"
DEFAULT_HOME = Path("~/.stip/keyservice")
DATABASE = "state.db"
FILE_LIMIT = 1 << 20
"""Bytes of the largest key or certificate file read."""
LOCK_SECONDS, LOCK_PAUSE = 30.0, 0.05
"""How long a process waits for the home's lock, and between two tries: whoever holds it may wait for a database or a
person with a PIN."""

K = TypeVar("K", Ed25519PrivateKey, X25519PrivateKey, ec.EllipticCurvePrivateKey)


@dataclass(frozen=True)
class Home:
    """An opened home. Its repr shows its path and no key."""

    path: Path
    developer: Ed25519PrivateKey
    service: Ed25519PrivateKey
    sealing: X25519PrivateKey
    link_ca: Authority
    tls_ca: Authority
    root: SoftwareRoot = field(repr=False)
    """The root key, which wraps the keys above and the database's data keys."""
    settings: HomeSettings = field(repr=False)

    @classmethod
    def open(cls, path: Path | None = None) -> Self:
        """The home at `path`, by default `$STIP_KEYSERVICE_HOME` or `~/.stip/keyservice`; makes what is missing.

        Raises `ConfigurationError` where the folder or a file is open to others, cannot be read or written, or
        holds something else than its name says; `IntegrityError` where a key is not under this home's root key;
        `Unavailable` where another process is at work there for long.
        """
        path = locate(path)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_private(path)
            with locked(path):
                configured = settings.load(path)
                root = _root(path, configured)
                opened = cls(
                    path=path,
                    developer=_pair(path, root, "developer", Ed25519PrivateKey, Ed25519PrivateKey.generate),
                    service=_pair(path, root, "service", Ed25519PrivateKey, Ed25519PrivateKey.generate),
                    sealing=_pair(path, root, "sealing", X25519PrivateKey, X25519PrivateKey.generate),
                    link_ca=_authority(path, root, "link-ca", "STIP link authority"),
                    tls_ca=_authority(path, root, "tls-ca", "STIP key service authority"),
                    root=root,
                    settings=configured,
                )
                return opened._sealed()
        except OSError as error:
            raise ConfigurationError(f"home {path}: {error.strerror}", field="home") from None

    def __repr__(self) -> str:
        return f"Home(path={str(self.path)!r})"

    @property
    def database(self) -> Path | URL:
        """Where the store is: a file, or the URL of a PostgreSQL database."""
        return database_of(self.path, self.settings)

    @property
    def password_file(self) -> Path | None:
        """Where the database user's password is."""
        configured = self.settings.database
        return None if configured is None or configured.password_file is None else self.path / configured.password_file

    def tls(self, dns_name: str) -> TlsIdentity:
        """The server certificate of the key service under `dns_name` (or an IP address).

        A `tls.key`/`tls.pem` that another authority issued is taken as it is. Otherwise the local authority
        `tls-ca.pem`, which clients then pin, issues one and renews it before it runs out. Raises `ConfigurationError`,
        `IntegrityError`, `Unavailable`.
        """
        key_path, chain_path = self.path / "tls.key", self.path / "tls.pem"
        try:
            with locked(self.path):
                self._require_wrapped()
                key = _private(key_path, self._present_root(), ec.EllipticCurvePrivateKey, generate_key)
                if chain_path.exists():
                    chain = _load(chain_path)
                    if usable(chain, key, self.tls_ca, dns_name):
                        return TlsIdentity(_pem(key), chain)
                chain = issue_server_certificate(self.tls_ca, key, dns_name)
                write_private(chain_path, chain)
                return TlsIdentity(_pem(key), chain)
        except OSError as error:
            raise ConfigurationError(f"home {self.path}: {error.strerror}", field="home") from None

    def plain_files(self) -> tuple[str, ...]:
        """Private keys of ours that lie in their files as they are."""
        present = files.present(self.path)
        return tuple(path.name for path in present if files.is_plain(_load(path)) and self._ours(path))

    def _ours(self, path: Path) -> bool:
        """Not the TLS key that belongs to a certificate of the operator's own authority."""
        chain = path.with_suffix(".pem")
        if path.name != "tls.key" or not chain.exists():
            return True
        try:
            certificate = load_pem_x509_certificate(chain.read_bytes())
        except ValueError:
            raise ConfigurationError.because(chain.name, "something else", "a PEM certificate") from None
        try:
            certificate.verify_directly_issued_by(self.tls_ca.certificate)
        except (InvalidSignature, TypeError, ValueError):  # another issuer's name, kind of key, or signature
            return False
        return True

    def _sealed(self) -> Self:
        """Itself, with the root key's id in `home.toml` where every key of ours is wrapped. Raises `IntegrityError`."""
        if self.settings.root_key.id is not None:
            self._require_wrapped()
            return self
        if self.plain_files():  # of version 1, which `state upgrade` wraps
            return self
        named = self.settings.root_key.model_copy(update={"id": self.root.id.hex()})
        sealed = self.settings.model_copy(update={"root_key": named})
        settings.store(self.path, sealed)
        return replace(self, settings=sealed)

    def _require_wrapped(self) -> None:
        plain = self.plain_files()
        if self.settings.root_key.id is not None and plain:
            allowed = "a key wrapped under this home's root key; for tls.key also your own, beside its tls.pem"
            raise IntegrityError.because(", ".join(plain), "plain PEM", allowed)

    def _present_root(self) -> SoftwareRoot:
        """The root key that new files are wrapped under, though another process rewrapped the home meanwhile."""
        configured = settings.load(self.path)
        identity = configured.root_key.id
        if identity is None or bytes.fromhex(identity) == self.root.id:
            return self.root
        return providers.open_ring(self.path, configured)


def locate(path: Path | None) -> Path:
    """Where a home is: `path`, `$STIP_KEYSERVICE_HOME` or `~/.stip/keyservice`."""
    return (path or Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)).expanduser().absolute()


def exists(path: Path) -> bool:
    """Whether there is a home whose service has a database: its file, or a server that `home.toml` names."""
    return (path / DATABASE).is_file() or settings.load(path).database is not None


def database_of(path: Path, configured: HomeSettings) -> Path | URL:
    """Where the database of the home at `path` is."""
    return path / DATABASE if configured.database is None else make_url(configured.database.url)


def _root(path: Path, configured: HomeSettings) -> SoftwareRoot:
    """The root key; made where this is a new home, or one from before there were root keys.

    Never beside what another root key wrapped: a key file, or the database of a home whose keys are gone.
    """
    chosen = configured.root_key
    present = files.present(path)
    lost = any(not files.is_plain(_load(file)) for file in present) or (not present and (path / DATABASE).exists())
    if chosen.kind == "file" and chosen.id is None and not lost and not (path / chosen.path).exists():
        providers.keep(chosen, path, providers.new_root_key())
    return providers.open_ring(path, configured)


def _pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _pair(path: Path, root: SoftwareRoot, name: str, kind: type, generate: Callable[[], K]) -> K:
    key = _private(path / f"{name}.key", root, kind, generate)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if _made(path / f"{name}.pub", lambda: public) != public:
        raise ConfigurationError.because(f"{name}.pub", "another key", f"the public key of {name}.key")
    return key


def _authority(path: Path, root: SoftwareRoot, name: str, subject: str) -> Authority:
    key = _private(path / f"{name}.key", root, ec.EllipticCurvePrivateKey, generate_key)
    return Authority.load(key, _made(path / f"{name}.pem", lambda: make_authority(key, subject)), f"{name}.pem")


def _private(path: Path, root: SoftwareRoot, kind: type, generate: Callable[[], K]) -> K:
    stored = _made(path, lambda: files.seal(root, path.name, _pem(generate())))
    data = files.unseal(root, path.name, stored)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigurationError.because(path.name, "something else", f"an unencrypted PEM {kind.__name__}") from None
    if not isinstance(key, kind):
        raise ConfigurationError.because(path.name, type(key).__name__, kind.__name__)
    return cast(K, key)


def _made(path: Path, make: Callable[[], bytes]) -> bytes:
    """The content of a file, which `make` gives where there is none."""
    if not path.exists():
        write_private(path, make())
    return _load(path)


def _load(path: Path) -> bytes:
    _require_private(path)
    with path.open("rb") as file:
        data = file.read(FILE_LIMIT + 1)
    if len(data) > FILE_LIMIT:
        raise ConfigurationError.because(path.name, "a larger file", f"at most {FILE_LIMIT} bytes")
    return data


def _require_private(path: Path) -> None:
    """Raise `ConfigurationError` where others may read or write."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigurationError.because(f"mode of {path}", f"{mode:04o}", "no access for group and others (chmod go=)")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the home's lock, so that two processes never make the same file. Raises `Unavailable` after
    `LOCK_SECONDS`."""
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _take(handle, path)
        yield
    finally:
        os.close(handle)


def _take(handle: int, path: Path) -> None:
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise Unavailable(
                    f"home {path}: another process has been at work there for {LOCK_SECONDS:.0f} s"
                ) from None
        time.sleep(LOCK_PAUSE)
