"""A root key under an AES-256 key that never leaves its PKCS #11 token (OASIS PKCS #11 3.0).

The wrapping key is made in the token: CKA_SENSITIVE, not CKA_EXTRACTABLE. It wraps by CKM_AES_GCM, where the token has
that, or else by CKM_AES_KEY_WRAP (RFC 3394); both refuse what was altered.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pkcs11
from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, ObjectClass
from pkcs11.exceptions import MultipleObjectsReturned, NoSuchKey, PinIncorrect, PinLocked, PKCS11Error

from stip_keyservice.rootkey import settings
from stip_keyservice.rootkey.asking import ask, read_line
from stip_keyservice.rootkey.envelope import KEY_BYTES, NONCE_BYTES
from stip_keyservice.rootkey.settings import Pkcs11Settings
from stip_protocol import canonical
from stip_protocol.errors import ConfigurationError, IntegrityError

TAG_BITS = 128


class Pkcs11Provider:
    def __init__(self, kept: Pkcs11Settings, home: Path) -> None:
        self._settings, self._home = kept, home

    def keep(self, key: bytes) -> Pkcs11Settings:
        """Makes the wrapping key where the token has none of that label."""
        with self._session(writes=True) as (session, mechanisms):
            name = self._settings.mechanism or next((one for one in WRAPPINGS if WRAPPINGS[one][0] in mechanisms), None)
            if name is None or WRAPPINGS[name][0] not in mechanisms:
                raise ConfigurationError.because("token mechanisms", "none of these", ", ".join(WRAPPINGS))
            wrapping = self._find(session) or _make(session, self._settings.label)
            _, wrap, _ = WRAPPINGS[name]
            wrapped = wrap(session, wrapping, key, self._context())
        return self._settings.model_copy(update={"mechanism": name, "wrapped": wrapped.hex()})

    def load(self) -> bytes:
        if self._settings.wrapped is None or self._settings.mechanism is None:
            raise ConfigurationError("root_key: no wrapped key; see `stip-keyservice recover`")
        with self._session(writes=False) as (session, _):
            wrapping = self._find(session)
            if wrapping is None:
                raise ConfigurationError.because("token key", "none of that label", self._settings.label)
            _, _, unwrap = WRAPPINGS[self._settings.mechanism]
            try:
                return unwrap(session, wrapping, bytes.fromhex(self._settings.wrapped), self._context())
            except PKCS11Error as error:
                said = f"root key under the token's key: altered, or under another ({type(error).__name__})"
                raise IntegrityError(said) from None

    def discard(self) -> str:
        with self._session(writes=True) as (session, _):
            wrapping = self._find(session)
            if wrapping is not None:
                wrapping.destroy()
        return "the token's former key is destroyed: copies of the home from before open nothing"

    def _context(self) -> bytes:
        return canonical.encode(["stip/root-key", "pkcs11", self._settings.label])

    def _find(self, session: Any) -> Any | None:
        try:
            return session.get_key(ObjectClass.SECRET_KEY, KeyType.AES, label=self._settings.label)
        except NoSuchKey:
            return None
        except MultipleObjectsReturned:
            raise ConfigurationError.because("token key", "several of that label", "one") from None

    @contextmanager
    def _session(self, *, writes: bool) -> Iterator[tuple[Any, Any]]:
        pin_file = self._settings.pin_file
        try:
            token = pkcs11.lib(str(self._home / self._settings.module)).get_token(token_label=self._settings.token)
            what = f"PIN of token {self._settings.token}"
            pin = ask(what) if pin_file is None else read_line(self._home / pin_file, what)
            with token.open(user_pin=pin, rw=writes) as session:
                yield session, token.slot.get_mechanisms()
        except (PinIncorrect, PinLocked) as error:
            locked = ": the token is locked" if isinstance(error, PinLocked) else ""
            raise ConfigurationError(f"PIN of token {self._settings.token}: refused{locked}") from None
        except PKCS11Error as error:
            raise ConfigurationError(f"PKCS #11 token {self._settings.token}: {type(error).__name__}") from None


def _make(session: Any, label: str) -> Any:
    template = {
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
        Attribute.ENCRYPT: True,
        Attribute.DECRYPT: True,
        Attribute.WRAP: True,
        Attribute.UNWRAP: True,
    }
    return session.generate_key(KeyType.AES, 8 * KEY_BYTES, label=label, store=True, template=template)


def _gcm_wrap(_: Any, wrapping: Any, key: bytes, context: bytes) -> bytes:
    nonce = secrets.token_bytes(NONCE_BYTES)
    parameters = GCMParams(nonce, context, TAG_BITS)
    return nonce + bytes(wrapping.encrypt(key, mechanism=Mechanism.AES_GCM, mechanism_param=parameters))


def _gcm_unwrap(_: Any, wrapping: Any, wrapped: bytes, context: bytes) -> bytes:
    parameters = GCMParams(wrapped[:NONCE_BYTES], context, TAG_BITS)
    return bytes(wrapping.decrypt(wrapped[NONCE_BYTES:], mechanism=Mechanism.AES_GCM, mechanism_param=parameters))


_SESSION_KEY = {Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: False, Attribute.TOKEN: False}
"""The root key is in the token for the moment of wrapping only."""


def _kw_wrap(session: Any, wrapping: Any, key: bytes, _: bytes) -> bytes:
    kind = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES, Attribute.VALUE: key}
    return bytes(wrapping.wrap_key(session.create_object(kind | _SESSION_KEY), mechanism=Mechanism.AES_KEY_WRAP))


def _kw_unwrap(_: Any, wrapping: Any, wrapped: bytes, __: bytes) -> bytes:
    made = wrapping.unwrap_key(
        ObjectClass.SECRET_KEY, KeyType.AES, wrapped, mechanism=Mechanism.AES_KEY_WRAP, template=_SESSION_KEY
    )
    return bytes(made[Attribute.VALUE])


Wrapping = tuple[Mechanism, Callable[[Any, Any, bytes, bytes], bytes], Callable[[Any, Any, bytes, bytes], bytes]]
WRAPPINGS: dict[settings.Mechanism, Wrapping] = {
    "aes-gcm": (Mechanism.AES_GCM, _gcm_wrap, _gcm_unwrap),
    "aes-key-wrap": (Mechanism.AES_KEY_WRAP, _kw_wrap, _kw_unwrap),
}
"""Best first. RFC 3394 takes no associated data; the id of the root key is checked either way."""
