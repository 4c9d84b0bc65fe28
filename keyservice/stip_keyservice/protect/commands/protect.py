"""`stip-keyservice protect`: the command line of protection.

Torch and transformers are imported when the command runs, not before: the other commands of the key service
do without them.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stip_keyservice.home import HOME_VARIABLE, Home
from stip_keyservice.protect.commands.process import (
    EXIT_SIGNAL,
    Stopped,
    bars,
    fail,
    prepare,
    refuse_core_dumps,
    say,
    stoppable,
)
from stip_keyservice.protect.progress import STAGES, Lines, amount, rate_of, silent
from stip_keyservice.protect.progress import Progress as Callback
from stip_keyservice.protect.storage.workspace import RECORD, partial_of
from stip_protocol.errors import Cancelled, StipError
from stip_protocol.manifest import Preset
from stip_protocol.runtime.files import read_x25519

if TYPE_CHECKING:
    from stip_keyservice.protect.instance import Protected

MANIFEST = "manifest.json"
TITLES = 14
"""Columns of the longest title of a stage."""

EPILOG = """\b
Examples:
  stip-keyservice protect ./llama --preset hardened --out ./instance
  stip-keyservice protect ./llama --instance 0123456789abcdef0123456789abcdef --epoch 1 --out ./next
  stip-keyservice protect ./gpt2 --preset paper --accept-tied-head --out ./instance --json

\b
Interrupted or killed, the same command goes on where it stopped: what is finished lies in
OUT.partial, with the root secret sealed to this home. Remove that folder to start anew.

\b
Exit codes:
  0         the instance is written, signed and certified
  1         another failure
  2         the input, the configuration or the disk is refused
  3         the instance does not compute what its source computes; it is not published
  130, 143  stopped by Ctrl-C or SIGTERM


Whatever ends it, a run in which no file was finished leaves nothing behind; otherwise OUT.partial is
kept, and the message says so.
"""


@click.command(name="protect", epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--preset",
    type=click.Choice(["paper", "hardened", "throughput"]),
    default="hardened",
    show_default=True,
    help="hardened: the largest lossless group of keys, head and sampling in the enclave. paper: permutations as"
    " published, bit-exact weights, a permuted head on the server. throughput: the server decodes alone, on permuted"
    " token ids.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Instance folder: missing or empty.")
@click.option(
    "--home",
    type=click.Path(path_type=Path),
    envvar=HOME_VARIABLE,
    help="Key service home with the developer's signing key; made on first use.  [default: ~/.stip/keyservice]",
)
@click.option(
    "--epoch",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Number of this set of keys; raise it when you protect an instance's model again, see --instance.",
)
@click.option(
    "--instance",
    metavar="ID",
    help="Make the next epoch of this instance, with an --epoch of 1 or more.  [default: a fresh instance]",
)
@click.option(
    "--seal-to",
    type=click.Path(path_type=Path),
    help="X25519 public key (PEM) of the key service that will hold the secrets.  [default: the home's own]",
)
@click.option(
    "--accept-tied-head",
    is_flag=True,
    help="Allow the preset paper for a model whose head is its embedding: the server then holds the embedding's"
    " values, and can recover every token.",
)
@click.option(
    "--accept-token-cipher",
    is_flag=True,
    help="Allow the preset throughput: the server then sees token ids under a substitution cipher, under which it can"
    " generate text of its own to compare with.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    help="Threads that compute; each holds some 200 MB or more.  [default: the cores available, as far as twice the"
    " largest shard and 1 GB go]",
)
@click.option(
    "--samples",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Random sequences that the equivalence certificate compares.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout instead of tables: the result, or the error."
)
@click.option("--quiet", is_flag=True, help="No progress and no tables; errors still go to stderr.")
def protect(
    model: Path,
    preset: Preset,
    out: Path,
    home: Path | None,
    epoch: int,
    instance: str | None,
    seal_to: Path | None,
    accept_tied_head: bool,
    accept_token_cipher: bool,
    workers: int | None,
    samples: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Protect MODEL, a local Hugging Face folder of safetensors, under fresh secret keys.

    Writes an instance: a server part for the operator (a standard checkpoint that names and digests nothing of
    its source), an encrypted enclave part, a client part with the tokenizer, a manifest signed by you, and the
    root secret sealed to the key service. Before anything is published the instance is run against MODEL: the
    certificate says how closely they agree.

    Next: register the instance with `stip-keyservice instances add`, give `manifest.json`, its signature and
    `server/` to the operator, `enclave/` to wherever enclaves fetch it, and `client/` to your users.
    """
    refuse_core_dumps()
    found = (out / MANIFEST).exists()
    try:
        partial_of(out)
        with stoppable(), _progress(quiet) as progress:
            opened = Home.open(home)
            recipient = opened.sealing.public_key() if seal_to is None else read_x25519(seal_to, field="seal-to")
            result = _protection()(
                model,
                out,
                preset=preset,
                developer=opened.developer,
                seal_to=recipient,
                restart_key=opened.sealing,
                epoch=epoch,
                instance=instance,
                accept_tied_head=accept_tied_head,
                accept_token_cipher=accept_token_cipher,
                workers=workers,
                samples=samples,
                progress=progress,
            )
    except StipError as error:
        fail(error, as_json)
    except Stopped as stopped:
        _leave(stopped, out, as_json, found)
    if as_json:
        click.echo(json.dumps(_report(result)))
    elif not quiet:
        _show(result)


