"""`stip-keyservice audit` and `stip-keyservice leakage-report`: the command lines of the audit.

Torch and transformers are imported when a command runs, as in `protect`.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from stip_keyservice.home import Home
from stip_keyservice.protect.commands.process import (
    EXIT_SIGNAL,
    Stopped,
    bars,
    fail,
    opening_home,
    prepare,
    refuse_core_dumps,
    say,
    stoppable,
)
from stip_keyservice.protect.progress import LINE_SECONDS
from stip_protocol.documents import explain
from stip_protocol.durable import write_atomically
from stip_protocol.errors import Cancelled, ConfigurationError, StipError
from stip_protocol.leakage import REPORT_LIMIT, REPORT_NAME

if TYPE_CHECKING:
    from stip_keyservice.audit.document import Bounds, Report
    from stip_keyservice.audit.run import Progress
    from stip_protocol.leakage import Interval

SCALES = ("quick", "default")
ORIGIN_LIMIT = 200
"""Characters of `--origin`."""

EPILOG = """\b
Attacks, by letter:
  A  vocabulary matching with a runnable prefix of the model
  B  sorted-value fingerprint of rows
  C  norms and inner products of rows
  D  weight alignment to a public base
  E  linking two instances of one model
  F  ArrowMatch: weights matched to a public base's
  G  functional theft by the operator and one user
  H  inversion and collision on the KV cache
  I  frequency analysis
  J  linear fit and fine-tuning
  K  splicing another session's answers into one's own
  L  dictionary from a user's ordinary sessions
  M  trained inverter
  N  tied table under a dense key
  O  page accesses of the enclave's lookups

\b
Knowledge, the rows of the matrix:
  server      the operator alone
  drifted     ... who has a relative of the embedding table
  table       ... who has the embedding table
  base        ... who has the public model that this one derives from
  accomplice  ... and one user of the same instance
  sibling     ... and one user of another instance of the same model
  enclave     whoever broke one enclave
  host        the operator, as the host of the enclave

\b
Examples:
  stip-keyservice audit ./instance --model ./llama --out ./report
  stip-keyservice audit ./instance --model ./tuned --base ./llama --recording traffic.safetensors --out ./report
  stip-keyservice audit ./instance --model ./llama --attacks B,C --knowledge server,table

\b
Exit codes:
  0              the audit ran; what it found is in the report, and no finding is a failure
  1              another failure
  2              the input or the configuration is refused
  3              the instance is not what was signed, or MODEL is not what it was made from
  129, 130, 143  stopped by a terminal that closed, Ctrl-C or SIGTERM
"""

REPORT_EPILOG = """\b
Example:
  stip-keyservice leakage-report paper/leakage.json hardened/leakage.json --out ./report

\b
Exit codes:
  0  the pages are written
  2  a file is no report, or the folder cannot be written
