"""`stip-keyservice verify-equivalence`: the equivalence certificate again, on other inputs or a moved instance.

Torch and transformers are imported when the command runs, as in `protect`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from stip_keyservice.home import Home
from stip_keyservice.protect.commands.process import (
    EXIT_NOT_EQUIVALENT,
    bars,
    fail,
    opening_home,
    prepare,
    refuse_core_dumps,
)
from stip_keyservice.protect.progress import Lines, Progress, rate_of, silent
from stip_protocol.errors import StipError
from stip_protocol.manifest import Manifest

if TYPE_CHECKING:
    from stip_keyservice.protect.equivalence.certificate import Certificate

EPILOG = """\b
Examples:
  stip-keyservice verify-equivalence ./instance ./llama
  stip-keyservice verify-equivalence ./instance ./llama --ids prompts.json --samples 0 --json

\b
Exit codes:
  0  the instance computes what MODEL computes
  1  another failure
  2  the input or the configuration is refused
  3  the instance does not compute what MODEL computes, or is not what was signed
"""


@click.command(name="verify-equivalence", epilog=EPILOG)
@click.argument("instance", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@opening_home
@click.option(
    "--samples",
    type=click.IntRange(0, 64),
    default=4,
    show_default=True,
    help="Random sequences that are compared; 0 only together with --ids.",
)
@click.option(
    "--length",
    type=click.IntRange(min=1),
    help="Ids of a random sequence.  [default: 64, or as many positions as the model has]",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the random sequences."
)
@click.option(
    "--ids",
    type=click.Path(path_type=Path),
    help="File of sequences to compare too: a JSON list of lists of token ids.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64"]),
    help="What to compute in. A float16 or bfloat16 instance also runs in its own dtype.  [default: float32, and"
    " float64 for a float64 instance]",
)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout instead of a table: the result, or the error."
)
@click.option("--quiet", is_flag=True, help="No progress and no table; errors still go to stderr.")
def verify_equivalence(
    instance: Path,
    model: Path,
    home: Path | None,
    samples: int,
    length: int | None,
    seed: int,
    ids: Path | None,
    dtype: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare the protected INSTANCE with MODEL, the checkpoint folder it was made from.

    Checks the instance's signature and digests, opens its secrets with your home's key, and runs both models on
    the same inputs, a layer at a time: models larger than memory can be compared. Prints how far they differ after
    every layer and in the logits, relative to the spread of the values there, and whether both pick the same ids.
    """
    refuse_core_dumps()
    try:
        opened = Home.open(home)
        with _layers(quiet) as progress:
            manifest, certificate = _verification()(
                instance,
                model,
                opened,
                samples=samples,
                length=length,
                seed=seed,
                ids=ids,
                compute_dtype=dtype,
                progress=progress,
            )
    except StipError as error:
        fail(error, as_json)
    if as_json:
        click.echo(json.dumps(_report(manifest, certificate)))
    elif not quiet:
        _show(manifest, certificate)
    if not certificate.passed:
        click.echo(f"error: {_verdict(certificate)}", err=True)
        sys.exit(EXIT_NOT_EQUIVALENT)


def _verification() -> Callable[..., tuple[Manifest, Certificate]]:
    """`equivalence.verification.verify`, loaded when the command runs."""
    prepare()
    from stip_keyservice.protect.equivalence.verification import verify

    return verify


@contextmanager
def _layers(quiet: bool) -> Iterator[Progress]:
    """How many layers have run, with rate and time left: a bar on a terminal's stderr, else a line now and then."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield silent if quiet else Lines(lambda line: click.echo(line, err=True))
        return
    with bars(console) as shown:
        task = shown.add_task("Signature and digests", total=None, rate="")

        def progress(stage: str, done: int, total: int) -> None:
            if not done:
                shown.reset(task, total=total, description="Layers")
            speed = shown.tasks[task].speed
            shown.update(task, completed=done, rate=rate_of(stage, speed) if speed else "")

        yield progress


def _report(manifest: Manifest, certificate: Certificate) -> dict[str, object]:
    return {
        "instance": manifest.instance,
        "epoch": manifest.epoch,
        "preset": manifest.preset,
        "equivalent": certificate.passed,
        "departs": None if certificate.passed else certificate.departs,
        "certificate": certificate.model_dump(mode="json") | {"passed": certificate.passed},
    }


def _show(manifest: Manifest, certificate: Certificate) -> None:
    stored = certificate.stored_dtype
    table = Table(
        title=f"Instance {manifest.instance}, epoch {manifest.epoch}, {manifest.preset}: protected against plain,"
        f" in {certificate.compute_dtype}",
        title_justify="left",
        caption="Relative to the spread of the values there; hidden states in keyed coordinates.",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("After", no_wrap=True)
    figures = ["rms", "mean", "largest"]
    if certificate.native:
        figures += [f"{stored}: plain", f"{stored}: protected"]
    for name in figures:
        table.add_column(name, justify="right")
    for layer in certificate.layers:
        own = (layer.native_plain_rms, layer.native_protected_rms) if certificate.native else ()
        found = layer.differences
        table.add_row(layer.name, *_cells(found.relative_rms, found.relative_mean, found.relative_largest, *own))
    for group in certificate.groups:
        found = group.differences
        table.add_row(f"logits, {group.name}", *_cells(found.relative_rms, found.relative_mean, found.relative_largest))
    if native := certificate.native:
        table.add_row("logits, all", "", "", "", *_cells(native.plain_rms, native.protected_rms))
    console = Console()
    console.print(table)
    for group in certificate.groups:
        console.print(
            f"{group.name.capitalize()}: {group.sequences} sequences, {group.positions} positions; same top-1"
            f" {group.top1:.2%}, with ties {group.top1_with_ties:.2%}{_left_out(group.undecided)}",
            highlight=False,
        )
    for line in _coverage(certificate):
        console.print(line, highlight=False)
    if certificate.passed:
        console.print(_verdict(certificate), highlight=False)


def _cells(*figures: float | None) -> list[str]:
    return ["" if figure is None else f"{figure:.1e}" for figure in figures]


def _verdict(certificate: Certificate) -> str:
    if certificate.passed:
        return f"Equivalent: rms {certificate.relative_rms:.1e} of the logits' spread, allowed {certificate.bound:.1e}"
    where = f"; they part at: {certificate.departs}" if certificate.departs else ""
    return f"not equivalent: {certificate.fault}{where}"


def _left_out(undecided: int) -> str:
    return f"; {undecided} more left out, where rounding decides a routing" if undecided else ""


def _coverage(certificate: Certificate) -> Iterator[str]:
    """What was compared of the model, and so what was not."""
    for table in certificate.tables:
        errors = f"error {table.largest:.1e} of a row, allowed {table.bound:.1e}"
        yield f"Enclave's {table.name}: all {table.rows} rows, {errors}"
    reached = certificate.coverage
    positions = f"sequences of up to {reached.length} of {reached.max_positions} positions"
    yield f"Run: {reached.ids} of {reached.vocabulary} ids, {positions}"
    if reached.experts:
        yield f"Experts: {reached.experts_reached} of {reached.experts} were sent a position"
