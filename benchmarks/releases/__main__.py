"""`make bench-releases`: measures, and writes docs/benchmarks/releases.{md,json}."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks import machine
from benchmarks.releases import load, place
from benchmarks.report import load as load_average
from benchmarks.report import markdown, milliseconds
from stip_protocol.runtime import loop

DOCS = machine.ROOT / "docs" / "benchmarks"
AIM_PER_SECOND, AIM_P99 = 200.0, 0.025


@click.command()
@click.option("--rounds", default=4, show_default=True, help="A/A: the same again; the spread is the noise.")
@click.option("--seconds", default=10.0, show_default=True, help="Of a round.")
@click.option("--streams", default="1,2,4", show_default=True, help="Enclaves that ask at once, each in turn.")
@click.option("--customers", default=64, show_default=True, help="Users with an instance each.")
@click.option(
    "--home-toml", type=click.Path(path_type=Path, exists=True), help="A home.toml with a PostgreSQL database."
)
@click.option("--out", type=click.Path(path_type=Path), default=DOCS, show_default=False, help="Folder of the results.")
def main(rounds: int, seconds: float, streams: str, customers: int, home_toml: Path | None, out: Path) -> None:
    """Releases a second on one core of the key service, the load generator on the other."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise click.UsageError("needs two cores: one for the service, one for the load generator")
    here = machine.here()
    with tempfile.TemporaryDirectory(prefix="stip-releases-") as folder:
        database = "SQLite" if home_toml is None else "PostgreSQL"
        made = place.make(
            Path(folder) / "place", customers=customers, home_toml=None if home_toml is None else home_toml.read_text()
        )
        sync = _fsync_seconds(Path(folder))
        os.sched_setaffinity(0, {cores[1]})
        measured: list[dict[str, Any]] = []
        with place.serving(made, core=cores[0]) as service:
            for number in range(rounds):
                for wanted in (int(each) for each in streams.split(",")):
                    found = loop.run(load.run(made, service, streams=wanted, seconds=seconds))
                    measured.append(_record(number, wanted, found))
                    click.echo(json.dumps(measured[-1]))
    document = {"machine": asdict(here), "database": database, "fsync_seconds": sync, "rounds": measured}
    out.mkdir(parents=True, exist_ok=True)
    name = "releases" if home_toml is None else "releases-postgresql"
    (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / f"{name}.md").write_text(_page(document))
    click.echo(f"wrote {out / name}.md and .json")


def _record(number: int, streams: int, found: load.Round) -> dict[str, Any]:
    return {
        "round": number,
        "streams": streams,
        "seconds": round(found.seconds, 3),
        "releases": found.releases,
        "per_second": round(found.per_second, 1),
        "cpu_ms_per_release": round(1e3 * found.cpu_per_release, 3),
        "per_core_second": round(found.per_core_second, 1),
        "p50_ms": round(1e3 * found.quantile(0.5), 2),
        "p99_ms": round(1e3 * found.quantile(0.99), 2),
    }


def _fsync_seconds(folder: Path) -> float:
    """Median of writing and syncing a page where the database lies: what every decision waits for."""
    taken = []
    with (folder / "sync").open("wb") as file:
        for _ in range(50):
            file.write(bytes(4096))
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _page(document: dict[str, Any]) -> str:
    here, rounds = document["machine"], document["rounds"]
    rows = []
    for streams in sorted({each["streams"] for each in rounds}):
        mine = [each for each in rounds if each["streams"] == streams]

        def spread(name: str, mine: list[dict[str, Any]] = mine) -> str:
            values = [each[name] for each in mine]
            return f"{statistics.median(values):g} ({min(values):g} to {max(values):g})"

        names = ("per_second", "cpu_ms_per_release", "per_core_second", "p50_ms", "p99_ms")
        rows.append([str(streams), str(len(mine)), *(spread(name) for name in names)])
    header = (
        "streams", "rounds", "releases a second", "CPU ms a release", "a second of CPU", "p50 ms", "p99 ms",
    )  # fmt: skip
    best = max(
        statistics.median([each["per_second"] for each in rounds if each["streams"] == s])
        for s in {r["streams"] for r in rounds}
    )
    sync = milliseconds(document["fsync_seconds"])
    return f"""# Releases a second

A complete release: a challenge, and the release of a sealed bundle for it, with evidence verified (quote, collateral,
certificates, revocation lists), the delegation checked, the budget debited, the lease and the audit entry written in
one transaction that is on the disk, the bundle sealed and signed. The service has one core,
the load generator the other; the generator opens every bundle. Made by `make bench-releases`.

- database: {document["database"]}; a synced write of 4 KiB on this disk takes {sync} ms
- machine: {here["cpu"]}, {here["cores"]} cores, {here["system"]}, Python {here["python"]}
- commit: {here["commit"]}; load average before the run: {load_average(here["load_before"])}

{markdown(header, rows)}
Medians over A/A rounds, the least and the most in brackets. *CPU ms a release* is the service's own CPU time (user and
kernel, all threads); *a second of CPU* is its inverse, what a core does that is not shared with anybody and never waits
for the disk. The time of a release is that of its two calls, without the enclave's own work between them.

Aim: at least {AIM_PER_SECOND:g} a second a core, p99 at most {AIM_P99 * 1e3:g} ms. Best median measured here: {best:g}
a second.
"""


if __name__ == "__main__":
    main()