"""


@click.command(name="audit", epilog=EPILOG)
@click.argument("instance", type=click.Path(path_type=Path))
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    required=True,
    help="The checkpoint folder that INSTANCE was made from: the truth that claims are held against.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="The public checkpoint that MODEL derives from; MODEL itself where that is public. Without it, attacks by"
    " whoever knows such a base are not applicable: leave it out only where there is none.",
)
@click.option(
    "--recording",
    type=click.Path(path_type=Path),
    help="What the server saw of real sessions of INSTANCE, as a recorder wrote it.  [default: computed from the"
    " instance's parts]",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="UTF-8 file of what people say to this model: victims, helpers and the public.  [default: the model's own"
    " text, sampled]",
)
@click.option(
    "--sibling",
    type=click.Path(path_type=Path),
    help="Another instance of MODEL under the same preset.  [default: one made for the audit]",
)
@click.option("--attacks", help="Letters, with commas.  [default: all]")
@click.option("--knowledge", help="Rows of the matrix, with commas.  [default: all]")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of everything that is drawn."
)
@click.option(
    "--scale",
    type=click.Choice(SCALES),
    default="default",
    show_default=True,
    help="How much is said. quick shows that everything runs; its figures say little, and are never signed.",
)
@click.option(
    "--origin", default="", help='What MODEL is, for readers of the report: "a fine-tune of X".  [default: nothing]'
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for leakage.json, index.html and leakage.md, not in INSTANCE; made where it is missing.  [default:"
    " none is written]",
)
@opening_home
@click.option("--no-sign", is_flag=True, help="Leave INSTANCE as it is.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout instead of a table: the result, or the error."
)
@click.option("--quiet", is_flag=True, help="No progress and no table; errors still go to stderr.")
def audit(
    instance: Path,
    model: Path,
    base: Path | None,
    recording: Path | None,
    text: Path | None,
    sibling: Path | None,
    attacks: str | None,
    knowledge: str | None,
    seed: int,
    scale: str,
    origin: str,
    out: Path | None,
    home: Path | None,
    no_sign: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the published attacks against the protected INSTANCE, and say how much they get.

    Every attacker gets what its row of the matrix grants and no key; what it claims is held against the truth, which
    this home's key opens, beside the best guess of somebody who saw nothing. A figure that stays within that guess
    means that this attack failed here, not that no attack exists.

    The report's summary is signed into the manifest of INSTANCE, with leakage.json beside it, and the key service's
    policy can hold instances to it. That gives INSTANCE a new manifest digest: audit before `stip-keyservice instances
    add`, and before manifest and server part go to the operator. An audit of some attacks or some knowledge alone, or
    one of --scale quick, is never signed.

    The same instance, traffic, seed and versions of the libraries give the same leakage.json.
    """
    refuse_core_dumps()
    try:
        with stoppable(), _progress(quiet) as progress:
            prepare()
            from stip_keyservice.audit import signing
            from stip_keyservice.audit.attacks import MODULES
            from stip_keyservice.audit.knowledge import KNOWLEDGE
            from stip_keyservice.audit.run import Audit

            opened = Home.open(home)
            todo = Audit(
                instance=instance,
                model=model,
                base=base,
                recording=recording,
                text=text,
                sibling=sibling,
                attacks=_chosen("attacks", attacks, tuple(MODULES)),
                knowledge=_chosen("knowledge", knowledge, tuple(KNOWLEDGE)),
                seed=seed,
                scale=scale,
                origin=origin,
            )
            _require_origin(origin)
            _require_apart(out, instance)
            if out is not None:
                _made(out)
            if not no_sign:
                signing.finish(instance, opened)
            report = todo.run(opened, progress)
            digest = None
            if todo.whole and not no_sign:
                _, digest = signing.sign(instance, report, opened)
            if out is not None:
                _write([report], out, report.to_json())
    except StipError as error:
        fail(error, as_json)
    except Stopped as stopped:
        say(Cancelled(f"stopped by {signal.Signals(stopped.number).name}"), as_json)
        sys.exit(EXIT_SIGNAL + stopped.number)
    if as_json:
        click.echo(json.dumps(_summary(report, digest)))
    elif not quiet:
        _show(report, digest, todo.lacking or "--no-sign")


@click.command(name="leakage-report", epilog=REPORT_EPILOG)
@click.argument("files", metavar="FILE...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for index.html and leakage.md; made where it is missing.",
)
def leakage_report(files: tuple[Path, ...], out: Path) -> None:
    """Put the reports of several audits (each FILE a leakage.json) beside each other on one page.

    The page needs no other file and no network, and runs no script.
    """
    try:
        prepare()
        _write([_read(path) for path in files], out)
    except StipError as error:
        fail(error, as_json=False)


def _chosen(option: str, value: str | None, known: Sequence[str]) -> tuple[str, ...]:
    """Names of a list with commas, in the order of `known`. Raises `ConfigurationError`."""
    if value is None:
        return tuple(known)
    named = [name.strip() for name in value.split(",")]
    if strange := [name for name in named if name not in known]:
        raise ConfigurationError.because(option, ascii(strange[0])[:40], ", ".join(known))
    return tuple(name for name in known if name in named)


def _require_apart(out: Path | None, instance: Path) -> None:
    """Nothing but what is signed lies in an instance."""
    if out is not None and out.resolve().is_relative_to(instance.resolve()):
        raise ConfigurationError.because("out", f"{out}, in the instance", "a folder elsewhere")


