"""What is written down: one part a section, in JSON, from which page and plots are made.

Times are seconds, memory bytes. A part says itself on which machine, by which command and from which commit it came,
because parts of one page may come from several runs.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.machine import Machine
from benchmarks.verdict import Verdict


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(Record):
    """A ratio of medians over rounds, and the central 95 % of its bootstrap distribution."""

    value: float
    low: float
    high: float


class Measure(Record):
    """One quantity of two arms: medians over all rounds."""

    plain: float
    """Both runs of the plain arm together."""
    protected: float
    p95: float
    """Of the protected arm."""
    ratio: Interval
    """protected / plain. Where the preset keeps the head in the enclave, both sides contain a head."""
    control: Interval
    """The plain arm's second run over its first: what this machine calls equal."""
    head: float | None = None
    """Of the enclave's head, mean."""
    base: float | None = None
    """Of the plain engine without its head, where the preset's server has none."""
    served: Interval | None = None
    """Without any head: (protected - head) / base."""
    target: float | None = None
    verdict: Verdict | None = None
    """Of `served` where there is one, else of `ratio`, against `target`."""

    @property
    def added(self) -> float:
        return self.protected - self.plain


class Cell(Record):
    """One comparison: the same prompts through two arms, in the same rounds."""

    model: str
    dtype: str
    arm: str
    """What is held against plain: a preset, or what the section varies."""
    engine: str = "transformers"
    streams: int
    prompt: int
    """Tokens a stream."""
    tokens: int
    """Of the turn that is timed, a stream."""
    rounds: int
    token: Measure
    """Time between two tokens of a stream while every stream decodes."""
    first: Measure
    """From the prompts' departure to a stream's first token; all prompts depart together."""
    rate: float
    """Tokens a second of all streams together, protected."""
    plain_rate: float
    same: float
    """Share of the protected answers' tokens that come before the first difference from the plain answer."""
    delay: float = 0.0
    """Of the link between enclave and gateway, one way."""
    axis: str | None = None
    """In a cost curve: what varies."""
    at: float | None = None
    """In a cost curve: its value here."""


class Stage(Record):
    """One histogram of a part's metrics. A quantile is the upper bound of its bucket; None beyond the last."""

    part: str
    name: str
    help: str
    count: int
    mean: float
    p50: float | None = None
    p95: float | None = None


class Stages(Record):
    """Where the time of one model went, and what the gateway adds."""

    model: str
    title: str
    rows: list[Stage]
    hop_straight: float
    """Median round trip of one row to the replica, less its compute and queue."""
    hop_through: float
    """The same through the gateway."""
    hop_trips: int


class Memory(Record):
    """What one process holds at one moment."""

    model: str
    state: str
    part: str
    pss: int
    rss: int
    fds: int
    threads: int


class Part(Record):
    """What one section found."""

    section: str
    command: str
    scale: str
    machine: Machine
    seed: int
    threads: int
    seconds: float
    cells: list[Cell] = Field(default_factory=list)
    stages: list[Stages] = Field(default_factory=list)
    memory: list[Memory] = Field(default_factory=list)
    missing: list[str] = Field(default_factory=list)
    """What was not measured, and why."""


def path(folder: Path, section: str) -> Path:
    """Of a section's part."""
    return folder / "serving" / f"{section}.json"


def write(part: Part, folder: Path) -> None:
    """Replace a section's part, whole or not at all."""
    target = path(folder, part.section)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".partial")
    temporary.write_text(part.model_dump_json(indent=1, exclude_none=True) + "\n")
    temporary.replace(target)


def read(folder: Path, sections: list[str]) -> dict[str, Part]:
    """The parts that are there, in the order of `sections`. Raises `pydantic.ValidationError` for a malformed one."""
    found = {name: path(folder, name) for name in sections}
    return {name: Part.model_validate_json(each.read_bytes()) for name, each in found.items() if each.exists()}
