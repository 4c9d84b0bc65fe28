"""What every engine has to do, whatever it is built on: one suite, run over each of them.

    @pytest.mark.parametrize("check", checks({Form.HIDDEN}, max_outputs=8), ids=str)
    async def test_the_engine_conforms(check): await check.run(make)

`make(Wanted(...))` opens an engine of those bounds together with the plain model that it serves. A check that needs a
form or several outputs is not in the list of an engine that does not offer them: the card is held to the list.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from stip_protocol.errors import StipError
from stip_server.engine import (
    Card,
    Ended,
    Engine,
    Event,
    Form,
    Generation,
    Hidden,
    Ids,
    Logits,
    Output,
    Session,
    Slice,
    Stepped,
    Top,
)

STEPWISE = (Form.HIDDEN, Form.TOP)


class Model(Protocol):
    """The plain model behind an engine: what its answers are held to."""

    def rows(self, ids: Sequence[int]) -> bytes:
        """Embeddings of `ids`, in the card's dtype."""
        ...

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The `count` ids that follow `prompt`."""
        ...

    def picks(self, out: Hidden | Top | Logits) -> list[int]:
        """The greedy id behind each output."""
        ...


@dataclass(frozen=True)
class Wanted:
    """Bounds that a check wants its engine to have; `positions` of one session."""

    slots: int = 4
    positions: int = 64
    idle_seconds: float = 300.0


Make = Callable[[Wanted], AbstractAsyncContextManager[tuple[Engine, Model]]]


@dataclass
class Bench:
    """An engine called directly, its events sorted by session."""

    engine: Engine
    model: Model
    steps: list[Stepped] = field(default_factory=list)
    late: list[Event] = field(default_factory=list)
    """Events of sessions that were closed before: there must be none."""
    _boxes: dict[Session, asyncio.Queue[Output | Ids | Ended]] = field(default_factory=dict)
    _names: int = 0

    @property
    def card(self) -> Card:
        return self.engine.card

    async def pump(self) -> None:
        async for events in self.engine.steps():
            for event in events:
                if isinstance(event, Stepped):
                    self.steps.append(event)
                elif event.session in self._boxes:
                    self._boxes[event.session].put_nowait(event)
                else:
                    self.late.append(event)

    def open(self, form: Form, positions: int | None = None, account: bytes = b"") -> Session:
        """A session of a fresh name, as long as the card allows by default."""
        self._names += 1
        session = (1, self._names.to_bytes(16, "big"))
        bound = self.card.max_positions if positions is None else positions
        self.engine.open(session, max_positions=bound, output=form, account=account)
        self._boxes[session] = asyncio.Queue()
        return session

    def close(self, session: Session) -> None:
        self.engine.close(session)
        self._boxes.pop(session, None)

    def feed(self, session: Session, position: int, ids: Sequence[int], outputs: int = 1, back: int = 0) -> None:
        self.engine.feed([Slice(session, position, len(ids), outputs, self.model.rows(ids), back)])

    def feed_ids(self, session: Session, position: int, ids: Sequence[int], back: int = 0) -> None:
        self.engine.feed([Slice(session, position, len(ids), 0, np.array(ids, "<u4").tobytes(), back)])

    async def event(self, session: Session) -> Output | Ids:
        """The session's next answer. Raises what the engine ended it with."""
        event = await self._boxes[session].get()
        if isinstance(event, Ended):
            raise event.error
        return event

    async def output(self, session: Session) -> Output:
        event = await self.event(session)
        assert isinstance(event, Output)
        return event

    async def pick(self, session: Session, position: int) -> int:
        """The greedy id of the answer that must be the one for the row at `position`."""
        output = await self.output(session)
        assert (output.position, output.count) == (position, 1)
        (picked,) = self.model.picks(output.out)
        return picked

    async def ids(self, session: Session, position: int) -> list[int]:
        """A generation to its end: every id in its place, `done` once."""
        ids: list[int] = []
        while True:
            event = await self.event(session)
            assert isinstance(event, Ids)
            assert event.position == position + len(ids)
            ids += np.frombuffer(event.ids, "<u4").tolist()
            if event.done:
                return ids

    async def says(self, form: Form, prompt: list[int], count: int, frame: int = 1000) -> list[int]:
        """A session from its opening to its close: greedy ids, the prompt in frames of `frame` rows."""
        session = self.open(form)
        if form is Form.IDS:
            for at in range(0, len(prompt), frame):
                self.feed_ids(session, at, prompt[at : at + frame])
            self.engine.generate(session, Generation(len(prompt), count, frozenset()))
            ids = await self.ids(session, len(prompt))
        else:
            for at in range(0, len(prompt), frame):
                self.feed(session, at, prompt[at : at + frame], outputs=int(at + frame >= len(prompt)))
            ids = [await self.pick(session, len(prompt) - 1)]
            while len(ids) < count:
                self.feed(session, len(prompt) + len(ids) - 1, ids[-1:])
                ids.append(await self.pick(session, len(prompt) + len(ids) - 1))
        self.close(session)
        return ids

    async def ends(self, session: Session) -> str:
        """The code that the session's next event ends it with."""
        try:
            got = await self.event(session)
        except StipError as error:
            self._boxes.pop(session)
            return error.code
        raise AssertionError(f"an answer at {got.position} in place of an end")


@contextlib.asynccontextmanager
async def benched(make: Make, wanted: Wanted | None = None) -> AsyncIterator[Bench]:
    """A running engine. When it is left, `steps` must end, and no event may have come after a close."""
    async with make(wanted or Wanted()) as (engine, model):
        bench = Bench(engine, model)
        pump = asyncio.create_task(bench.pump())
        try:
            yield bench
        finally:
            await engine.stop()
            await engine.stop()
            await pump
        assert bench.late == []


@dataclass(frozen=True)
class Check:
    """One promise. `form` is the output that its sessions ask for."""

    name: str
    form: Form
    body: Callable[[Make, Form], Awaitable[None]] = field(repr=False)
    max_outputs: int = 1

    async def run(self, make: Make) -> None:
        async with benched(make) as bench:
            assert self.form in bench.card.forms
            assert bench.card.max_outputs >= self.max_outputs
        await self.body(make, self.form)

    def __str__(self) -> str:
        return f"{self.name} ({self.form})"


Body = Callable[[Make, Form], Awaitable[None]]
CHECKS: list[Check] = []


def check(*forms: Form, max_outputs: int = 1) -> Callable[[Body], Body]:
    """Put a promise into the suite, once for every form that it is about."""

    def add(body: Body) -> Body:
        name = body.__name__.replace("_", " ")
        CHECKS.extend(Check(name, form, body, max_outputs) for form in forms)
        return body

    return add


def checks(forms: Collection[Form], *, max_outputs: int) -> list[Check]:
    """The suite of an engine that offers these forms and so many outputs a slice."""
    import tests.server.conformance_alone
    import tests.server.conformance_stepwise  # noqa: F401 - they add their checks

    return [each for each in CHECKS if each.form in forms and each.max_outputs <= max_outputs]