def _require_origin(origin: str) -> None:
    """It stands in the report, and on pages. Raises `ConfigurationError`."""
    if len(origin) > ORIGIN_LIMIT or not origin.isprintable():
        raise ConfigurationError.because("origin", ascii(origin)[:60], f"up to {ORIGIN_LIMIT} printable characters")


def _made(out: Path) -> None:
    """The folder for the report, before minutes go into one. Raises `ConfigurationError` where it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigurationError(f"out {out}: {error.strerror}", field="out") from None


def _write(reports: Sequence[Report], out: Path, data: bytes | None = None) -> None:
    from stip_keyservice.audit.report import pages

    _made(out)
    try:
        if data is not None:
            write_atomically(out / REPORT_NAME, data)
        pages.write(reports, out)
    except OSError as error:
        raise ConfigurationError(f"out {out}: {error.strerror}", field="out") from None


def _read(path: Path) -> Report:
    from pydantic import ValidationError

    from stip_keyservice.audit.document import Report

    try:
        with path.open("rb") as file:
            data = file.read(REPORT_LIMIT + 1)
        if len(data) > REPORT_LIMIT:
            raise ConfigurationError.because(str(path), "a larger file", f"at most {REPORT_LIMIT} bytes")
        return Report.from_json(data)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}", field="file") from None
    except ValidationError as error:
        raise ConfigurationError(f"{path}: no report of an audit: {explain(error)}", field="file") from None


class _Lines:
    """Progress as plain lines, one every `LINE_SECONDS`: for logs."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if (now := time.monotonic()) - self._said >= LINE_SECONDS:
            self._said = now
            click.echo(f"audit: {done} of {total} steps, next: {what}", err=True)


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A bar on a terminal's stderr, lines elsewhere."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield _Lines() if not quiet else lambda what, done, total: None
        return
    with bars(console, len("P, accomplice")) as shown:
        task = shown.add_task("instance", total=None, rate="")
        yield lambda what, done, total: shown.update(task, description=what, completed=done, total=total)


def _summary(report: Report, digest: bytes | None) -> dict[str, object]:
    return {
        "instance": report.subject.instance,
        "epoch": report.subject.epoch,
        "preset": report.subject.preset,
        "report_sha256": hashlib.sha256(report.to_json()).hexdigest(),
        "manifest_digest": digest and digest.hex(),
        "report": json.loads(report.to_json()),
    }


def _show(report: Report, digest: bytes | None, unsigned: str) -> None:
    subject, traffic = report.subject, report.traffic
    table = Table(
        title=f"Instance {subject.instance}, epoch {subject.epoch}, {subject.preset}: what leaks\n{traffic.sessions}"
        f" sessions, {traffic.positions} positions, {traffic.source}; seed {report.seed}",
        title_justify="left",
        caption="Guessed: what somebody gets who saw nothing. In brackets: 95 % confidence intervals.",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("Attack", "Knows", "Figure"):
        table.add_column(name, no_wrap=True)
    for name in ("Found", "Guessed"):
        table.add_column(name, no_wrap=True, justify="right")
    from stip_keyservice.audit.report.judging import Level, judge, main

    measured = sorted((cell for cell in report.cells if cell.metrics), key=lambda cell: cell.attack)
    for cell in measured:
        metric = main(cell)
        assert metric is not None  # the cell has some
        found, guessed = _interval(metric.measured), _interval(metric.prior)
        style = "bold" if judge(metric) >= Level.SOME else ""
        table.add_row(cell.attack, cell.knowledge, metric.name, found, guessed, style=style)
    console = Console()
    console.print(table)
    console.print(
        f"{len(report.cells) - len(measured)} cells are not applicable; the report says why.", highlight=False
    )
    if digest is None:
        console.print(f"Not signed: {unsigned}.", highlight=False)
    else:
        console.print(f"Signed. Manifest digest {digest.hex()}", highlight=False)


def _interval(of: Interval | Bounds | None) -> str:
    from stip_keyservice.audit.document import Bounds

    if of is None:
        return ""
    scale, sign = (1, "") if isinstance(of, Bounds) else (100, " %")
    return f"{scale * of.value:.1f}{sign} ({scale * of.low:.1f}-{scale * of.high:.1f})"
