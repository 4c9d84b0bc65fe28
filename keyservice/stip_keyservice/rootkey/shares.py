"""A root key sealed to a recovery key whose private half M of N people hold together.

The recovery key is X25519. Its public half stands in `home.toml`, so that a new root key is sealed to it (HPKE,
RFC 9180) without anybody's share: shares outlive rewraps. Its private half is split by Shamir's scheme over GF(256)
into mnemonics (SLIP-0039, through Trezor's `shamir-mnemonic`): fewer than M say nothing, and a mistyped word is
noticed.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from shamir_mnemonic import MnemonicError, combine_mnemonics, generate_mnemonics
from shamir_mnemonic.share import Share

from stip_keyservice.rootkey.asking import ask, read_line
from stip_keyservice.rootkey.settings import MEMBERS, SharesSettings
from stip_protocol.errors import ConfigurationError, IntegrityError
from stip_protocol.release import SUITE

_INFO = b"stip/root-key/recovery"


def split(threshold: int, shares: int) -> tuple[SharesSettings, list[str]]:
    """A fresh recovery key: what `home.toml` says of it, and its shares. Raises `ConfigurationError`."""
    if not 2 <= threshold <= shares <= MEMBERS:
        allowed = f"2 ≤ threshold ≤ shares ≤ {MEMBERS}"
        raise ConfigurationError.because("shares", f"threshold {threshold} of {shares}", allowed)
    secret = secrets.token_bytes(32)
    (mnemonics,) = generate_mnemonics(1, [(threshold, shares)], secret)
    public = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    return SharesSettings(public_key=public.hex(), threshold=threshold, shares=shares), mnemonics


def combine(settings: SharesSettings, shares: Sequence[str]) -> X25519PrivateKey:
    """The recovery key. Raises `ConfigurationError` for shares that are mistyped, too few, or of another set."""
    try:
        parsed = {Share.from_mnemonic(" ".join(share.split())) for share in shares}
    except MnemonicError:
        raise ConfigurationError("shares: one is not a share: a word is missing, misspelt or out of place") from None
    if len({(one.identifier, one.iteration_exponent) for one in parsed}) > 1:
        raise ConfigurationError.because("shares", "shares of several sets", "shares that were made together")
    apart = {one.index: one for one in parsed}
    if len(apart) < settings.threshold:
        raise ConfigurationError.because("shares", f"{len(apart)} different ones", f"at least {settings.threshold}")
    enough = [one.mnemonic() for _, one in sorted(apart.items())[: settings.threshold]]
    try:
        private = X25519PrivateKey.from_private_bytes(combine_mnemonics(enough))
    except (MnemonicError, ValueError):
        raise ConfigurationError("shares: they do not fit together") from None
    if private.public_key().public_bytes_raw().hex() != settings.public_key:
        raise ConfigurationError("shares: they are of another recovery key than this home's")
    return private


def read(settings: SharesSettings, files: Sequence[Path]) -> list[str]:
    """Shares from files, or, where there are none, as many as are needed from whoever sits at the terminal."""
    if files:
        return [read_line(path, "share") for path in files]
    return [ask(f"share {number} of {settings.threshold}") for number in range(1, settings.threshold + 1)]


class SharesProvider:
    """Shares are read from the files that `home.toml` names, or asked for: a start takes M people."""

    def __init__(self, settings: SharesSettings, home: Path) -> None:
        self.settings, self._home = settings, home

    def keep(self, key: bytes) -> SharesSettings:
        public = X25519PublicKey.from_public_bytes(bytes.fromhex(self.settings.public_key))
        return self.settings.model_copy(update={"wrapped": SUITE.encrypt(key, public, _INFO).hex()})

    def load(self) -> bytes:
        return self.open(read(self.settings, [self._home / path for path in self.settings.files]))

    def open(self, shares: Sequence[str]) -> bytes:
        """The root key, by these shares. Raises what `combine` raises, `IntegrityError`."""
        if self.settings.wrapped is None:
            raise ConfigurationError("shares: no root key was sealed to this recovery key")
        private = combine(self.settings, shares)
        try:
            return SUITE.decrypt(bytes.fromhex(self.settings.wrapped), private, _INFO)
        except (InvalidTag, ValueError):
            raise IntegrityError("root key sealed to the recovery key: altered") from None

    def discard(self) -> str:
        return "shares stay good for copies of home.toml from before: destroy those, or the shares"
