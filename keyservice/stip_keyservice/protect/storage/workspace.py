"""`OUT.partial`: where an instance is made, until it is whole and becomes `OUT`.

One process at a time works in it: it holds the folder's lock (flock), which ends with the process, however that ends.
What lies in it is trusted only because nobody but its owner can write there: it is made with mode 0700, and another's,
one open to others and every link in the places of its own files are refused.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from stip_protocol.durable import PARTIAL, sync_folder, write_atomically
from stip_protocol.errors import ConfigurationError

PARTS = ("server", "enclave", "client")
RECORD, JOURNAL = "resume", "journal"
SIGNATURE = "manifest.json.sig"
DOCUMENTS = ("certificate.json", "manifest.json", "secrets.sealed")
"""Beside the signature: a folder that has that and no record is no unfinished instance."""
RECORD_LIMIT = 1 << 17
"""Bytes of the largest record read."""
SPACE_MARGIN = 64 << 20
"""Bytes of free disk beyond the tensors: headers, tokenizer, manifests."""
OTHERS_WRITE = 0o022
"""Mode bits of group and others."""


class Workspace:
    """A claimed `OUT.partial`, or an `OUT` that was published by a run that then ended before it had tidied up."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder = folder
        self._out = out
        self._resumed = (folder / RECORD).exists()

    @property
    def published(self) -> bool:
        """Whether all that is left is to tidy up."""
        return self.folder == self._out

    @property
    def number(self) -> int:
        """The folder's inode, which a rename keeps. Device numbers may change when a machine starts anew."""
        return self.folder.stat().st_ino

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
        files = {RECORD, JOURNAL, *kept}
        for name in self._names():
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                if name not in PARTS:
                    path.rmdir()
            elif name not in files:
                path.unlink()
        for part in PARTS:
            (self.folder / part).mkdir(exist_ok=True)

    def require_only(self, files: Collection[str]) -> None:
        """Raise `ConfigurationError` where something else lies in the folder than the files that this run wrote."""
        expected = {RECORD, JOURNAL, *PARTS, *files}
        links = {name for name in expected if (self.folder / name).is_symlink()}
        if foreign := sorted(expected.symmetric_difference(self._names()) | links):
            got = f"{ascii(foreign[0])[:130]} added, removed or replaced in {self.folder}"
            raise ConfigurationError.because("out", got, "only what was written there: run the same command again")

    def _names(self) -> Iterator[str]:
        """All that lies in the folder, what is in a folder before that folder; links are not followed."""
        for parent, folders, files in os.walk(self.folder, topdown=False):
            for name in [*files, *folders]:
                yield (Path(parent) / name).relative_to(self.folder).as_posix()

    def require_space(self, size: int) -> None:
        """Raise `ConfigurationError` where the disk has no room for `size` bytes more."""
        if (free := shutil.disk_usage(self.folder).free) < size + SPACE_MARGIN:
            raise ConfigurationError.because("free disk space", f"{free} bytes", f"at least {size + SPACE_MARGIN}")

    def publish(self) -> None:
        """Turn the folder into `OUT`, then drop what only another run would need: a rename that fails loses nothing,
        and what ends in between leaves an `OUT` that `claimed` knows by its record.
        """
        for part in PARTS:
            sync_folder(self.folder / part)
        sync_folder(self.folder)
        self.folder.rename(self._out)
        sync_folder(self._out.parent)
        self.folder = self._out
        self.tidy()

    def tidy(self) -> None:
        """Drop journal and record of a published instance; the record last, by which it is known."""
        for name in (JOURNAL, RECORD):
            (self.folder / name).unlink(missing_ok=True)
        sync_folder(self.folder)

    def abandon(self) -> bool:
        """Leave nothing behind, unless there is something to go on with: an earlier run's folder, a finished file.

        Gives whether the folder is gone.
        """
        journal = self.folder / JOURNAL
        if not self._resumed and not self.published and not (journal.exists() and journal.stat().st_size):
            self.remove()
        return not self.folder.exists()

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def claimed(out: Path) -> Iterator[Workspace]:
    """The workspace of `out`, for this process alone: new, as an interrupted run left it, or published already.

    A folder without a record holds nothing that can be gone on with, and is emptied, unless a signed manifest or a
    stranger's file lies in it. Raises `ConfigurationError` where `out` is not empty, a link or a mount point, where
    another process is at work, and where what lies there is not ours.
    """
    out = out.absolute()
    folder = partial_of(out)
    try:
        if out.is_symlink() or out.is_mount():
            got = f"{out}, a {'link' if out.is_symlink() else 'mount point'}"
            raise ConfigurationError.because("out", got, "the folder itself, which a rename can replace")
        if (out / RECORD).is_file():
            folder = out
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigurationError.because("out", f"{out}, which is not empty", "a missing or empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        _refuse_link(folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ConfigurationError(f"out {out}: {error.strerror}", field="out") from None
    try:
        _lock(handle, folder)
        _require_ours(os.fstat(handle), folder)
        for name in (*PARTS, RECORD, JOURNAL):
            _refuse_link(folder / name)
        workspace = Workspace(folder, out)
        if workspace.record is None:
            if workspace.published:  # tidied up since it was looked at
                raise ConfigurationError.because("out", f"{out}, which is not empty", "a missing or empty folder")
            present = {path.name.removesuffix(PARTIAL) for path in folder.iterdir()}
            if foreign := sorted(present - {*PARTS, *DOCUMENTS, RECORD, JOURNAL}):
                got = f"{folder} with {ascii(foreign[0])[:130]} in it"
                raise ConfigurationError.because("out", got, "none: move it away or remove it")
            workspace.clear()
        yield workspace
    finally:
        os.close(handle)


def partial_of(out: Path) -> Path:
    """Where the instance `out` is made. Raises `ConfigurationError` where `out` names no folder of its own."""
    out = out.absolute()
    if out.name in ("", ".."):
        raise ConfigurationError.because("out", out, "a folder with a name")
    return out.with_name(out.name + PARTIAL)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
    except BlockingIOError:
        ours = False
    if not ours:  # another process holds it, or has just published or removed it
        raise ConfigurationError.because("out", f"{folder}, in which a protection is at work", "one at a time")


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise ConfigurationError.because("out", f"{path}, a link", "no link: move it away or remove it")


def _require_ours(status: os.stat_result, folder: Path) -> None:
    """Whoever else can write to the folder could put into it what is then signed."""
    if status.st_uid != os.geteuid():
        raise ConfigurationError.because("out", f"{folder} of user {status.st_uid}", "a folder of your own")
    if status.st_mode & OTHERS_WRITE:
        got = f"{folder} with mode {status.st_mode & 0o777:04o}"
        raise ConfigurationError.because("out", got, "one that others cannot write to (chmod go-w), or none")
