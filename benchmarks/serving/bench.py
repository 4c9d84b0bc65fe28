"""What sections share while they measure: models with their protected instances, running systems, what is kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.direct import DirectEngine
from benchmarks.models import SUBJECTS, Subject
from benchmarks.protected import Reading, Streams
from benchmarks.serving import records
from benchmarks.serving.interleaving import Budget, Load
from benchmarks.serving.records import Cell, Memory, Part, Stages
from stip.connection import AsyncConnection, aconnect
from stip_stack import latency
from stip_stack.stack import Launch, Stack
from stip_stack.workspace import Published

TOKENS = 2**40
"""A user's budget."""
LEAST_SLOTS, POSITIONS = 4, 64
"""Room is rounded up, so that sections of similar size share what runs."""
HEAD_IN_ENCLAVE = {"paper": False, "hardened": True, "throughput": False}


class Scale(StrEnum):
    """How much of every section is measured."""

    QUICK = "quick"
    """A smoke run on tiny models; proves nothing."""
    DEFAULT = "default"
    """Half an hour on two cores."""
    FULL = "full"


class Draft:
    """A part that grows: every addition is written at once, so that a run that is stopped keeps what it has."""

    def __init__(self, empty: Part, folder: Path) -> None:
        self._part, self._folder = empty, folder
        self._began = time.monotonic()

    def cells(self, found: Iterable[Cell]) -> None:
        self._extend(cells=[*self._part.cells, *found])

    def stages(self, found: Stages) -> None:
        self._extend(stages=[*self._part.stages, found])

    def memory(self, found: Iterable[Memory]) -> None:
        self._extend(memory=[*self._part.memory, *found])

    def missing(self, what: str) -> None:
        self._extend(missing=[*self._part.missing, what])

    def _extend(self, **changes: Any) -> None:
        self._part = self._part.model_copy(update={**changes, "seconds": round(time.monotonic() - self._began, 1)})
        records.write(self._part, self._folder)


@dataclass
class System:
    """A running stack for one model, and beside it the plain engine."""

    stack: Stack
    direct: DirectEngine
    published: dict[str, Published]
    connections: dict[str, AsyncConnection] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        return next(iter(self.published.values())).manifest.vocabulary

    def protected(self, preset: str, **sampling: Any) -> Streams:
        """An arm; `sampling` is of `session.generate`."""
        head = partial(head_reading, self.stack.processes["enclave"].metrics) if HEAD_IN_ENCLAVE[preset] else None
        return Streams(self.connections[preset], head, sampling)


class Bed:
    """One model: its checkpoint, its instances, each made when it is first asked for, and a stack that starts over."""

    def __init__(self, subject: Subject, folder: Path, bench: Bench) -> None:
        self.subject, self._bench = subject, bench
        bench.say(f"{subject.name}: checkpoint")
        self.checkpoint = subject.checkpoint(folder / "checkpoint", seed=bench.seed)
        # One core's worth of threads for every part, so that the model's do not fight the others'.
        self._stack = Stack(folder / "stack", environment={"OMP_NUM_THREADS": str(bench.threads)})
        self._published: dict[str, Published] = {}
        self._enrolled: set[str] = set()

    async def system(
        self,
        presets: Sequence[str],
        loads: Sequence[Load],
        *,
        launches: Mapping[str, Launch] | None = None,
        link_delay_ms: float | None = None,
    ) -> System:
        """Everything that runs for these presets, with room for the largest of `loads`. It stays until another one is
        asked for: one runs at a time, and none is started twice in a row."""
        engine = self._bench.engine(loads)
        key = (self.subject.name, tuple(presets), engine, launches, link_delay_ms)
        return await self._bench.running(key, self._begun(presets, engine, launches, link_delay_ms))

    @contextlib.asynccontextmanager
    async def _begun(
        self,
        presets: Sequence[str],
        engine: dict[str, Any],
        launches: Mapping[str, Launch] | None,
        link_delay_ms: float | None,
    ) -> AsyncIterator[System]:
        published = {preset: self._instance(preset) for preset in presets}
        self._bench.say(f"{self.subject.name}: start")
        with DirectEngine(self.checkpoint, self.subject.dtype, engine) as direct:
            async with contextlib.AsyncExitStack() as leaving:
                leaving.callback(self._stack.stop)
                instances = list(published.values())
                self._stack.start(instances, engine=engine, launches=launches, link_delay_ms=link_delay_ms)
                system = System(self._stack, direct, published)
                for preset, each in published.items():
                    connection = await aconnect(self._profile(preset, each))
                    leaving.push_async_callback(connection.close)
                    system.connections[preset] = connection
                yield system

    def _instance(self, preset: str) -> Published:
        if preset not in self._published:
            self._bench.say(f"{self.subject.name}: protect, {preset}")
            arguments = (*self.subject.protection(preset), "--samples", "1")
            self._published[preset] = self._stack.protect(self.checkpoint, preset, *arguments)
        return self._published[preset]

    def _profile(self, preset: str, published: Published) -> Path:
        """Of the user of this instance, at the enclave that runs now."""
        user = f"bench-{preset}"
        if user in self._enrolled:
            return self._stack.profile(user, published, name=f"profile-{user}")
        self._enrolled.add(user)
        return self._stack.enrol(user, published, budget=TOKENS)


Key = tuple[object, ...]


@dataclass
class Bench:
    """One run of the report. An async context manager: what runs ends with it."""

    scale: Scale
    work: Path
    """A folder for checkpoints and stacks; it is the caller's to remove."""
    seed: int
    threads: int
    """Of every model: server, enclave's head and plain engine alike."""
    budget: Budget
    say: Callable[[str], None]
    """Told what is being done."""
    _beds: dict[str, Bed] = field(default_factory=dict)
    _runs: tuple[Key, System, contextlib.AsyncExitStack] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.rest()

    def bed(self, subject: Subject) -> Bed:
        """The same one for the whole run: its instances are protected once."""
        if subject.name not in self._beds:
            self._beds[subject.name] = Bed(subject, self.work / subject.name, self)
        return self._beds[subject.name]

    def named(self, name: str) -> Bed:
        return self.bed(SUBJECTS[name])

    async def running(self, key: Key, system: contextlib.AbstractAsyncContextManager[System]) -> System:
        """What runs under `key`; where that is something else, `system` instead of it."""
        if self._runs is None or self._runs[0] != key:
            await self.rest()
            leaving = contextlib.AsyncExitStack()
            self._runs = (key, await leaving.enter_async_context(system), leaving)
        return self._runs[1]

    async def rest(self) -> None:
        """Nothing runs after this."""
        runs, self._runs = self._runs, None
        if runs is not None:
            await runs[2].aclose()

    def engine(self, loads: Sequence[Load]) -> dict[str, Any]:
        """The `[engine]` table of every server and of the plain engine; the rest is default."""
        positions = max(load.prompt + load.tokens for load in loads) + 4
        return {
            "slots": max(LEAST_SLOTS, *(load.streams for load in loads)),
            "threads": self.threads,
            "max_positions": -(-positions // POSITIONS) * POSITIONS,
        }


def head_reading(enclave: str) -> Reading:
    """Count and sum of the enclave's head stage so far."""
    row = next((row for row in latency.table({"enclave": enclave}) if row.name == "head"), None)
    return (row.count, row.count * row.mean) if row else (0, 0.0)
