"""Results for people (latency.md, a table on the terminal) and for programs (latency.json)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.ratios import Ratio
from benchmarks.results import Comparison, Measure, ModelResult, Results

PAGE, DATA = "latency.md", "latency.json"
BUSY = 0.5
HOP_TARGET = 0.0003
TOKEN_HEAD = ("model", "preset", "streams", "plain", "protected", "added", "p95", "ratio", "control", "target", "met")

METHOD = """\
## What is compared with what

- **protected**: the client (`stip`), an enclave (simulated evidence), the gateway and a model server, each a process
  of its own on this machine, over TLS. Times are taken in the client, where a token arrives.
- **plain**: the same engine class (`stip_server.engines.transformers.TransformersEngine`, same slots, threads and
  gather window) with the plain weights, in a process of its own, called directly: its caller answers every output at
  once with the next row, without any serialization. It computes base model, head, the 64 largest logits and the
  log-sum-exp; the caller takes the largest. This is the fastest that this engine can be used.
- In every round each arm runs once, in random order, on the same prompts (random ids). The plain arm runs twice a
  round; **control** is the second over the first: two measurements of the same thing. A ratio within the control's
  interval is no difference.
- Numbers are ratios of medians over all rounds (a round before them warms up), with the central
  95 % of a bootstrap over rounds in brackets.
- **Time per token** is the time between two tokens of a stream while every stream decodes. **Time to first token**
  is from the prompt's departure to its first token; sessions are open before. With several streams all prompts depart
  at the same moment, so that most of it is the wait for the other prompts.
- `paper`: head on the server, so the plain arm does the same work.
- `hardened`: head and sampling in the enclave. *ratio* holds the whole against the whole plain model (a head on both
  sides, on the same kind of core here). *without head* takes the enclave's measured head time off and holds the rest
  against plain's base model alone; the target is for this one. In production the plain head would run on a GPU and the
  enclave's on a CPU: there the head's time is what is added.
"""


def write(results: Results, folder: Path) -> None:
    """Both files, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(_finite(dataclasses.asdict(results)), indent=2, allow_nan=False)
    (folder / DATA).write_text(data + "\n")
    (folder / PAGE).write_text(page(results))


def show(results: Results) -> None:
    """The time per token, on stdout."""
    table = Table(title="Time per token, protected over plain", title_justify="left", box=None)
    for name in TOKEN_HEAD:
        table.add_column(name, justify="left" if name in ("model", "preset") else "right")
    for model in results.models:
        for each in model.comparisons:
            table.add_row(*_row(model, each, each.token))
    Console().print(table)


def page(results: Results) -> str:
    """latency.md."""
    machine = results.machine
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    facts = [
        ("machine", f"{machine.cores} cores, {machine.cpu}, {machine.memory_gib} GiB, {machine.system}"),
        ("load before the run", _load(machine.load_before)),
        ("versions", f"Python {machine.python}, {versions}"),
        ("commit", machine.commit),
        ("command", f"`{results.command}`"),
        ("seed", str(results.seed)),
        ("tokens", f"{results.prompt_tokens} of prompt, up to {results.new_tokens} new, a stream"),
        ("threads", f"{results.threads} for each model (server, enclave's head, direct engine alike)"),
        ("duration", f"{results.seconds / 60:.1f} minutes"),
    ]
    parts = [
        "# Latency: protected over plain\n\nWritten by `make bench`; do not edit. The same in numbers: "
        f"[{DATA}]({DATA}).\n",
        markdown(("", ""), facts),
        METHOD,
    ]
    for title, what in (("Time per token", "token"), ("Time to first token", "first")):
        rows = [_row(model, each, getattr(each, what)) for model in results.models for each in model.comparisons]
        parts.append(f"## {title}\n\nMilliseconds.\n\n" + markdown(TOKEN_HEAD, rows))
    parts.append(_head_section(results))
    parts.append(_answers(results))
    parts.extend(_stages(model) for model in results.models)
    return "\n".join(parts)


