"""Time and memory of protecting a LLaMA2-7B-shaped checkpoint: `python -m benchmarks.protect`.

A sharded bfloat16 checkpoint with random weights is made, then copied and protected in turns on the same disk, one
output at a time: a copy of the files (with fsync) before and after each protection says what the disk does just then.
Each protection runs in a process of its own, whose peak resident memory (VmHWM) is read in the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import checkpoints, machine, protection_report
from benchmarks.protect_run import Run
from benchmarks.protection_report import Copy, Protection, Results
from stip_keyservice.protect.commands.process import BLAS_THREADS, LARGE_PAGES

DOCS = machine.ROOT / "docs" / "benchmarks"
PRESETS = ("paper", "hardened")
LAYERS = 32
SPACE_MARGIN = 1 << 30
"""Bytes of disk beyond the checkpoint and one output."""


def copy(files: tuple[Path, ...], folder: Path) -> Copy:
    """Copy the files one after another, each with fsync, and remove the copies."""
    forget(files)
    folder.mkdir()
    began = time.monotonic()
    for path in files:
        with path.open("rb") as source, (folder / path.name).open("wb") as target:
            size, done = path.stat().st_size, 0
            while done < size:
                done += os.sendfile(target.fileno(), source.fileno(), done, size - done)
            os.fsync(target.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(folder)
    return Copy(seconds, sum(path.stat().st_size for path in files))


def protect(written: checkpoints.Written, out: Path, preset: str, workers: int | None) -> Run:
    """Protect in a process of its own."""
    forget(written.files)
    options = () if workers is None else ("--workers", str(workers))
    model = str(written.files[0].parent)
    argv = [sys.executable, "-m", "benchmarks.protect_run", model, str(out), preset, *options]
    environment = os.environ | {BLAS_THREADS: "1", LARGE_PAGES: "1"}  # as the command does
    done = subprocess.run(argv, cwd=machine.ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Run(**json.loads(done.stdout))


def forget(files: tuple[Path, ...]) -> None:
    """Nothing waits to be written, and the files are not in memory: every arm reads them from the disk."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@click.command()
@click.option(
    "--scale",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help=f"Of LLaMA2-7B's {LAYERS} layers; its widths and vocabulary stay.",
)
@click.option("--presets", default=",".join(PRESETS), show_default=True)
@click.option("--shard-gb", type=click.FloatRange(0.01), default=2.0, show_default=True, help="Of the source.")
@click.option("--workers", type=click.IntRange(1, 64), help="Threads that compute.  [default: as protect takes]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Disk to measure.  [default: TMPDIR]")
@click.option("--quick", is_flag=True, help="A smoke run: a tiny model of the same form; proves nothing.")
@click.option("--json", "as_json", is_flag=True, help="The results as one JSON object on stdout instead of a table.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=DOCS, help="Where results go.")
def main(
    scale: float,
    presets: str,
    shard_gb: float,
    workers: int | None,
    seed: int,
    work: Path | None,
    quick: bool,
    as_json: bool,
    out: Path,
) -> None:
    """Measure, print a table, and write protection.md and protection.json."""
    facts = machine.here()
    chosen = [name.strip() for name in presets.split(",")]
    if unknown := set(chosen) - set(PRESETS):
        known = f"known: {', '.join(PRESETS)}"
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; {known}", param_hint="--presets")
    layers = max(1, round(LAYERS * scale))
    config = checkpoints.TINY if quick else checkpoints.llama(layers)
    shard_bytes = 1 << 20 if quick else int(shard_gb * 1e9)
    began = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="stip-protect-", dir=work) as name,
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        folder, task = Path(name), progress.add_task("checkpoint")
        needed = 2 * checkpoints.nbytes(config) + SPACE_MARGIN
        if (free := shutil.disk_usage(folder).free) < needed:
            raise click.ClickException(f"{free / 1e9:.1f} GB free in {folder}, {needed / 1e9:.1f} needed; try --scale")
        written = checkpoints.write(folder / "checkpoint", config, shard_bytes=shard_bytes, seed=seed)
        progress.update(task, description="copy")
        copies = [copy(written.files, folder / "copy")]
        runs = []
        for preset in chosen:
            progress.update(task, description=f"protect, {preset}")
            runs.append(protect(written, folder / "out", preset, workers))
            progress.update(task, description="copy")
            copies.append(copy(written.files, folder / "copy"))
    results = Results(
        command=shlex.join(["python", "-m", "benchmarks.protect", *sys.argv[1:]]),
        machine=facts,
        seed=seed,
        layers=config["num_hidden_layers"],
        source=written.nbytes,
        shards=len(written.files),
        largest_shard=written.largest,
        copies=copies,
        protections=[
            Protection.of(run, before, after, written.largest)
            for run, before, after in zip(runs, copies, copies[1:], strict=False)
        ],
        seconds=time.monotonic() - began,
    )
    protection_report.write(results, out)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(results)))
    else:
        protection_report.show(results)
    click.echo(f"written to {out / protection_report.PAGE} and {protection_report.DATA}", err=True)


if __name__ == "__main__":
    main()
