"""`make audit`: how much the bundled model leaks under every preset, measured on traffic of a real run.

`python -m stip_stack.audit` protects, starts every part, records what the model servers see, and runs
`stip-keyservice audit` on each instance.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from stip_protocol.documents import explain
from stip_protocol.errors import Action, ConfigurationError, StipError
from stip_protocol.leakage import REPORT_NAME

if TYPE_CHECKING:
    from stip_keyservice.audit.document import Report
    from stip_stack.cases import Case, Place, Tell

NAMES = ("paper", "hardened", "throughput", "derived-paper", "derived-hardened")
EXIT_FAILED, EXIT_INPUT, EXIT_OTHER_DIGEST, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 3, 130, 143
WIDTH = 118
"""Columns where the output is no terminal."""

EPILOG = """\b
Cases:
  paper, hardened, throughput      the bundled model, which counts as private
  derived-paper, derived-hardened  a fine-tune of it, for which the bundled model is the public base

\b
What OUT holds at the end:
  index.html, leakage.md  all cases beside each other, for people
  <case>/leakage.json     one report each, canonical: the same findings are the same bytes
  home, derived, instances, recordings
                          keys, a tuned model, protected models, and what servers saw of a real run;
                          private: whoever has them reads everything. Used again by the next run

\b
Examples:
  make audit
  make audit AUDIT_ARGS="--quick --case hardened"
  python -m stip_stack.audit --seed 7 --out /tmp/audit --fresh

\b
Exit codes:
  0         every audit ran; what was found is in the report, and no finding is a failure
  1         another failure
  2         the input or the configuration is refused
  3         an audit of the same instance, traffic and seed found something else than the last one: other code,
            or a fault
  130, 143  stopped by Ctrl-C or SIGTERM
"""


@dataclass(frozen=True)
class Outcome:
    """What one case's audit gave."""

    report: Report
    digest: str
    """SHA-256 of `leakage.json`, in hexadecimal."""

    @classmethod
    def read(cls, path: Path) -> Outcome:
        from stip_keyservice.audit.document import Report

        data = path.read_bytes()
        try:
            return cls(Report.from_json(data), hashlib.sha256(data).hexdigest())
        except ValidationError as error:
            raise ConfigurationError(f"{path}: no report of an audit: {explain(error)}") from None

    def repeats(self, before: Outcome | None) -> bool:
        """Whether `before` was found under the same conditions: the digests are to be the same then."""
        if before is None:
            return False
        now, then = self.report, before.report
        return (now.subject, now.traffic, now.seed, now.versions) == (
            then.subject, then.traffic, then.seed, then.versions
        )  # fmt: skip

    def differs(self, before: Outcome | None) -> bool:
        """Whether that was something else under the same conditions."""
        return before is not None and self.repeats(before) and self.digest != before.digest


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("build/audit"),
              show_default=True, help="Folder for the report and for what it was made from.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**30 - 1), default=0, show_default=True,
              help="Seed of what is said and of every attack. Keys are never drawn from it.")  # fmt: skip
@click.option("--case", "names", type=click.Choice(NAMES), multiple=True,
              help="Audit this one alone; may be given several times.  [default: all]")  # fmt: skip
@click.option("--quick", is_flag=True,
              help="Little text: shows in a few minutes that everything runs. The figures say little.")  # fmt: skip
@click.option("--fresh", is_flag=True,
              help="Remove what OUT holds first: other keys, another run, and so other digests.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True,
              help="Audits that run side by side, each on one core.")  # fmt: skip
