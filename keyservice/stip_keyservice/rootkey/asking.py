"""PINs and shares from a person at the terminal: never from arguments or the environment, where other programs read."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

from stip_protocol.errors import ConfigurationError

LINE_LIMIT = 4096
"""Bytes of the largest PIN, password or share read."""


def ask(what: str) -> str:
    """One line that is not shown. Raises `ConfigurationError` where nobody sits there."""
    if not sys.stdin.isatty():
        raise ConfigurationError(f"{what}: nobody to ask; name a file that holds it, or run this on a terminal")
    return getpass.getpass(f"{what}: ").strip()


def read_line(path: Path, what: str) -> str:
    """The one line in a file that only its owner reads. Raises `ConfigurationError`."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise ConfigurationError.because(f"mode of the {what} file {path}", "others may read it", "chmod go=")
            data = file.read(LINE_LIMIT + 1)
    except OSError as error:
        raise ConfigurationError(f"{what} file {path}: {error.strerror}") from None
    try:
        line = data.decode().strip()
    except UnicodeDecodeError:
        line = ""
    if not line or len(data) > LINE_LIMIT or "\n" in line:
        raise ConfigurationError.because(f"{what} file {path}", "something else", "one line of text")
    return line
