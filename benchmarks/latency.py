"""Time per token and time to first token of protected models over plain ones: `python -m benchmarks.latency`.

One stack a model (key service, one server a preset, gateway, enclave: real processes, TLS), the client here, and
beside it the same engine with the plain weights, called directly. In every round each arm runs once, in random
order, on the same prompts: what the machine does meanwhile hits all of them. The plain arm runs twice a round:
what differs between the two is noise, and a ratio can say no more than that.
"""

from __future__ import annotations

import asyncio
import random
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import hop, machine, report
from benchmarks.direct import DirectEngine, Order
from benchmarks.models import SUBJECTS, Subject
from benchmarks.protected import Streams
from benchmarks.results import AGAIN, BASE, PLAIN, WITHOUT_HEAD, Cell, ModelResult, Results, compare
from stip.connection import AsyncConnection, aconnect
from stip_server.config import EngineSettings
from stip_stack import latency
from stip_stack.stack import Stack
from stip_stack.workspace import Published

DOCS = machine.ROOT / "docs" / "benchmarks"
SLOTS = 16
STEADY = 16
"""Tokens a stream that are measured at least, after the last stream began."""


@dataclass(frozen=True)
class Plan:
    """What is run."""

    subjects: tuple[Subject, ...]
    presets: tuple[str, ...]
    streams: tuple[int, ...]
    rounds: dict[int, int]
    """By streams."""
    prompt: int
    tokens: int
    threads: int
    seed: int
    hop_trips: int

    @property
    def arms(self) -> list[str]:
        base = [BASE] if any(WITHOUT_HEAD[preset] for preset in self.presets) else []
        return [PLAIN, AGAIN, *base, *self.presets]

    @property
    def engine(self) -> dict[str, int]:
        """The `[engine]` table of every server and of the direct engine; the rest is default."""
        return {"slots": SLOTS, "threads": self.threads, "max_positions": self.prompt + self.tokens}

    @property
    def steps(self) -> int:
        """Runs in all, for the progress bar."""
        rounds = 1 + sum(self.rounds.values())
        return len(self.subjects) * (rounds * len(self.arms) + len(self.presets) + 2)


class Bench:
    """Runs a plan."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan, self._progress = plan, progress
        self._task = progress.add_task("", total=plan.steps)

    def measure(self, subject: Subject) -> ModelResult:
        """One model: checkpoint, protection, stack, rounds."""
        plan = self._plan
        # One core's worth of threads for every part, so that the model's do not fight the others'.
        environment = {"OMP_NUM_THREADS": str(plan.threads)}
        with tempfile.TemporaryDirectory(prefix="stip-bench-") as folder:
            work = Path(folder)
            self._say(f"{subject.name}: checkpoint")
            checkpoint = subject.checkpoint(work / "checkpoint", seed=plan.seed)
            with (
                Stack(work / "stack", environment=environment) as stack,
                DirectEngine(checkpoint, subject.dtype, plan.engine) as direct,
            ):
                published = {}
                for preset in plan.presets:
                    self._say(f"{subject.name}: protect, {preset}")
                    arguments = subject.protect if preset == "paper" else ()
                    published[preset] = stack.protect(checkpoint, preset, *arguments, "--samples", "1")
                self._say(f"{subject.name}: start")
                stack.start(list(published.values()), engine=plan.engine)
                return asyncio.run(self._rounds(subject, stack, published, direct))

    async def _rounds(
        self, subject: Subject, stack: Stack, published: dict[str, Published], direct: DirectEngine
    ) -> ModelResult:
        plan = self._plan
        vocabulary = next(iter(published.values())).manifest.vocabulary
        enclave = stack.processes["enclave"].metrics
        connections: dict[str, AsyncConnection] = {}
        try:
            for preset, instance in published.items():
                connections[preset] = await aconnect(stack.enrol(f"bench-{preset}", instance))
            protected = {
                preset: Streams(each, partial(_head, enclave) if WITHOUT_HEAD[preset] else None)
                for preset, each in connections.items()
            }
            await self._round(Cell(1), "warming up", np.zeros((1, plan.prompt), int), protected, direct, plan.arms)
            cells = [await self._cell(subject, streams, vocabulary, protected, direct) for streams in plan.streams]
        finally:
            for connection in connections.values():
                await connection.close()
        addresses = {"enclave": enclave, "gateway": stack.processes["gateway"].metrics}
        first = next(iter(published.values()))
        stages = latency.table({**addresses, "server": stack.processes["server-0-0"].metrics})
        trips = await hop.measure(stack, first, "server-0-0", blocks=8, trips=plan.hop_trips)
        comparisons = [compare(cell, preset, seed=plan.seed) for cell in cells for preset in plan.presets]
        return ModelResult(subject.name, subject.title, subject.dtype, comparisons, stages, trips)

    async def _cell(
        self, subject: Subject, streams: int, vocabulary: int, protected: dict[str, Streams], direct: DirectEngine
    ) -> Cell:
        """All rounds at one number of streams."""
        plan = self._plan
        order = random.Random(plan.seed)  # noqa: S311 - the order of arms is no secret
        prompts = np.random.default_rng(plan.seed)
        cell, rounds = Cell(streams), plan.rounds[streams]
        for number in range(1, rounds + 1):
            what = f"{subject.name}: {streams} streams, round {number} of {rounds}"
            ids = prompts.integers(vocabulary, size=(streams, plan.prompt))
            await self._round(cell, what, ids, protected, direct, order.sample(plan.arms, len(plan.arms)))
        return cell

    async def _round(
        self,
        cell: Cell,
        what: str,
        ids: NDArray[Any],
        protected: dict[str, Streams],
        direct: DirectEngine,
        arms: list[str],
    ) -> None:
        """Every arm once, on the prompts `ids` [streams, tokens]."""
        prompts = ids.tolist()
        for arm in arms:
            self._say(f"{what}, {arm}")
            if arm in protected:
                samples = await protected[arm].run(prompts, self._plan.tokens)
            else:
                order = Order(prompts, self._plan.tokens, "hidden" if arm == BASE else "top")
                samples = await asyncio.to_thread(direct.run, order)
            cell.runs[arm].append(samples)

    def _say(self, what: str) -> None:
        self._progress.update(self._task, advance=1, description=what)


def _head(enclave: str) -> tuple[int, float]:
    """Count and sum of the enclave's head stage so far."""
    row = next((row for row in latency.table({"enclave": enclave}) if row.name == "head"), None)
    return (row.count, row.count * row.mean) if row else (0, 0.0)


