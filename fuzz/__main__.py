"""`python -m fuzz`: every target for so many seconds, coverage-guided, and what each of them came to."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import click
import structlog

from fuzz.target import SECONDS, judge_closely
from fuzz.targets import TARGETS

ROOT = Path(__file__).parents[1]
TIMEOUT = round(2 * SECONDS)
RSS_MB = 2048
GRACE = 120
"""Seconds that a run may take beyond its time: to start, and to try its corpus again."""


@dataclass(frozen=True)
class Outcome:
    """One target's run."""

    name: str
    seconds: float
    runs: int
    edges: int
    corpus: int
    codes: Counter[str] = field(default_factory=Counter)
    """Outcomes of the corpus, replayed with memory measured."""
    findings: tuple[str, ...] = ()


def _fuzz(name: str, seconds: int, folder: Path) -> Outcome:
    target, corpus, found = TARGETS[name], folder / name / "corpus", folder / name / "findings"
    for path in (corpus, found):
        path.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    before = set(found.iterdir())
    began = time.monotonic()
    argv = [
        sys.executable, "-m", "fuzz.guided", name, f"-max_total_time={seconds}", f"-timeout={TIMEOUT}",
        f"-rss_limit_mb={RSS_MB}", f"-max_len={target.longest}", f"-artifact_prefix={found}/", "-print_final_stats=1",
        str(corpus),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        argv, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds + GRACE,
        check=False,
    )  # fmt: skip
    said = done.stderr
    (folder / name / "log").write_text(done.stdout + said)
    new = sorted(path.name for path in set(found.iterdir()) - before)
    findings = [f"{one}: {_cause(done.stdout + said)}" for one in new]
    if done.returncode != 0 and not new:
        findings.append(f"exit {done.returncode}: {said.strip().splitlines()[-1][:200] if said.strip() else 'no word'}")
    return Outcome(
        name,
        time.monotonic() - began,
        int(_last(r"stat::number_of_executed_units: (\d+)", said) or _last(r"^#(\d+)\s", said) or 0),
        int(_last(r"\bcov: (\d+)", said) or 0),
        len(list(corpus.iterdir())),
        findings=tuple(findings),
    )


def _last(pattern: str, text: str) -> str | None:
    found = re.findall(pattern, text, re.MULTILINE)
    return found[-1] if found else None


def _cause(said: str) -> str:
    """What atheris says of an uncaught exception, in one line."""
    after = said.partition("Uncaught Python exception")[2].strip("= :\n").splitlines()
    named = _last(r"SUMMARY: (.*)", said)
    return " ".join(after[:1])[:200] or (named or "see the log")[:200]


def _replayed(outcome: Outcome, folder: Path) -> Outcome:
    """The corpus once more, with time and memory measured closely: here, as signals need the main thread."""
    codes: Counter[str] = Counter()
    findings = list(outcome.findings)
    for path in sorted((folder / outcome.name / "corpus").iterdir()):
        try:
            codes[judge_closely(TARGETS[outcome.name], path.read_bytes())] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            findings.append(f"corpus/{path.name}: {type(error).__name__}: {error}"[:300])
    return Outcome(outcome.name, outcome.seconds, outcome.runs, outcome.edges, outcome.corpus, codes, tuple(findings))


def _page(outcomes: list[Outcome], seconds: int) -> str:
    rows = [
        f"| {one.name} | {one.runs:,} | {one.runs / max(one.seconds, 1):,.0f} | {one.edges:,} | {one.corpus:,} "
        f"| {len(one.codes)} | {len(one.findings)} |"
        for one in outcomes
    ]
    total = sum(one.runs for one in outcomes)
    findings = [f"- {one.name}: {finding}" for one in outcomes for finding in one.findings] or ["None."]
    return "\n".join(
        [
            "# Fuzzing, as run",
            "",
            f"Written by `make fuzz FUZZ_SECONDS={seconds}`: {len(outcomes)} targets, {seconds} s each,",
            f"{total:,} inputs in all.",
            "What is promised, and how to read this: [fuzzing](../fuzzing.md).",
            "",
            "| target | inputs | a second | edges | corpus | outcomes | findings |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "## Findings",
            "",
            *findings,
            "",
        ]
    )


@click.command()
@click.option("--seconds", type=click.IntRange(1), default=60, show_default=True, help="For each target.")
@click.option("--target", "names", multiple=True, type=click.Choice(sorted(TARGETS)), help="Only these.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True, help="At once.")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default=Path("build/fuzz"), show_default=True,
    help="Corpora, findings and logs; a corpus that is there is gone on from.",
)  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write the results to this page.")
def main(seconds: int, names: tuple[str, ...], jobs: int, folder: Path, report: Path | None) -> None:
    """Fuzz every reader of untrusted bytes. Exits 1 where something was found."""
    if find_spec("atheris") is None:
        raise click.UsageError("atheris is not installed: pip install -c constraints.txt -e '.[fuzz]'")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    folder = folder.absolute()
    chosen = list(names or TARGETS)
    outcomes = []
    with ThreadPoolExecutor(jobs) as pool:
        for outcome in pool.map(lambda name: _fuzz(name, seconds, folder), chosen):
            outcomes.append(_replayed(outcome, folder))
            done = outcomes[-1]
            click.echo(
                f"{done.name:22} {done.runs:>10,} inputs {done.edges:>6,} edges {done.corpus:>6,} in corpus "
                f"{len(done.findings):>3} findings"
            )
            for finding in done.findings:
                click.echo(f"    {finding}")
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(_page(outcomes, seconds))
    raise SystemExit(1 if any(one.findings for one in outcomes) else 0)


if __name__ == "__main__":
    main()
