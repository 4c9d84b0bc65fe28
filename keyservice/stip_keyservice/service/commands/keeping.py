"""`--to`/`--root-key` and what each kind needs: which provider is to keep a root key."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from stip_keyservice.rootkey import shares
from stip_keyservice.rootkey.settings import (
    DEFAULT_KEY_FILE,
    GRAMINE_KEYS,
    FileSettings,
    GramineSettings,
    HomeSettings,
    Pkcs11Settings,
    RootKeySettings,
    SharesSettings,
)
from stip_protocol.errors import ConfigurationError

F = TypeVar("F", bound=Callable[..., Any])
KINDS = ("file", "gramine", "pkcs11", "shares")


def keeping_options(name: str, *, required: bool, default: str | None = None) -> Callable[[F], F]:
    """`name` (the kind) and the options of every kind, handed on as `keeping`."""
    options = [
        click.option(
            name,
            "kind",
            type=click.Choice(KINDS),
            required=required,
            default=default,
            show_default=default is not None,
            help="What keeps the root key: a file, Gramine's sealing key, a PKCS #11 token, or shares at every start.",
        ),
        click.option(
            "--key-file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="file: where; it must not exist yet. Best on a medium that backups do not reach.",
        ),
        click.option(
            "--sealing-key",
            type=click.Choice(["mrenclave", "mrsigner"]),
            default="mrenclave",
            show_default=True,
            help="gramine: for this very enclave, or for all of its signer.",
        ),
        click.option(
            "--sealing-keys",
            type=click.Path(path_type=Path, file_okay=False),
            default=Path(GRAMINE_KEYS),
            show_default=True,
            help="gramine: where it shows sealing keys.",
        ),
        click.option("--module", type=click.Path(path_type=Path, dir_okay=False), help="pkcs11: the token's library."),
        click.option("--token", help="pkcs11: label of the token."),
        click.option(
            "--label",
            default=None,
            help="pkcs11: label of the wrapping key, which is made where the token has none of it.  "
            "[default: a fresh one]",
        ),
        click.option(
            "--mechanism",
            type=click.Choice(["aes-gcm", "aes-key-wrap"]),
            help="pkcs11: how it wraps.  [default: the first that the token has]",
        ),
        click.option(
            "--pin-file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="pkcs11: a file with the user PIN; without one it is asked for, at every start.",
        ),
    ]

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def chosen(kind: str, given: Mapping[str, Any], home: HomeSettings | None) -> RootKeySettings:
    """The settings of a provider by its options; `home` is None for a new one.

    Raises `ConfigurationError` naming what is missing.
    """
    return _CHOICES[kind](given, home)


def _file(given: Mapping[str, Any], home: HomeSettings | None) -> FileSettings:
    if given["key_file"] is not None:
        return FileSettings(path=str(given["key_file"].absolute()))
    first = home is None or home.root_key.kind != "file" or home.root_key.path != DEFAULT_KEY_FILE
    return FileSettings(path=DEFAULT_KEY_FILE if first else f"root-{os.urandom(4).hex()}.key")


def _gramine(given: Mapping[str, Any], _: HomeSettings | None) -> GramineSettings:
    return GramineSettings.model_validate({"key": f"_sgx_{given['sealing_key']}", "keys": str(given["sealing_keys"])})


def _pkcs11(given: Mapping[str, Any], _: HomeSettings | None) -> Pkcs11Settings:
    for name in ("module", "token"):
        if given[name] is None:
            raise ConfigurationError(f"--{name}: missing; a PKCS #11 token is found by --module and --token")
    pin_file = None if given["pin_file"] is None else str(given["pin_file"].absolute())
    return Pkcs11Settings(
        module=str(given["module"].absolute()),
        token=given["token"],
        label=given["label"] or f"stip-root-{os.urandom(4).hex()}",
        mechanism=given["mechanism"],
        pin_file=pin_file,
    )


def _shares(_: Mapping[str, Any], home: HomeSettings | None) -> SharesSettings:
    for made in () if home is None else (home.recovery, home.root_key):
        if isinstance(made, SharesSettings):
            return made.model_copy(update={"wrapped": None, "id": None})
    raise ConfigurationError("shares: this home has none yet; make them first: `root-key shares create`")


_CHOICES: dict[str, Callable[[Mapping[str, Any], HomeSettings | None], RootKeySettings]] = {
    "file": _file,
    "gramine": _gramine,
    "pkcs11": _pkcs11,
    "shares": _shares,
}


def write_shares(folder: Path, mnemonics: Sequence[str]) -> list[Path]:
    """One file a share, mode 0600, in a folder that is made. Raises `ConfigurationError` where it exists."""
    try:
        folder.mkdir(mode=0o700, parents=True)
        paths = [folder / f"share-{number}-of-{len(mnemonics)}.txt" for number in range(1, len(mnemonics) + 1)]
        for path, mnemonic in zip(paths, mnemonics, strict=True):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(mnemonic + "\n")
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise ConfigurationError(f"{folder}: {error.strerror}; name a folder that does not exist yet") from None
    return paths


def made_shares(folder: Path, threshold: int, count: int) -> tuple[SharesSettings, list[Path]]:
    """A fresh recovery key: its public half, and its shares in files. Read back before anybody relies on them."""
    recovery, mnemonics = shares.split(threshold, count)
    paths = write_shares(folder, mnemonics)
    shares.combine(recovery, shares.read(recovery, paths))
    return recovery, paths
