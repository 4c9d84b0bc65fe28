"""The accuracy benchmark: does a protected model predict what the plain one predicts, as the papers' Table 5 asks?

    python -m benchmarks.accuracy            # some minutes on two cores; writes docs/benchmarks/accuracy.{md,json}

For each family a small model with random parameters, for each preset that it is not refused: top-1 agreement and sums
of absolute differences over seeded samples; controls that show what rounding alone does, and what a wrong key does.
One process a core, one thread each.
"""

from __future__ import annotations

import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from benchmarks import accuracy_report as report
from benchmarks import machine
from benchmarks.accuracy_models import (
    CONFIGURATIONS,
    VOCABULARY,
    Checkpoint,
    Model,
    PlainModel,
    ProtectedCheckpoint,
    checkpoint,
)
from benchmarks.accuracy_results import FamilyResult, Narrow, Results, Row, Ties, compare, narrow
from stip_keyservice.protect.presets import PRESETS
from stip_protocol.errors import PresetRefused

DOCS = machine.ROOT / "docs" / "benchmarks"
LENGTH, BATCH = 32, 256
AGAIN_BATCH, AGAIN_SAMPLES = 3, 2000
"""The plain model against itself: batches below four run other kernels here; larger ones give the same bits. They are
slow, so there are fewer samples."""
CONTROLLED = "hardened"
"""The preset that the control with a key left out is of."""


@dataclass(frozen=True)
class Job:
    """What one process does."""

    family: str
    presets: tuple[str, ...]
    samples: int
    seed: int


def measure(job: Job) -> FamilyResult:
    """Everything about one family."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    ids = torch.randint(VOCABULARY, (job.samples, LENGTH), generator=torch.Generator().manual_seed(job.seed + 1))
    with tempfile.TemporaryDirectory() as folder:
        return _Family(job, ids, Path(folder)).measure()


class _Family:
    def __init__(self, job: Job, ids: torch.Tensor, folder: Path) -> None:
        self._job, self._ids, self._folder = job, ids, folder
        self._refused: dict[str, str] = {}

    def measure(self) -> FamilyResult:
        wide = checkpoint(self._job.family, self._job.seed, torch.float32, self._new("wide"))
        plain, precise = wide.plain(torch.float32), wide.plain(torch.float64)
        reference, exact = predictions(plain, self._ids), predictions(precise, self._ids)
        ties = Ties.of(reference, exact, margins(plain, self._ids), margins(precise, self._ids))
        presets, some = self._presets(wide, reference, ties), min(AGAIN_SAMPLES, self._job.samples)
        again = predictions(plain, self._ids[:some], batch=AGAIN_BATCH)
        return FamilyResult(
            family=self._job.family,
            parameters=wide.parameters,
            predicted=len(set(reference.argmax(1).tolist())),
            routing_ties=int(ties.routing.sum()),
            presets=presets,
            controls=[
                Row(f"plain, batches of {AGAIN_BATCH}", compare(reference[:some], again, ties.first(some))),
                Row("plain, float64", compare(reference, exact, ties)),
                Row("one key left out", compare(reference, self._without_a_key(wide), ties)),
            ],
            narrow=self._narrow(),
            refused=self._refused,
        )

    def _presets(self, wide: Checkpoint, reference: torch.Tensor, ties: Ties) -> list[Row]:
        return [
            Row(preset, compare(reference, predictions(protected.model(torch.float32), self._ids), ties))
            for preset, protected in self._protected(wide)
        ]

    def _without_a_key(self, wide: Checkpoint) -> torch.Tensor:
        intact = wide.protect(CONTROLLED, self._job.seed, self._new("intact"))
        mutant = wide.protect(CONTROLLED, self._job.seed, self._new("mutant"), mutate=intact.left_out)
        return predictions(mutant.model(torch.float32), self._ids)

    def _narrow(self) -> list[Narrow]:
        stored = checkpoint(self._job.family, self._job.seed, torch.bfloat16, self._new("narrow"))
        reference = predictions(stored.plain(torch.float32), self._ids)
        plain = predictions(stored.plain(torch.bfloat16), self._ids)
        rows = []
        for preset, protected in self._protected(stored):
            found, weights = (
                predictions(protected.model(dtype), self._ids) for dtype in (torch.bfloat16, torch.float32)
            )
            rows.append(narrow(preset, reference, plain, found, weights))
        return rows

    def _protected(self, stored: Checkpoint) -> Iterator[tuple[str, ProtectedCheckpoint]]:
        """Each preset with its copy; a note in place of those that are refused."""
        for preset in self._job.presets:
            folder = self._new(f"{stored.directory.name}, {preset}")
            try:
                protected = stored.protect(preset, self._job.seed, folder)
            except PresetRefused as refusal:
                self._refused[preset] = str(refusal)
                continue
            yield preset, protected

    def _new(self, name: str) -> Path:
        folder = self._folder / name
        folder.mkdir()
        return folder


def predictions(model: Model, ids: torch.Tensor, *, batch: int = BATCH) -> torch.Tensor:
    """float32 [samples, vocabulary] logits of the last position of ids [samples, length]."""
    with torch.inference_mode():
        return torch.cat([model.last(some).float() for some in torch.split(ids, batch)])


def margins(model: PlainModel, ids: torch.Tensor) -> torch.Tensor:
    """`PlainModel.margins` of all samples."""
    with torch.inference_mode():
        return torch.cat([model.margins(some) for some in torch.split(ids, BATCH)])


def _names(known: list[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    def parse(context: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        if unknown := set(chosen) - set(known):
            raise click.BadParameter(f"{', '.join(sorted(unknown))}; known: {', '.join(known)}")
        return chosen

    return parse


@click.command()
@click.option("--samples", type=click.IntRange(2, 1_000_000), default=10_000, show_default=True, help="A family.")
@click.option(
    "--families", default=",".join(CONFIGURATIONS), callback=_names(list(CONFIGURATIONS)), help="[default: all]"
)
@click.option("--presets", default=",".join(PRESETS), callback=_names(list(PRESETS)), show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights, ids and keys.")
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: one a core]")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON in place of the tables.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=DOCS, help="Where results go.")
def main(
    samples: int,
    families: tuple[str, ...],
    presets: tuple[str, ...],
    seed: int,
    workers: int | None,
    as_json: bool,
    out: Path,
) -> None:
    """Measure, print tables beside the published figures, and write accuracy.md and accuracy.json."""
    facts, began = machine.here(), time.monotonic()
    jobs = [Job(family, presets, samples, seed) for family in families]
    results = Results(
        command=shlex.join(["python", "-m", "benchmarks.accuracy", *sys.argv[1:]]),
        machine=facts,
        seed=seed,
        samples=samples,
        length=LENGTH,
        batch=BATCH,
        families=_run(jobs, workers or facts.cores),
        seconds=time.monotonic() - began,
    )
    report.write(results, out)
    if as_json:
        click.echo(report.data(results))
    else:
        report.show(results)
    click.echo(f"written to {out / report.PAGE} and {report.DATA}", err=True)


def _run(jobs: list[Job], workers: int) -> list[FamilyResult]:
    """Every job, in processes of their own; results in the order of `jobs`."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    spawn = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
        ProcessPoolExecutor(min(workers, len(jobs)), mp_context=spawn) as pool,
    ):
        task = progress.add_task("families", total=len(jobs))
        running = {pool.submit(measure, job): job for job in jobs}
        for done in as_completed(running):
            done.result()
            progress.update(task, advance=1, description=f"after {running[done].family}")
        return [done.result() for done in running]


if __name__ == "__main__":
    main()
