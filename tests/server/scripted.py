"""A deterministic model server without torch: every answer depends on every row before it, to the last bit.

`ScriptedModel` chains a digest through the rows (state' = SHA-256(state || row)) and draws a hidden state from it, so a
row that is lost, repeated, or of somebody else changes every later answer. `ScriptedEngine` serves it with the whole
interface of `stip_server.engine`: step by step in both forms, and alone on ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from stip_protocol.errors import (
    DeadlineExceeded,
    FrameInvalid,
    Overloaded,
    PositionRefused,
    RequestInvalid,
    StipError,
    TensorInvalid,
)
from stip_server.engine import (
    TOP_COUNT,
    Card,
    Ended,
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
from stip_server.frames import is_finite, require_rows

VOCABULARY, WIDTH = 97, 8
ID = np.dtype("<u4")
EMPTY = hashlib.sha256(b"stip scripted model").digest()


class ScriptedModel:
    """The plain model: ids to rows, rows to states, states to logits. float32."""

    def __init__(self, *, vocabulary: int = VOCABULARY, width: int = WIDTH, seed: int = 0) -> None:
        random = np.random.Generator(np.random.Philox(key=seed))
        self.vocabulary, self.width = vocabulary, width
        self.table = random.standard_normal((vocabulary, width), dtype=np.float32)
        self.head = random.standard_normal((vocabulary, width), dtype=np.float32)

    def rows(self, ids: Iterable[int]) -> bytes:
        """Embeddings, as an enclave feeds them."""
        return self.table[list(ids)].tobytes()

    def hidden(self, state: bytes) -> NDArray[np.float32]:
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(state[:16], "little")))
        return random.standard_normal(self.width, dtype=np.float32)

    def logits(self, state: bytes) -> NDArray[np.float32]:
        return self.head @ self.hidden(state)

    def states(self, rows: bytes | memoryview, state: bytes = EMPTY) -> list[bytes]:
        """The states after each of the rows, the first of which follows `state`."""
        size, states = 4 * self.width, [state]
        for start in range(0, len(rows), size):
            states.append(hashlib.sha256(states[-1] + bytes(rows[start : start + size])).digest())
        return states[1:]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """What the model says."""
        ids, state = list(prompt), self.states(self.rows(prompt))[-1]
        for _ in range(count):
            ids.append(int(self.logits(state).argmax()))
            state = self.states(self.rows(ids[-1:]), state)[-1]
        return ids[len(prompt) :]

    def picks(self, out: Hidden | Top | Logits) -> list[int]:
        """The greedy id behind each output, as an enclave finds it."""
        if isinstance(out, Top):
            return [int(row[0]) for row in np.frombuffer(out.indices, ID).reshape(-1, out.count)]
        if isinstance(out, Logits):
            return [int(row.argmax()) for row in np.frombuffer(out.rows, np.float32).reshape(-1, self.vocabulary)]
        rows = np.frombuffer(out.rows, np.float32).reshape(-1, self.width)
        return [int((self.head @ row).argmax()) for row in rows]


def draw(logits: NDArray[np.float32], generation: Generation, step: int) -> int:
    """The id drawn at `step`: the rule of `Generation`, over the whole row."""
    if generation.temperature == 0.0:
        return int(logits.argmax())
    order = np.lexsort((np.arange(logits.size), -logits))[: generation.top_k or logits.size]
    mass = np.cumsum(np.exp((logits[order].astype(np.float64) - logits[order[0]]) / generation.temperature))
    end = mass.size - 1
    if 0.0 < generation.top_p < 1.0:
        end = min(end, int(np.searchsorted(mass, generation.top_p * mass[-1])))
    uniform = np.random.Generator(np.random.Philox(key=generation.seed, counter=step)).random()
    return int(order[min(end, int(np.searchsorted(mass[: end + 1], uniform * mass[end], side="right")))])


@dataclass
class Play:
    """One session: the states of the rows computed, and what waits."""

    session: Session
    capacity: int
    form: Form
    touched: float
    states: list[bytes] = field(default_factory=list)
    waiting: bytearray = field(default_factory=bytearray)
    ids: list[int] = field(default_factory=list)
    owed: int = 0
    answered: int = 0
    """Outputs of the last answer; of ids, how many the last generation added."""
    recallable: set[int] = field(default_factory=set)
    generation: Generation | None = None
    halted: bool = False


class ScriptedEngine:
    """`stip_server.engine.Engine` over a `ScriptedModel`. A step takes `step_seconds` and up to `chunk` rows a
    session."""

    def __init__(
        self,
        model: ScriptedModel | None = None,
        *,
        forms: tuple[Form, ...] = tuple(Form),
        slots: int = 16,
        max_positions: int = 256,
        max_outputs: int = 8,
        chunk: int = 16,
        idle_seconds: float = 300.0,
        step_seconds: float = 0.0,
        instance: str = "0" * 32,
        epoch: int = 0,
        manifest_digest: bytes = b"",
        preset: str = "plain",
    ) -> None:
        self.model = model or ScriptedModel()
        self._card = Card(
            instance=instance,
            epoch=epoch,
            manifest_digest=manifest_digest,
            preset=preset,
            dtype="float32",
            width=self.model.width,
            vocabulary=0 if forms == (Form.HIDDEN,) else self.model.vocabulary,
            max_positions=max_positions,
            max_sessions=slots,
            forms=forms,
            max_outputs=max_outputs,
        )
        self._chunk, self._idle, self._step_seconds = chunk, idle_seconds, step_seconds
        self._open: dict[Session, Play] = {}
        self._events: list[Event] = []
        self._wake = asyncio.Event()
        self._stopped = False

    @property
    def card(self) -> Card:
        return self._card

    def open(self, session: Session, *, max_positions: int, output: Form, account: bytes = b"") -> None:
        if session in self._open:
            raise RequestInvalid.because("session", "a handle that is open", "a fresh one")
        if output not in self._card.forms:
            raise RequestInvalid.because("output", output, ", ".join(self._card.forms))
        if not 1 <= max_positions <= self._card.max_positions:
            raise PositionRefused.because("max_positions", max_positions, f"1 to {self._card.max_positions}")
        if len(self._open) >= self._card.max_sessions:
            raise Overloaded(f"sessions: got {len(self._open)} open, allowed: {len(self._open)}", retry_after=0.1)
        self._open[session] = Play(session, max_positions, output, time.monotonic())
        self._wake.set()

    def feed(self, slices: Sequence[Slice]) -> None:
        for piece in slices:
            play = self._open.get(piece.session)
            if play is not None:
                self._try(play, partial(self._accept, play, piece))

    def recall(self, session: Session, position: int) -> None:
        play = self._open.get(session)
        if play is not None:
            self._try(play, partial(self._recall, play, position))

    def generate(self, session: Session, generation: Generation) -> None:
        play = self._open.get(session)
        if play is not None:
            self._try(play, partial(self._begin, play, generation))

    def halt(self, session: Session) -> None:
        play = self._open.get(session)
        if play is not None and play.generation is not None:
            play.halted = True
            self._wake.set()

    def close(self, session: Session) -> None:
        self._open.pop(session, None)
        self._events = [event for event in self._events if getattr(event, "session", None) != session]

    async def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    async def steps(self) -> AsyncIterator[list[Event]]:
        while not self._stopped:
            self._expire(time.monotonic())
            if self._events:
                events, self._events = self._events, []
                yield events
            elif any(self._ready(play) for play in self._open.values()):
                yield await self._step()
            else:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._until_idle(time.monotonic())):
                        await self._wake.wait()

    def _try(self, play: Play, attempt: Callable[[], None]) -> None:
        play.touched = time.monotonic()
        try:
            attempt()
        except StipError as error:
            self.close(play.session)
            self._events.append(Ended(play.session, error))
        self._wake.set()

    def _accept(self, play: Play, piece: Slice) -> None:
        ids = play.form is Form.IDS
        length = len(play.ids) if ids else len(play.states) + len(play.waiting) // (4 * self.model.width)
        most = 0 if ids else min(piece.count, self._card.max_outputs)
        if piece.count < 1 or piece.outputs > most:
            raise FrameInvalid.because("outputs", piece.outputs, f"0 to {most} of at least one row")
        if play.owed or play.generation:
            raise PositionRefused.because("position", "rows while an answer is owed", "rows once it is there")
        if piece.back > (play.answered if ids else max(0, play.answered - 1)):
            raise PositionRefused.because("back", piece.back, "what the answer before allows")
        if piece.position != length - piece.back or piece.position + piece.count > play.capacity:
            raise PositionRefused.because("position", piece.position, f"{length - piece.back}, below {play.capacity}")
        if ids:
            new = np.frombuffer(piece.rows, ID) if len(piece.rows) == 4 * piece.count else np.empty(0, ID)
            if new.size != piece.count or int(new.max()) >= self.model.vocabulary:
                raise TensorInvalid.because("ids", "others", f"{piece.count} ids below {self.model.vocabulary}")
            del play.ids[length - piece.back :]
            del play.states[len(play.ids) :]
            play.ids += new.tolist()
        else:
            require_rows(piece.rows, piece.count, self._card)
            if not is_finite(piece.rows, self._card.dtype):
                raise TensorInvalid.because("rows", "a value that is not finite", "finite values")
            del play.states[len(play.states) - piece.back :]
            play.waiting += piece.rows
        play.owed, play.answered = piece.outputs, 0
        play.recallable.clear()

    def _recall(self, play: Play, position: int) -> None:
        if play.form is not Form.TOP:
            raise RequestInvalid.because("recall", f"a session of output {play.form}", Form.TOP)
        if position not in play.recallable:
            raise PositionRefused.because("recall position", position, "that of a last output, once")
        play.recallable.remove(position)
        row = self.model.logits(play.states[position]).tobytes()
        self._events.append(Output(play.session, position, Logits(row)))

    def _begin(self, play: Play, generation: Generation) -> None:
        if play.form is not Form.IDS or play.generation is not None:
            raise RequestInvalid.because("generate", "a session that cannot", "one of ids that does not generate")
        if generation.position != len(play.ids) or not play.ids:
            raise PositionRefused.because("position", generation.position, len(play.ids))
        if not 1 <= generation.max_ids <= play.capacity - len(play.ids):
            raise PositionRefused.because("max_ids", generation.max_ids, f"1 to {play.capacity - len(play.ids)}")
        play.generation, play.answered, play.halted = generation, 0, False

    def _ready(self, play: Play) -> bool:
        return bool(play.waiting) or play.generation is not None

    async def _step(self) -> list[Event]:
        work = [play for play in self._open.values() if self._ready(play)]
        started, rows = time.monotonic(), 0
        await asyncio.sleep(self._step_seconds)
        events: list[Event] = []
        for play in work:
            if self._open.get(play.session) is play:
                count, answers = self._alone(play) if play.form is Form.IDS else self._rows(play)
                rows += count
                events += answers
        compute = time.monotonic() - started
        return [Stepped(len(work), rows, compute), *events]

    def _rows(self, play: Play) -> tuple[int, list[Event]]:
        """One chunk of rows in; the answer where it is due."""
        taken = bytes(play.waiting[: self._chunk * 4 * self.model.width])
        del play.waiting[: len(taken)]
        new = self.model.states(taken, play.states[-1] if play.states else EMPTY)
        play.states += new
        if not play.owed or play.waiting:
            return len(new), []
        count, position = play.owed, len(play.states) - play.owed
        play.owed, play.answered, play.touched = 0, count, time.monotonic()
        play.recallable = set(range(position, position + count))
        return len(new), [Output(play.session, position, self._out(play.form, play.states[-count:]), count=count)]

    def _out(self, form: Form, states: list[bytes]) -> Hidden | Top:
        if form is Form.HIDDEN:
            return Hidden(b"".join(self.model.hidden(state).tobytes() for state in states))
        logits = np.stack([self.model.logits(state) for state in states])
        count = min(TOP_COUNT, self.model.vocabulary)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        sums = np.log(np.exp(logits.astype(np.float64)).sum(1)).astype(np.float32)
        return Top(count, order.astype(ID).tobytes(), np.take_along_axis(logits, order, 1).tobytes(), sums.tobytes())

    def _alone(self, play: Play) -> tuple[int, list[Event]]:
        """One id more, or the end of the generation."""
        generation, at = play.generation, len(play.ids)
        assert generation is not None
        if play.halted:
            play.generation = None
            return 0, [Ids(play.session, at, b"", done=True)]
        new = self.model.states(self.model.rows(play.ids[len(play.states) :]), (play.states or [EMPTY])[-1])
        play.states += new
        picked = draw(self.model.logits(play.states[-1]), generation, generation.step + play.answered)
        play.touched = time.monotonic()
        if picked in generation.stop_ids:
            play.generation = None
            return len(new), [Ids(play.session, at, b"", done=True)]
        play.ids.append(picked)
        play.answered += 1
        done = play.answered == generation.max_ids
        if done:
            play.generation = None
        return len(new), [Ids(play.session, at, np.array([picked], ID).tobytes(), done=done)]

    def _expire(self, now: float) -> None:
        for play in list(self._open.values()):
            if not self._ready(play) and now - play.touched >= self._idle:
                self.close(play.session)
                self._events.append(Ended(play.session, DeadlineExceeded("the session was idle", field="idle")))

    def _until_idle(self, now: float) -> float | None:
        touched = min((play.touched for play in self._open.values() if not self._ready(play)), default=None)
        return None if touched is None else max(0.0, touched + self._idle - now)
