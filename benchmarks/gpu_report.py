"""Results of `benchmarks.gpu`, for people (gpu.md) and for programs (gpu.json)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import markdown, milliseconds
from benchmarks.serving.records import Record
from benchmarks.verdict import Verdict

PAGE, DATA = "gpu.md", "gpu.json"


class Timing(Record):
    """One arm at one batch size."""

    arm: str
    seconds: float
    """Of a step: of one token of every session. Median."""
    over_plain: float
    same: float
    """Share of its tokens that are the plain loop's; the texts go apart at the first near tie that rounding decides."""


class Batch(Record):
    size: int
    control: float
    """The plain loop's second run over its first."""
    timings: list[Timing]
    target: float | None = None
    """Seconds of a step with recorded steps."""
    verdict: Verdict | None = None


class Results(Record):
    command: str
    machine: dict[str, Any]
    device: str
    shape: str
    context: int
    steps: int
    rounds: int
    weights: int
    """Bytes that a step reads."""
    bandwidth: float
    """Bytes a second of a copy on the device, read and written counted."""
    floor: float
    """weights / bandwidth."""
    batches: list[Batch]


def write(results: Results, folder: Path) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DATA).write_text(results.model_dump_json(indent=1, exclude_none=True) + "\n")
    (folder / PAGE).write_text(page(results))


def page(results: Results) -> str:
    """gpu.md."""
    machine = results.machine
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    facts = [
        ("device", results.device),
        ("machine", f"{machine['cores']} cores, {machine['cpu']}, {machine['memory_gib']} GiB, {machine['system']}"),
        ("versions", f"Python {machine['python']}, {versions}"),
        ("commit", machine["commit"]),
        ("command", f"`{results.command}`"),
        (
            "model",
            f"the shape of {results.shape}, random weights in bfloat16, {results.weights / 1e9:.2f} GB read a step",
        ),
        ("tokens", f"{results.context} of prompt, {results.steps} new, a session and round; {results.rounds} rounds"),
        ("copy", f"{results.bandwidth / 1e9:.0f} GB/s, read and written"),
        ("floor", f"{milliseconds(results.floor)} ms: the weights once, at that rate"),
    ]
    return "\n".join([
        "# Steps on a GPU\n\nWritten by `python -m benchmarks.gpu`; do not edit. The same in numbers: "
        f"[{DATA}]({DATA}).\n",
        markdown(("", ""), facts),
        "*transformers* is the loop that `generate` runs: ids in, the largest logit out, a growing cache. *engine* is "
        "a step of the model server: rows from the host in, the 64 largest logits out. Its weights may be protected "
        "or not: shapes and kernels are the same. In every round each arm runs once, in random order; *control* is the "
        "loop's second run over its first, and outside 1 ± 0.02 it makes a verdict *inconclusive*. Milliseconds a step "
        "(one token of every session), medians.\n",
        table(results),
    ])  # fmt: skip


def table(results: Results) -> str:
    """A row a batch size."""
    arms = [timing.arm for timing in results.batches[0].timings]
    rows = []
    for batch in results.batches:
        found = {timing.arm: timing for timing in batch.timings}
        cells = [f"{milliseconds(found[arm].seconds)} ({found[arm].over_plain:.3f})" for arm in arms]
        best = min(timing.seconds for timing in batch.timings)
        judged = "" if batch.target is None else f"**{batch.verdict}** (≤ {milliseconds(batch.target)} with graphs)"
        same = ", ".join(f"{found[arm].same:.0%}" for arm in arms[2:])
        floors = f"{best / results.floor:.2f}"
        rows.append((str(batch.size), *cells, floors, f"{batch.size / best:.0f}", f"{batch.control:.3f}", same, judged))
    header = ("batch", *(f"{arm} (over plain)" for arm in arms), "best over floor", "tokens/s at best", "control",
              "same tokens (engine)", "verdict")  # fmt: skip
    return markdown(header, rows)
