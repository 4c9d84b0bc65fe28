"""serving.md: the parts, for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

from benchmarks.report import load, markdown, milliseconds
from benchmarks.serving import plots
from benchmarks.serving.records import Cell, Interval, Measure, Memory, Part, Stages
from benchmarks.verdict import CONTROL_SPREAD

PAGE = "serving.md"
HOP_TARGET = 0.0003
MIB = 1 << 20

METHOD = """\
## What is compared with what

- **protected**: the client (`stip`), an enclave (simulated evidence), the gateway and a model server, each a process
  of its own on this machine, over TLS. Times are taken in the client, where a token arrives.
- **plain**: the same engine class (`stip_server.engines.transformers.TransformersEngine`, same slots, threads and
  gather window) with the plain weights, in a process of its own, called directly: its caller answers every output at
  once with the next row, without any serialization. This is the fastest that this engine can be used. For `throughput`
  it decodes alone; served by vLLM, plain is vLLM's `AsyncLLM` on the plain checkpoint, called directly.
- A run has two turns on the same prompts (random ids). In the first all prompts depart together and each stream has
  one token: **time to first token**, with several streams mostly the wait for the other prompts. In the second every
  stream decodes: **time per token** is between two tokens of a stream, while every stream decodes.
- In every round each arm runs once, in random order. The plain arm runs twice a round; **control** is the second over
  the first: two measurements of the same thing. Where it lies outside 1 ± 0.02 it says *inconclusive*, and so does the
  verdict, whatever the ratio.
- Numbers are ratios of medians over all rounds (a run before them warms up), with the central 95 % of a bootstrap over
  rounds in brackets. `added` is the difference of the medians. Times are in milliseconds.
- `hardened` has head and sampling in the enclave. *ratio* holds the whole against the whole plain model (a head on both
  sides, on the same kind of core here). *without head* takes the enclave's measured head time off and holds the rest
  against plain's base model alone; the verdict is on this one. In production the plain head would run on a GPU and the
  enclave's on a CPU: there the head's time is what is added.
- Models have random weights. Greedy tokens are held against the plain arm's up to the first difference (*same*):
  random weights leave many near ties, which rounding decides in bfloat16, and one early difference makes the rest
  another text.
