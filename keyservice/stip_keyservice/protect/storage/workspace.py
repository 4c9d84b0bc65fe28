"""`OUT.partial`: where an instance is made, until it is whole and becomes `OUT`.

One process at a time works in it: it holds the folder's lock (flock), which ends with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from stip_keyservice.protect.storage.writer import PARTIAL, write_atomically
from stip_protocol.errors import ConfigurationError

PARTS = ("server", "enclave", "client")
RECORD, JOURNAL = "resume", "journal"
DOCUMENTS = ("certificate.json", "manifest.json", "manifest.json.sig", "secrets.sealed")
RECORD_LIMIT = 1 << 17
"""Bytes of the largest record read."""
SPACE_MARGIN = 64 << 20
"""Bytes of free disk beyond the tensors: headers, tokenizer, manifests."""


class Workspace:
    """A claimed `OUT.partial`."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder = folder
        self._out = out

    @property
    def record(self) -> bytes | None:
        """What an interrupted run noted about itself; None where there was none."""
        path = self.folder / RECORD
        if not path.exists():
            return None
        with path.open("rb") as file:
            return file.read(RECORD_LIMIT)

    def note(self, record: bytes) -> None:
        """Note what another run needs in order to go on."""
        write_atomically(self.folder / RECORD, record)

    def clear(self, kept: Collection[str] = ()) -> None:
        """Remove everything but record, journal and the files named in `kept`; make the folders of the parts."""
        for path in list(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if not path.is_dir() and name not in {RECORD, JOURNAL, *kept}:
                path.unlink()
        for part in PARTS:
            (self.folder / part).mkdir(exist_ok=True)

    def require_space(self, size: int) -> None:
        """Raise `ConfigurationError` where the disk has no room for `size` bytes more."""
        if (free := shutil.disk_usage(self.folder).free) < size + SPACE_MARGIN:
            raise ConfigurationError.because("free disk space", f"{free} bytes", f"at least {size + SPACE_MARGIN}")

    def publish(self) -> None:
        """Turn the folder into `OUT`: nothing but a rename can be interrupted after record and journal are gone."""
        for part in PARTS:
            _sync(self.folder / part)
        for name in (JOURNAL, RECORD):
            (self.folder / name).unlink()
        _sync(self.folder)
        self.folder.rename(self._out)
        _sync(self._out.parent)

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def claimed(out: Path) -> Iterator[Workspace]:
    """The workspace of `out`, for this process alone: new, or as an interrupted run left it.

    A folder without a record holds nothing that can be gone on with, and is emptied. Raises `ConfigurationError`
    where `out` is not empty, where another process is at work, and where what lies there is not ours.
    """
    out = out.absolute()
    folder = partial_of(out)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigurationError.because("out", f"{out}, which is not empty", "a missing or empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigurationError(f"out {out}: {error.strerror}", field="out") from None
    try:
        _lock(handle, folder)
        workspace = Workspace(folder, out)
        if workspace.record is None:
            present = {path.name.removesuffix(PARTIAL) for path in folder.iterdir()}
            if foreign := sorted(present - {*PARTS, *DOCUMENTS, RECORD, JOURNAL}):
                got = f"{folder} with {ascii(foreign[0])[:130]} in it"
                raise ConfigurationError.because("out", got, "none: move it away or remove it")
            workspace.clear()
        yield workspace
    finally:
        os.close(handle)


def partial_of(out: Path) -> Path:
    """Where the instance `out` is made."""
    return out.absolute().with_name(out.name + PARTIAL)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
    except BlockingIOError:
        ours = False
    if not ours:  # another process holds it, or has just published or removed it
        raise ConfigurationError.because("out", f"{folder}, in which a protection is at work", "one at a time")


def _sync(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
