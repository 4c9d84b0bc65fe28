"""`python -m benchmarks.serving`: measure sections, write their parts, then the page and its plots."""

from __future__ import annotations

import asyncio
import shlex
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import machine
from benchmarks.serving import page, records
from benchmarks.serving.bench import Bench, Draft, Scale
from benchmarks.serving.interleaving import Budget
from benchmarks.serving.records import Part
from benchmarks.serving.sections import SECTIONS

DOCS = machine.ROOT / "docs" / "benchmarks"
MINUTES = {Scale.QUICK: 60.0, Scale.DEFAULT: 30.0, Scale.FULL: 240.0}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--sections", default=",".join(SECTIONS), show_default=True, help="In this order.")
@click.option("--quick", "scale", flag_value=Scale.QUICK, help="A smoke run on tiny models; proves nothing.")
@click.option("--full", "scale", flag_value=Scale.FULL, help="Every model in both dtypes, more rounds: hours.")
@click.option("--budget-minutes", type=click.FloatRange(0, min_open=True),
              help="No cell begins after so long.  [default: 30; 60 with --quick, 240 with --full]")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Of every model.  [default: all cores but one]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--render", is_flag=True, help="Measure nothing; write page and plots from the parts that are there.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=DOCS, help="Where results go.")
def main(
    sections: str,
    scale: str | None,
    budget_minutes: float | None,
    threads: int | None,
    seed: int,
    render: bool,
    out: Path,
) -> None:
    """What the protected path costs over the plain engine.

    Each section writes OUT/serving/SECTION.json while it runs; what was measured stays when a run is stopped. Page and
    plots are made from all parts that are there.
    """
    chosen = [name.strip() for name in sections.split(",")]
    if unknown := set(chosen) - set(SECTIONS):
        known = f"known: {', '.join(SECTIONS)}"
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; {known}", param_hint="--sections")
    if not render:
        extent = Scale(scale) if scale else Scale.DEFAULT
        _measure(chosen, extent, (budget_minutes or MINUTES[extent]) * 60, threads, seed, out)
    parts = records.read(out, list(SECTIONS))
    if not parts:
        raise click.ClickException(f"no parts in {out / 'serving'}: nothing to render")
    page.write(parts, out)
    for name, part in parts.items():
        for what in part.missing:
            click.echo(f"MISSING in {name}: {what}", err=True)
    click.echo(f"written to {out / page.PAGE}", err=True)


def _measure(chosen: list[str], scale: Scale, seconds: float, threads: int | None, seed: int, out: Path) -> None:
    facts = machine.here()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        # Without the folder's removal a checkpoint or two would stay behind each run.
        tempfile.TemporaryDirectory(prefix="stip-bench-") as folder,
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("")
        section = ""

        def say(what: str) -> None:
            progress.update(task, description=f"{section}: {what}")

        bench = Bench(scale, Path(folder), seed, threads or max(1, facts.cores - 1), Budget(seconds), say)

        async def run() -> None:
            nonlocal section
            async with bench:
                for section in chosen:
                    empty = Part(
                        section=section,
                        command=shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
                        scale=scale.value,
                        machine=facts,
                        seed=seed,
                        threads=bench.threads,
                        seconds=0.0,
                    )
                    began, draft = time.monotonic(), Draft(empty, out)
                    if bench.budget.spent:
                        draft.missing("the whole section: no time was left")
                        continue
                    await SECTIONS[section](bench, draft)
                    click.echo(f"{section}: {time.monotonic() - began:.0f} s", err=True)

        asyncio.run(run())


if __name__ == "__main__":
    main()
