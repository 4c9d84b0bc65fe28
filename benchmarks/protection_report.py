"""Results of `benchmarks.protect` for people (protection.md, the terminal) and for programs (protection.json)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.table import Table

from benchmarks.machine import Machine
from benchmarks.protect_run import Run
from benchmarks.report import BUSY, markdown
from stip_keyservice.protect.storage import memory

PAGE, DATA = "protection.md", "protection.json"
TARGETS = {"paper": 1.5}
"""Largest wall time over the copy's that is aimed at; `hardened` is bounded by its products."""
HEAD = ("preset", "seconds", "MB/s", "copy before, after", "ratio", "aim", "met", "peak memory", "bound", "within")

METHOD = """\
## What is measured

- **Source**: the tensors of LLaMA2-7B in bfloat16 (random sign and mantissa; no value tells anything about speed), in
  shards, on the disk that everything is written to. Before each measurement everything is synced and the source is
  dropped from the page cache.
- **Copy**: each file with `sendfile` and fsync, one after another. It is run before and after each protection.
- **Protect**: what `stip-keyservice protect` does up to the certificate: headers, keys, both parts with their SHA-256,
  sealed tables, journal, fsync; in a process of its own. Starting Python and importing its libraries is not in it, nor
  is the equivalence certificate, which runs both models.
- **Ratio**: the protection's wall time over the mean of the copies before and after it.
- **Peak memory**: VmHWM of that process at its end. The bound is twice the largest shard and 1 GiB.
- **Where the time goes**: thread-seconds, by what each thread was at when it was looked at, a hundred times a second.
  Workers compute, one thread hashes and writes, one syncs; together they may exceed wall time times cores where a
  thread waits for the disk or for a core.
"""


@dataclass(frozen=True)
class Copy:
    """One copy of the source's files."""

    seconds: float
    nbytes: int


@dataclass(frozen=True)
class Protection:
    """One protection against the copies around it."""

    run: Run
    before: float
    after: float
    """Seconds of the copies."""
    ratio: float
    bound: int
    """Bytes that its peak memory may reach."""
    within: bool
    met: bool | None
    """Whether the ratio is what is aimed at; None where nothing is."""

    @classmethod
    def of(cls, run: Run, before: Copy, after: Copy, largest_shard: int) -> Self:
        ratio = 2 * run.seconds / (before.seconds + after.seconds)
        bound = memory.bound(largest_shard)
        target = TARGETS.get(run.preset)
        met = None if target is None else ratio <= target
        return cls(run, before.seconds, after.seconds, ratio, bound, run.peak <= bound, met)


@dataclass(frozen=True)
class Results:
    """Everything that is written down."""

    command: str
    machine: Machine
    seed: int
    layers: int
    source: int
    """Bytes of the checkpoint."""
    shards: int
    largest_shard: int
    copies: list[Copy]
    protections: list[Protection]
    seconds: float


def write(results: Results, folder: Path) -> None:
    """Both files, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DATA).write_text(json.dumps(dataclasses.asdict(results), indent=2, allow_nan=False) + "\n")
    (folder / PAGE).write_text(page(results))


def show(results: Results) -> None:
    """The outcome, on stdout."""
    table = Table(title=f"Protecting {results.source / 1e9:.1f} GB", title_justify="left", box=None)
    for name in HEAD:
        table.add_column(name, justify="left" if name == "preset" else "right")
    for each in results.protections:
        table.add_row(*_row(each, results.source))
    Console().print(table)


def page(results: Results) -> str:
    """protection.md."""
    here = results.machine
    load = f"{here.load_before}" + ("" if here.load_before <= BUSY else ": **not a quiet machine**")
    rates = ", ".join(f"{each.nbytes / 1e6 / each.seconds:.0f}" for each in results.copies)
    facts = [
        ("machine", f"{here.cores} cores, {here.cpu}, {here.memory_gib} GiB, {here.system}"),
        ("load before the run", load),
        ("versions", f"Python {here.python}, " + ", ".join(f"{name} {each}" for name, each in here.versions.items())),
        ("commit", here.commit),
        ("command", f"`{results.command}`"),
        ("seed", str(results.seed)),
        (
            "source",
            f"{results.layers} layers, {results.source / 1e9:.2f} GB in {results.shards} shards, the largest"
            f" {results.largest_shard / 1e9:.2f} GB",
        ),
        ("copies", f"{rates} MB/s"),
        ("duration", f"{results.seconds / 60:.1f} minutes"),
    ]
    outcome = markdown(HEAD, [_row(each, results.source) for each in results.protections])
    parts = [
        "# Protecting a LLaMA2-7B-shaped checkpoint\n\nWritten by `python -m benchmarks.protect`; do not edit. "
        f"The same in numbers: [{DATA}]({DATA}).\n",
        markdown(("", ""), facts),
        METHOD,
        f"## Outcome\n\nMB/s are of the source.\n\n{outcome}",
        *(_details(each) for each in results.protections),
    ]
    return "\n".join(parts)


def _row(each: Protection, source: int) -> tuple[str, ...]:
    run, target = each.run, TARGETS.get(each.run.preset)
    return (
        run.preset,
        f"{run.seconds:.1f}",
        f"{source / 1e6 / run.seconds:.0f}",
        f"{each.before:.1f}, {each.after:.1f}",
        f"{each.ratio:.2f}",
        "" if target is None else f"≤ {target}",
        {None: "", True: "yes", False: "no"}[each.met],
        f"{run.peak / 1e9:.2f} GB",
        f"{each.bound / 1e9:.2f} GB",
        "yes" if each.within else "no",
    )


def _details(each: Protection) -> str:
    run = each.run
    stages = [(name, f"{seconds:.1f}") for name, seconds in run.stages.items()]
    total = sum(run.activities.values()) or 1.0
    activities = [
        (what, f"{seconds:.1f}", f"{seconds / total:.0%}") for what, seconds in run.activities.items() if seconds
    ]
    text = (
        f"## {run.preset}\n\n{run.workers} workers; {run.written / 1e9:.2f} GB of tensors written; processor time"
        f" {run.processor_seconds:.1f} s; memory before anything was read {run.imported / 1e9:.2f} GB.\n\n"
    )
    return (
        text
        + markdown(("stage", "seconds"), stages)
        + "\n"
        + markdown(("activity", "thread-seconds", "share"), activities)
    )