@click.command()
@click.option("--models", default="gpt2,llama", show_default=True, help=f"Of {', '.join(SUBJECTS)}.")
@click.option("--presets", default="paper,hardened", show_default=True)
@click.option("--streams", default="1,16", show_default=True, help=f"At most {SLOTS}.")
@click.option("--rounds", type=click.IntRange(1), help="Of every cell.  [default: 8 with one stream, 4 with more]")
@click.option("--prompt-tokens", type=click.IntRange(2), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of every model.  [default: all cores but one]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--quick", is_flag=True, help="A smoke run: the demo model, few tokens, one round; proves nothing.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=DOCS, help="Where results go.")
def main(
    models: str,
    presets: str,
    streams: str,
    rounds: int | None,
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
    seed: int,
    quick: bool,
    out: Path,
) -> None:
    """Measure, print a table, and write latency.md and latency.json."""
    facts = machine.here()
    if quick:
        models, streams, rounds, prompt_tokens, new_tokens = "demo", "1,4", rounds or 1, 16, 24
    counts = tuple(_counts(streams))
    plan = Plan(
        subjects=tuple(SUBJECTS[name] for name in _chosen("models", models, list(SUBJECTS))),
        presets=tuple(_chosen("presets", presets, list(WITHOUT_HEAD))),
        streams=counts,
        rounds={count: rounds or (8 if count == 1 else 4) for count in counts},
        prompt=prompt_tokens,
        tokens=new_tokens,
        threads=threads or max(1, facts.cores - 1),
        seed=seed,
        hop_trips=4 if quick else 64,
    )
    needed = max(counts) * -(-prompt_tokens // EngineSettings().prefill_chunk) + STEADY
    if new_tokens < needed:
        # While prompts are computed, chunk by chunk, the streams that began before have a token for each chunk.
        raise click.BadParameter(
            f"{new_tokens}; with these streams and prompts at least {needed}", param_hint="--new-tokens"
        )
    began = time.monotonic()
    columns = (TextColumn("{task.description:<52}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bench = Bench(plan, progress)
        measured = [bench.measure(subject) for subject in plan.subjects]
    results = Results(
        command=shlex.join(["python", "-m", "benchmarks.latency", *sys.argv[1:]]),
        machine=facts,
        seed=seed,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=plan.threads,
        models=measured,
        seconds=time.monotonic() - began,
    )
    report.write(results, out)
    report.show(results)
    click.echo(f"written to {out / report.PAGE} and {report.DATA}", err=True)


def _chosen(option: str, text: str, known: list[str]) -> list[str]:
    chosen = [name.strip() for name in text.split(",")]
    if unknown := set(chosen) - set(known):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; known: {', '.join(known)}", param_hint=f"--{option}")
    return chosen


def _counts(text: str) -> list[int]:
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= count <= SLOTS for count in counts):
        raise click.BadParameter(f"{text}; numbers from 1 to {SLOTS}", param_hint="--streams")
    return counts


if __name__ == "__main__":
    main()