def _protection() -> Callable[..., Protected]:
    """`instance.protect`, loaded when the command runs."""
    prepare()
    from stip_keyservice.protect.instance import protect as protect_checkpoint

    return protect_checkpoint


class _Bars:
    """The progress callback of `instance.protect`, as bars with rate and time left on stderr."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks = {
            stage: progress.add_task(title, start=False, visible=False, rate="") for stage, title in STAGES.items()
        }
        self._begun: set[str] = set()

    def __call__(self, stage: str, done: int, total: int) -> None:
        task = self._tasks[stage]
        if stage not in self._begun:  # what an earlier run did says nothing about how fast this one is
            self._begun.add(stage)
            self._progress.reset(task, total=total, completed=done, visible=True)
        speed = self._progress.tasks[task].speed
        self._progress.update(task, completed=done, total=total, rate=rate_of(stage, speed) if speed else "")


@contextmanager
def _progress(quiet: bool) -> Iterator[Callback]:
    """Bars on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield silent if quiet else Lines(lambda line: click.echo(line, err=True))
        return
    with bars(console, TITLES) as progress:
        yield _Bars(progress)


def _leave(stopped: Stopped, out: Path, as_json: bool, found: bool) -> NoReturn:
    """After a signal: say what is there. `found`: an instance was there before."""
    out, folder = out.absolute(), partial_of(out)
    left = ""
    if folder.exists():
        left = f"; {folder} is kept: run the same command again to go on, or remove it"
    elif (out / MANIFEST).exists() and not found:
        rest = ": run the same command again to tidy up" if (out / RECORD).exists() else ""
        left = f"; {out} is whole and published{rest}"
    error = Cancelled(f"stopped by {signal.Signals(stopped.number).name}{left}")
    say(error, as_json)
    sys.exit(EXIT_SIGNAL + stopped.number)


def _report(result: Protected) -> dict[str, object]:
    manifest = result.manifest
    return {
        "instance": manifest.instance,
        "epoch": manifest.epoch,
        "preset": manifest.preset,
        "directory": str(result.directory),
        "manifest_digest": result.manifest_digest.hex(),
        "certificate": result.certificate.model_dump(mode="json") | {"passed": result.certificate.passed},
        "stages": {
            stage: {"seconds": round(took.seconds, 3), "bytes": took.nbytes} for stage, took in result.stages.items()
        },
    }


def _show(result: Protected) -> None:
    manifest, certificate = result.manifest, result.certificate
    summary = certificate.summary()
    rows = [
        ("Instance", manifest.instance),
        ("Epoch, preset", f"{manifest.epoch}, {manifest.preset}"),
        ("Manifest digest", result.manifest_digest.hex()),
        ("Folder", str(result.directory)),
        (
            "Same top-1",
            f"{summary['top1']:.2%} of {certificate.positions} positions ({summary['top1_with_ties']:.2%} with ties)",
        ),
        (
            "Difference",
            f"rms {summary['relative_rms']:.1e} of the logits' spread (allowed {certificate.bound:.0e}),"
            f" largest {summary['relative_largest']:.1e}, mean {summary['relative_mean']:.1e}",
        ),
        ("Compared in", f"{certificate.compute_dtype}, stored as {certificate.stored_dtype}, seed {certificate.seed}"),
    ]
    if native := certificate.native:
        error = f"{native.protected_rms:.1e}, the source's own {native.plain_rms:.1e}"
        rows.append((f"In {certificate.stored_dtype}", f"error {error}"))
    for stage, took in result.stages.items():
        went = f", {amount(stage, took.nbytes)}, {rate_of(stage, took.nbytes / took.seconds)}" if took.nbytes else ""
        rows.append((STAGES[stage], f"{took.seconds:.1f} s{went}"))
    table = Table(
        title="Protected and certified",
        title_justify="left",
        show_header=False,
        box=None,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
