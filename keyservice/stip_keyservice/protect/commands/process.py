"""What the commands of protection do as processes: settings before libraries load, exit codes, one line an error."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from stip_keyservice.home import HOME_VARIABLE
from stip_protocol.errors import ConfigurationError, IntegrityError, StipError

EXIT_FAILED, EXIT_INPUT, EXIT_NOT_EQUIVALENT = 1, 2, 3
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Read by torch when it first allocates: large arrays in large pages, where the system offers them (`madvise` in
/sys/kernel/mm/transparent_hugepage/enabled). Row blocks come and go, and small pages cost a fault for every 4 KiB."""
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
"""Read by NumPy's OpenBLAS when it is loaded. It draws keys, and its threads wait by spinning: on a machine with other
work two took twenty times as long as one. Everything else here is parallel over row blocks, or by torch's threads."""
EXIT_SIGNAL = 128
"""Plus the number of the signal that stopped the command, as shells report it."""

opening_home = click.option(
    "--home",
    type=click.Path(path_type=Path),
    envvar=HOME_VARIABLE,
    help="Key service home that signed the instance and opens its secrets.  [default: ~/.stip/keyservice]",
)
"""Of commands over an instance that is there."""


class Stopped(BaseException):
    """A signal came."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Signals end the command as an exception: threads end, files are closed, temporary folders go. One is enough:
    those of somebody impatient would end the tidying."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # by nohup
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare() -> None:
    """Before torch and NumPy load: set what they read then, and turn off transformers' own messages and bars."""
    for name in (LARGE_PAGES, BLAS_THREADS):
        os.environ.setdefault(name, "1")
    from transformers.utils import logging

    messages: Any = logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()


def refuse_core_dumps() -> None:
    """The root secret and the keys are in this process's memory: no copy of that goes to the disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def bars(console: Console, width: int = 0) -> Progress:
    """Bars with rate and time left; a task has a field `rate`. `width`: columns kept for titles."""
    return Progress(
        TextColumn(f"{{task.description:<{width}}}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
    )


def say(error: StipError, as_json: bool) -> None:
    """One line: what is wrong, the stable code, what to do."""
    if as_json:
        click.echo(json.dumps({"error": {"code": error.code, "message": error.message, "action": error.action}}))
    click.echo(f"error: {error} — {error.action.replace('_', ' ')}", err=True)


def fail(error: StipError, as_json: bool) -> NoReturn:
    """Say it, and leave with the code of its kind."""
    say(error, as_json)
    codes = {ConfigurationError: EXIT_INPUT, IntegrityError: EXIT_NOT_EQUIVALENT}
    sys.exit(next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_FAILED))