def main(out: Path, seed: int, names: tuple[str, ...], quick: bool, fresh: bool, workers: int) -> None:
    """Protect the bundled model under every preset, serve it, record what its servers see, and attack it.

    Each attacker gets what its row of the matrix grants. The report says what it found beside what anybody would
    guess, as plainly where a preset fails as where it holds.
    """
    # Read by torch when it loads, here and in every process that is started: what runs side by side is processes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from stip_stack.cases import CASES, Place  # torch and transformers load here, not for --help

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    cases = [case for case in CASES.values() if case.name in (names or NAMES)]
    place = Place(out.absolute(), "quick" if quick else "default", seed, workers)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        place.claim()
        if fresh:
            clear(place)
        raise SystemExit(run(place, cases, console))
    except StipError as error:
        click.echo(f"audit: {error} ({error.action})", err=True)
        raise SystemExit(EXIT_INPUT if error.action is Action.FIX_CONFIGURATION else EXIT_FAILED) from None
    except KeyboardInterrupt:
        click.echo("audit: interrupted; every process was stopped, and what was finished is used again", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """As an exception, so that a running stack ends and its folder goes, which has a copy of the keys."""
    raise SystemExit(EXIT_TERMINATED)


def clear(place: Place) -> None:
    """Remove what an earlier run made, or left when it was killed."""
    from stip_stack.cases import STACK

    made = [place.out / name for name in ("home", "derived", "instances", "recordings", *NAMES)]
    for folder in (*made, *place.out.glob(f"{STACK}*")):
        shutil.rmtree(folder, ignore_errors=True)


def run(place: Place, cases: Sequence[Case], console: Console) -> int:
    """The exit status. Raises `StipError`."""
    began = time.monotonic()

    def tell(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:4.0f} s[/]  {line}")

    if any(case.model == "derived" for case in cases):
        place.derive(tell)
    place.protect(cases, tell)
    place.record(cases, tell)
    before = outcomes(place, cases)
    _audit(place, cases, tell)
    after = outcomes(place, cases)
    console.print(_table(after, before))
    console.print("[dim]cells: measured, of all; above: of those, found more than anybody would guess[/]")
    console.print(str(place.out / "index.html"), soft_wrap=True)
    other = [name for name, outcome in after.items() if outcome.differs(before.get(name))]
    if other:
        console.print(
            f"[bold red]{', '.join(other)}: the last audit of the same instance, traffic and seed had another digest. "
            "Either the code is another, or it does not repeat itself."
        )
    return EXIT_OTHER_DIGEST if other else 0


def outcomes(place: Place, cases: Sequence[Case]) -> dict[str, Outcome]:
    """What lies in the folder, by case. Raises `ConfigurationError` for what is no report."""
    files = {case.name: place.out / case.name / REPORT_NAME for case in cases}
    return {name: Outcome.read(path) for name, path in files.items() if path.exists()}


def _audit(place: Place, cases: Sequence[Case], tell: Tell) -> None:
    """Each case by the real command, then one page over all of them."""
    from stip_stack.processes import run as run_to_its_end
    from stip_stack.processes import run_side_by_side
    from stip_stack.stack import BIN

    keyservice = str(BIN / "stip-keyservice")
    commands = {}
    for case in cases:
        base = place.base(case)
        commands[case.name] = [
            keyservice, "audit", str(place.instance(case)), "--model", str(place.model(case.model)),
            *(["--base", str(base)] if base is not None else []),
            "--recording", str(place.recording(case)), "--seed", str(place.seed), "--scale", place.scale,
            "--origin", place.origin(case), "--out", str(place.out / case.name), "--home", str(place.home.path),
            "--quiet",
        ]  # fmt: skip
    tell(f"auditing {', '.join(commands)}: {place.workers} at once")
    run_side_by_side(commands, at_once=place.workers, ended=lambda name, took: tell(f"audited {name} ({took:.0f} s)"))
    reports = [str(place.out / case.name / REPORT_NAME) for case in cases]
    run_to_its_end([keyservice, "leakage-report", *reports, "--out", str(place.out)])


def _table(after: Mapping[str, Outcome], before: Mapping[str, Outcome]) -> Table:
    """Cells: measured, of all. Above: found more than anybody would guess, beyond both intervals."""
    from stip_keyservice.audit.report.judging import Level, judge
    from stip_keyservice.audit.report.judging import main as standing

    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for name in ("case", "cells", "above", "SHA-256 of leakage.json", ""):
        table.add_column(name, no_wrap=True)
    for name, outcome in after.items():
        measured = [cell for cell in outcome.report.cells if cell.metrics]
        above = [cell for cell in measured if (metric := standing(cell)) is not None and judge(metric) >= Level.SOME]
        said = "DIFFERS" if outcome.differs(before.get(name)) else ""
        if outcome.repeats(before.get(name)) and not said:
            said = "as before"
        table.add_row(name, f"{len(measured)}/{len(outcome.report.cells)}", str(len(above)), outcome.digest, said)
    return table


if __name__ == "__main__":
    main()
