"""Small files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of a file that is being written."""


def write_atomically(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write `data` under the name `path` once it is on the disk. What is being written is `<path>.partial`.

    The file has `mode`, less the umask, from its first byte on.

    That name must be free: a link that somebody put there is never followed. The name itself is durable once its
    folder is (`sync_folder`).
    """
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