def _row(model: ModelResult, each: Comparison, measure: Measure) -> tuple[str, ...]:
    target, met = ("", "") if measure.target is None else (f"≤ {measure.target:.2f}", _met(measure))
    return (
        model.name,
        each.preset,
        str(each.streams),
        _ms(measure.plain),
        _ms(measure.protected),
        _ms(measure.protected - measure.plain),
        _ms(measure.protected_p95),
        _ratio(measure.over_plain),
        _ratio(measure.control),
        f"{target} without head" if target and measure.head is not None else target,
        met,
    )


def _met(measure: Measure) -> str:
    assert measure.target is not None
    if measure.served.value <= measure.target:
        return "yes"
    return "no" if measure.served.low > measure.target else "no, within the interval"


def _head_section(results: Results) -> str:
    rows = [
        (model.name, str(each.streams), what, _ms(m.protected), _ms(m.head), _ms(m.base), _ratio(m.served), _target(m))
        for model in results.models
        for each in _with_head(model)
        for what, m in (("token", each.token), ("first token", each.first))
        if m.head is not None and m.base is not None
    ]
    header = ("model", "streams", "time to", "protected", "of it the head", "plain base", "without head", "met")
    return "## `hardened` without its head\n\nMilliseconds.\n\n" + markdown(header, rows) if rows else ""


def _with_head(model: ModelResult) -> list[Comparison]:
    return [each for each in model.comparisons if each.token.head is not None]


def _target(measure: Measure) -> str:
    return "" if measure.target is None else f"{_met(measure)} (≤ {measure.target:.2f})"


def _answers(results: Results) -> str:
    rows = [
        (model.name, model.dtype, each.preset, str(each.streams), str(each.rounds), f"{each.same:.1%}")
        for model in results.models
        for each in model.comparisons
    ]
    text = (
        "## The same answers\n\nGreedy tokens up to the first difference from the plain arm's, of all. Random weights "
        "leave many near ties, which rounding decides in bfloat16: there one early difference makes the rest another "
        "text, and each instance's certificate says whether its error is that of plain bfloat16.\n\n"
    )
    return text + markdown(("model", "dtype", "preset", "streams", "rounds", "same tokens"), rows)


def _stages(model: ModelResult) -> str:
    rows = [
        (row.part, row.name, str(row.count), _ms(row.mean), _bound(row.p50), _bound(row.p95), row.help)
        for row in model.stages
    ]
    hop = model.hop
    verdict = "yes" if hop.added <= HOP_TARGET else "no"
    text = (
        f"## Stages, {model.title}\n\nFrom the parts' own `/metrics` after all of the above (quantiles are bounds of "
        "buckets; milliseconds; one stream and several together; the server of the first preset).\n\n"
    )
    return (
        text
        + markdown(("part", "stage", "count", "mean", "p50", "p95", "what"), rows)
        + f"\nGateway hop (p50 of {hop.trips} round trips of one row, less the replica's compute and queue, in turns "
        f"straight to the server and through the gateway): {hop.straight * 1e3:.2f} and {hop.through * 1e3:.2f} ms, so "
        f"**{hop.added * 1e3:.2f} ms** for the gateway, both directions together (target ≤ {HOP_TARGET * 1e3:.1f}: "
        f"{verdict}).\n"
    )


def _finite(value: Any) -> Any:
    """JSON has no infinity; the bound of a histogram's last bucket is one, and becomes null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if value == math.inf else value


def _load(load: float) -> str:
    return f"{load}" if load <= BUSY else f"{load}: **not a quiet machine; read ratios and their controls only**"


def _bound(seconds: float) -> str:
    return "beyond the last" if seconds == math.inf else f"≤ {_ms(seconds)}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _ratio(value: Ratio) -> str:
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table, of cells that hold no `|`."""
    names = list(header)
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"
