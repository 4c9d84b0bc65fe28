"""The providers by kind, and a home's root keys through them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from stip_keyservice.rootkey.envelope import KEY_BYTES
from stip_keyservice.rootkey.file import FileProvider
from stip_keyservice.rootkey.gramine import GramineProvider
from stip_keyservice.rootkey.ring import SoftwareRoot, identity_of
from stip_keyservice.rootkey.settings import HomeSettings, Kept, RewrapSettings, RootKeySettings, load
from stip_keyservice.rootkey.shares import SharesProvider
from stip_protocol.errors import ConfigurationError, IntegrityError, StipError

_LINK = b"stip/root-key/rewrap"
K = TypeVar("K", bound=Kept)


class Provider(Protocol):
    """What keeps a root key while no process holds it."""

    def keep(self, key: bytes) -> Kept:
        """Take a root key; returns the settings by which it is found again. Raises `ConfigurationError`."""

    def load(self) -> bytes:
        """The root key. Raises `ConfigurationError` where the provider does not answer, `IntegrityError`."""

    def discard(self) -> str:
        """Destroy what kept it, as far as that can be done; returns what was done, and what is left to the operator."""


def _pkcs11(settings: Any, home: Path) -> Provider:
    from stip_keyservice.rootkey.pkcs11 import Pkcs11Provider  # loads a binary library, for those who have a token

    return Pkcs11Provider(settings, home)


PROVIDERS: dict[str, Callable[[Any, Path], Provider]] = {
    "file": FileProvider,
    "gramine": GramineProvider,
    "pkcs11": _pkcs11,
    "shares": SharesProvider,
}


def provider(settings: RootKeySettings, home: Path) -> Provider:
    """The provider that settings name."""
    return PROVIDERS[settings.kind](settings, home)


def new_root_key() -> bytes:
    """32 random bytes."""
    return secrets.token_bytes(KEY_BYTES)


def keep(settings: K, home: Path, key: bytes) -> K:
    """Hand a root key to a provider; returns the settings to write. It is read back and compared, where that takes
    no people with shares.

    Raises `ConfigurationError`.
    """
    chosen = PROVIDERS[settings.kind](settings, home)  # type: ignore[attr-defined]
    kept = chosen.keep(key).model_copy(update={"id": identity_of(key).hex()})
    again = PROVIDERS[settings.kind](kept, home)  # type: ignore[attr-defined]
    if not isinstance(again, SharesProvider) and again.load() != key:  # shares: `recover --dry-run` rehearses them
        raise ConfigurationError.because("root key", "another one", "what the provider was given")
    return cast(K, kept)


def fetch(settings: RootKeySettings, home: Path) -> bytes:
    """A root key from its provider. Raises `ConfigurationError`, `IntegrityError` (it is another key)."""
    key = provider(settings, home).load()
    if settings.id is not None and identity_of(key).hex() != settings.id:
        raise IntegrityError(f"root key: the {settings.kind} holds another one than this home's")
    return key


def open_ring(home: Path, settings: HomeSettings) -> SoftwareRoot:
    """The root keys of a home: the present one, and amid a rewrap also the next, through whichever provider answers.

    Raises what the provider of the present root key raises.
    """

    def reload() -> SoftwareRoot:
        return open_ring(home, load(home))

    try:
        key = fetch(settings.root_key, home)
    except StipError:
        if settings.rewrap is None:
            raise
        following = fetch(settings.rewrap.next, home)
        return SoftwareRoot(through(settings.rewrap, following), following, reload=reload)
    if settings.rewrap is None:
        return SoftwareRoot(key, reload=reload)
    return SoftwareRoot(key, through(settings.rewrap, key), reload=reload)


def link(present: bytes, following: bytes, kept: RootKeySettings) -> RewrapSettings:
    """Two root keys, each under the other."""
    return RewrapSettings(
        next=kept,
        next_under_present=SoftwareRoot(present).wrap(following, _LINK).hex(),
        present_under_next=SoftwareRoot(following).wrap(present, _LINK).hex(),
    )


def through(rewrap: RewrapSettings, key: bytes) -> bytes:
    """The other root key of a rewrap, by either of the two. Raises `IntegrityError`."""
    root = SoftwareRoot(key)
    forward = identity_of(key).hex() != rewrap.next.id
    return root.unwrap(bytes.fromhex(rewrap.next_under_present if forward else rewrap.present_under_next), _LINK)


def require_recovery(settings: HomeSettings) -> SharesProvider:
    """The recovery shares of a home. Raises `ConfigurationError` where it has none."""
    recovery = settings.recovery or settings.root_key
    if recovery.kind != "shares":
        raise ConfigurationError("recovery: this home has no shares; see `stip-keyservice root-key shares create`")
    return SharesProvider(recovery, Path())