"""
COLUMNS = ("plain", "protected", "added", "p95", "ratio", "control")


def write(parts: Mapping[str, Part], folder: Path) -> None:
    """The page, and its plots beside the parts."""
    drawn = plots.write(parts, folder / "serving")
    (folder / PAGE).write_text(page(parts, drawn))


def page(parts: Mapping[str, Part], drawn: Mapping[str, list[str]]) -> str:
    """Markdown. `drawn` names the plots of each section, relative to the page."""
    text = [
        "# Serving: protected over plain\n\nWritten by `make bench`; do not edit. The same in numbers: "
        + ", ".join(f"[{name}](serving/{name}.json)" for name in parts)
        + ".\n",
        _provenance(parts),
        METHOD,
        _verdicts(parts),
    ]
    for name, part in parts.items():
        title, render = RENDERERS[name]
        text.append(f"## {title}\n")
        text += [f"![{title}]({plot})\n" for plot in drawn.get(name, [])]
        text += render(part)
        if part.missing:
            text.append("Not measured:\n\n" + "".join(f"- {what}\n" for what in part.missing))
    return "\n".join(text)


def _provenance(parts: Mapping[str, Part]) -> str:
    rows = []
    for name, part in parts.items():
        machine = part.machine
        versions = ", ".join(f"{package} {number}" for package, number in machine.versions.items())
        rows.append((
            name,
            f"{machine.cores} cores, {machine.cpu}, {machine.memory_gib} GiB, {machine.system}",
            load(machine.load_before),
            f"Python {machine.python}, {versions}",
            machine.commit,
            f"`{part.command}`",
            f"{part.threads}",
            f"{part.seconds / 60:.1f}",
        ))  # fmt: skip
    header = ("section", "machine", "load before", "versions", "commit", "command", "threads a model", "minutes")
    return markdown(header, rows)


def _verdicts(parts: Mapping[str, Part]) -> str:
    rows = [_verdict(name, cell, what, measure) for name, cell, what, measure in _judged(parts)]
    header = ("section", *WHO, "prompt", "time to", "ratio", "control", "target", "verdict")
    return "## Verdicts\n\n" + markdown(header, rows) if rows else ""


def _judged(parts: Mapping[str, Part]) -> Iterator[tuple[str, Cell, str, Measure]]:
    for name, part in parts.items():
        for cell in part.cells:
            for what, measure in (("token", cell.token), ("first token", cell.first)):
                if measure.target is not None:
                    yield name, cell, what, measure


def _verdict(section: str, cell: Cell, what: str, measure: Measure) -> tuple[str, ...]:
    return (
        section,
        *_who(cell),
        str(cell.prompt),
        f"{what} without head" if measure.served else what,
        _interval(measure.served or measure.ratio),
        _control(measure),
        f"≤ {measure.target:.2f}",
        f"**{measure.verdict}**",
    )


WHO = ("model", "dtype", "preset", "engine", "streams")


def _who(cell: Cell) -> tuple[str, ...]:
    return cell.model, cell.dtype, cell.arm, cell.engine, str(cell.streams)


def _measured(measure: Measure) -> tuple[str, ...]:
    return (
        milliseconds(measure.plain),
        milliseconds(measure.protected),
        milliseconds(measure.added),
        milliseconds(measure.p95),
        _interval(measure.ratio),
        _control(measure),
    )


def _token_table(part: Part) -> str:
    header = (*WHO, "prompt", *COLUMNS, "tokens/s", "plain tokens/s", "same", "rounds")
    rows = [
        (
            *_who(cell),
            str(cell.prompt),
            *_measured(cell.token),
            f"{cell.rate:.1f}",
            f"{cell.plain_rate:.1f}",
            f"{cell.same:.1%}",
            str(cell.rounds),
        )
        for cell in part.cells
    ]
    return "### Time per token, tokens a second\n\n" + markdown(header, rows)


def _first_table(part: Part) -> str:
    header = (*WHO, "prompt", *COLUMNS, "rounds")
    rows = [(*_who(cell), str(cell.prompt), *_measured(cell.first), str(cell.rounds)) for cell in part.cells]
    return "### Time to first token\n\n" + markdown(header, rows)


def _head_table(part: Part) -> str:
    rows = [
        (*_who(cell), str(cell.prompt), what, milliseconds(measure.protected), milliseconds(measure.head),
         milliseconds(measure.base), _interval(measure.served))
        for cell in part.cells
        for what, measure in (("token", cell.token), ("first token", cell.first))
        if measure.served is not None
    ]  # fmt: skip
    header = (*WHO, "prompt", "time to", "protected", "of it the head", "plain base", "without head")
    return "### `hardened` without its head\n\n" + markdown(header, rows) if rows else ""


def _stages(found: Stages) -> str:
    rows = [
        (row.part, row.name, str(row.count), milliseconds(row.mean), _bound(row.p50), _bound(row.p95), row.help)
        for row in found.rows
    ]
    added = found.hop_through - found.hop_straight
    return (
        f"### Stages, {found.title}\n\nFrom the parts' own `/metrics` after all of the above (quantiles are bounds of "
        "buckets; all numbers of streams together; the server of the first preset).\n\n"
        + markdown(("part", "stage", "count", "mean", "p50", "p95", "what"), rows)
        + f"\nGateway hop (p50 of {found.hop_trips} round trips of one row, less the replica's compute and queue, in "
        f"turns straight to the server and through the gateway): {found.hop_straight * 1e3:.2f} and "
        f"{found.hop_through * 1e3:.2f} ms, so **{added * 1e3:.2f} ms** for the gateway, both directions together "
        f"(target ≤ {HOP_TARGET * 1e3:.1f}).\n"
    )


def _tokens(part: Part) -> list[str]:
    return [_token_table(part), _first_table(part), _head_table(part), *map(_stages, part.stages)]


def _prefill(part: Part) -> list[str]:
    return [_first_table(part), _head_table(part)]


def _throughput(part: Part) -> list[str]:
    return [_token_table(part), _first_table(part)]


def _delay(part: Part) -> list[str]:
    rows = []
    for cell in part.cells:
        near = next(each for each in part.cells if _line(each) == _line(cell) and each.delay == 0)
        rows.append((
            *_who(cell), f"{cell.delay * 1e3:g}",
            milliseconds(cell.token.plain), milliseconds(cell.token.protected), milliseconds(cell.token.added),
            _round_trips(cell, cell.token, near.token), milliseconds(cell.first.added),
            _round_trips(cell, cell.first, near.first), _control(cell.token), str(cell.rounds),
        ))  # fmt: skip
    header = (*WHO, "delay", "plain token", "protected token", "added", "round trips", "added to the first token",
              "round trips of it", "control", "rounds")  # fmt: skip
    text = (
        "The delay is one way, between enclave and gateway; a round trip takes two. Plain decodes step by step, "
        "without a link. `round trips` is what a delay adds over the same link at 0 ms, divided by its round trip. The "
        "link passes the delaying proxy at 0 ms, too.\n"
    )
    return [text, markdown(header, rows)]


def _line(cell: Cell) -> tuple[object, ...]:
    return cell.model, cell.arm, cell.streams, cell.prompt


def _round_trips(cell: Cell, far: Measure, near: Measure) -> str:
    return f"{(far.protected - near.protected) / (2 * cell.delay):.2f}" if cell.delay else ""


def _drafting(part: Part) -> list[str]:
    rows = [
        (cell.model, cell.dtype, cell.arm, f"{cell.delay * 1e3:g}", milliseconds(cell.token.plain),
         milliseconds(cell.token.protected), _interval(cell.token.ratio), _control(cell.token),
         f"{1 / cell.token.ratio.value:.2f}", f"{cell.same:.1%}", str(cell.rounds))
        for cell in part.cells
    ]  # fmt: skip
    header = ("model", "dtype", "text", "delay", "without drafts", "with drafts", "ratio", "control", "times as fast",
              "same", "rounds")  # fmt: skip
    text = (
        "One stream, preset `paper`, up to 7 tokens guessed a round trip from repetition in the text. Times are the "
        "mean over a stream: tokens that were guessed right come together. *repetitive*: a repeating prompt and greedy "
        "answers, the best case; *random*: random ids and sampled answers, where nothing can be guessed. *same* "
        "compares the tokens with and without drafts.\n"
    )
    return [text, markdown(header, rows)]


def _memory(part: Part) -> list[str]:
    text = (
        "MiB. PSS divides pages that processes share among them, so that it adds up; a part's children are included. "
        "One stack serves both presets; the plain engine runs beside it.\n"
    )
    parts = [text]
    for model, rows in groupby(part.memory, key=lambda each: each.model):
        found = list(rows)
        states = list(dict.fromkeys(row.state for row in found))
        header = ("part", *(f"PSS {state}" for state in states), "RSS", "descriptors", "threads")
        names = dict.fromkeys(row.part for row in found)
        parts.append(f"### {model}\n\n" + markdown(header, [_held(name, states, found) for name in names]))
    return parts


def _held(name: str, states: list[str], rows: list[Memory]) -> tuple[str, ...]:
    own = {row.state: row for row in rows if row.part == name}
    last = own[states[-1]]
    held = (f"{own[state].pss / MIB:.0f}" for state in states)
    return (name, *held, f"{last.rss / MIB:.0f}", str(last.fds), str(last.threads))


def _curves(part: Part) -> list[str]:
    cells = [cell for cell in part.cells if cell.axis is not None and cell.at is not None]
    rows = [
        (cell.axis or "", f"{cell.at:g}", cell.arm, milliseconds(cell.token.plain), milliseconds(cell.token.protected),
         milliseconds(cell.token.added), _interval(cell.token.ratio), milliseconds(cell.first.added),
         _interval(cell.first.ratio), _control(cell.token), str(cell.rounds))
        for cell in sorted(cells, key=lambda cell: (cell.axis or "", cell.arm, cell.at or 0))
    ]  # fmt: skip
    header = ("axis", "value", "preset", "plain token", "protected token", "added", "ratio", "added to the first token",
              "ratio of it", "control", "rounds")  # fmt: skip
    text = (
        "Llamas with random float32 weights; one variable at a time, the others at vocabulary 8,192, width 256, "
        "depth 4, 1 stream, 64 tokens of prompt (quick runs use less). *prompt* is the context. Times are the mean "
        "over a stream.\n"
    )
    return [text, markdown(header, rows)]


def _interval(value: Interval | None) -> str:
    return "" if value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _control(measure: Measure) -> str:
    """With a word where it proves that the machine was not quiet: no ratio beside it proves anything then."""
    quiet = abs(measure.control.value - 1) <= CONTROL_SPREAD
    return _interval(measure.control) + ("" if quiet else " *inconclusive*")


def _bound(seconds: float | None) -> str:
    return "beyond the last" if seconds is None else f"≤ {milliseconds(seconds)}"


RENDERERS: Mapping[str, tuple[str, Callable[[Part], list[str]]]] = {
    "tokens": ("Tokens, by streams", _tokens),
    "prefill": ("Prefill", _prefill),
    "throughput": ("`throughput`: the server decodes alone", _throughput),
    "delay": ("Link delay", _delay),
    "drafting": ("Drafting", _drafting),
    "memory": ("Memory", _memory),
    "curves": ("How the cost grows", _curves),
}
"""Title and text of each section."""
