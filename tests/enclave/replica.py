"""Scripted replicas of a toy: they hold every session to the wire's rules, and can be bent, held, broken and drained.

`Front` stands where the gateway does: it lists the replicas and sends each link to the one it names.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stip_enclave.sampling import Sampler, Sampling
from stip_protocol import rpc
from stip_protocol.errors import Draining, Overloaded, PositionRefused, ReplicaLost, StipError
from stip_protocol.wire import model_pb2, model_pb2_grpc
from tests.enclave.toy import NUMPY, START, Toy

Tamper = Callable[[model_pb2.Down], list[model_pb2.Down]]
OUTPUT = {"hidden": model_pb2.OUTPUT_HIDDEN, "top": model_pb2.OUTPUT_TOP, "ids": model_pb2.OUTPUT_IDS}
BURST = 3
"""Ids of one frame of a generation."""


@dataclass
class Sequence:
    """One session on a replica."""

    states: list[bytes] = field(default_factory=lambda: [START])
    may_forget: int = 0
    answered: set[int] = field(default_factory=set)
    """Positions whose whole row may be asked."""
    halted: bool = False
    running: asyncio.Task[None] | None = None

    @property
    def length(self) -> int:
        return len(self.states) - 1


class ScriptedReplica(model_pb2_grpc.ModelServicer):
    """Answers with the toy's model. `tamper` bends what it says, `hold` keeps outputs back; `broken_by` says which
    message of the enclave breaks all its links, before or instead of an answer.
    """

    def __init__(self, toy: Toy, name: str = "", *, max_outputs: int = 8) -> None:
        self.toy, self.name = toy, name
        self.card = model_pb2.Card(
            version=1,
            instance=toy.manifest.instance,
            epoch=toy.manifest.epoch,
            manifest_digest=toy.digest,
            preset=toy.manifest.preset,
            dtype=toy.manifest.dtype,
            width=toy.manifest.width,
            vocabulary=0 if toy.manifest.output == "hidden" else toy.manifest.vocabulary,
            max_positions=toy.manifest.max_positions,
            max_sessions=32,
            max_rows=5,
            max_outputs=max_outputs,
            outputs=[OUTPUT[toy.manifest.output]],
        )
        self.tamper: Tamper = lambda down: [down]
        self.broken_by: Callable[[model_pb2.Up], bool] = lambda up: False
        self.seen: list[model_pb2.Up] = []
        self.opened: list[bytes] = []
        self.links = 0
        self.sessions: dict[bytes, Sequence] = {}
        self.fed, self.closed = asyncio.Event(), asyncio.Event()
        self.hold: asyncio.Event | None = None
        self.dead = False
        self.draining = False
        self.full = False
        self.pace: asyncio.Semaphore | None = None
        """Frames of ids that may still leave."""
        self._downs: set[asyncio.Queue[model_pb2.Down | None]] = set()

    def break_links(self) -> None:
        """Every stream ends; the next one is welcome unless `dead`."""
        self.sessions.clear()
        for downs in self._downs:
            downs.put_nowait(None)

    def hurry(self) -> None:
        """Let frames of ids leave that were paced."""
        assert self.pace is not None
        for _ in range(100):
            self.pace.release()

    def kill(self) -> None:
        self.dead = True
        self.break_links()

    def drain(self) -> None:
        self.draining = True
        self.say(model_pb2.Down(drain=model_pb2.Drain(seconds=5)))

    def say(self, down: model_pb2.Down) -> None:
        """Send a message on every link."""
        for downs in self._downs:
            downs.put_nowait(down)

    @property
    def feeds(self) -> list[model_pb2.Feed]:
        return [up.feed for up in self.seen if up.HasField("feed")]

    async def Describe(self, request: Any, context: Any) -> model_pb2.Card:  # noqa: N802
        if self.dead:
            raise ReplicaLost("dead")
        return self.card

    async def Link(self, requests: Any, context: Any) -> AsyncIterator[model_pb2.Down]:  # noqa: N802
        if self.dead:
            raise ReplicaLost("dead")
        if self.draining:
            raise Draining("this replica takes no new links")
        self.links += 1
        downs: asyncio.Queue[model_pb2.Down | None] = asyncio.Queue()
        self._downs.add(downs)
        own: set[bytes] = set()

        async def read() -> None:
            async for up in requests:
                self.seen.append(up)
                if self.broken_by(up):
                    self.break_links()
                    continue
                (self.fed if up.HasField("feed") else self.closed if up.HasField("close") else asyncio.Event()).set()
                for down in self._answers(up, downs, own):
                    await self._say(down, downs)
            downs.put_nowait(None)

        reading = asyncio.create_task(read())
        try:
            while (down := await downs.get()) is not None:
                down.load = len(self.sessions)
                yield down
        finally:
            reading.cancel()
            self._downs.discard(downs)
            for handle in own:
                self._forget(handle)

    async def _say(self, down: model_pb2.Down, downs: asyncio.Queue[model_pb2.Down | None]) -> None:
        if self.hold is not None and down.HasField("fed"):
            await self.hold.wait()
        for bent in self.tamper(down):
            downs.put_nowait(bent)

    def _forget(self, handle: bytes) -> None:
        sequence = self.sessions.pop(handle, None)
        if sequence is not None and sequence.running is not None:
            sequence.running.cancel()

    def _answers(
        self, up: model_pb2.Up, downs: asyncio.Queue[model_pb2.Down | None], own: set[bytes]
    ) -> list[model_pb2.Down]:
        kind = up.WhichOneof("body")
        if kind == "open":
            handle = up.open.session
            if self.draining or self.full:
                refusal: StipError = Draining("going") if self.draining else Overloaded("full", retry_after=0.25)
                return [_closed(handle, refusal)]
            self.opened.append(handle)
            own.add(handle)
            self.sessions[handle] = Sequence()
            return [model_pb2.Down(opened=model_pb2.Opened(session=handle))]
        if kind == "close":
            self._forget(up.close.session)
        elif kind == "feed":
            return self._feed(up.feed)
        elif kind == "recall":
            return self._recall(up.recall)
        elif kind == "generate" and (sequence := self.sessions.get(up.generate.session)) is not None:
            if up.generate.position != sequence.length:
                return self._refused(up.generate.session, "position")
            sequence.halted = False
            sequence.running = asyncio.create_task(self._generate(up.generate, sequence, downs))
        elif kind == "halt" and (sequence := self.sessions.get(up.halt.session)) is not None:
            sequence.halted = True
        return []

    def _refused(self, handle: bytes, what: str) -> list[model_pb2.Down]:
        self._forget(handle)
        return [_closed(handle, PositionRefused(f"{what}: not where this session is"))]

    def _recall(self, recall: model_pb2.Recall) -> list[model_pb2.Down]:
        sequence = self.sessions.get(recall.session)
        if sequence is None:
            return []
        if recall.position not in sequence.answered:
            return self._refused(recall.session, "recall")
        sequence.answered.remove(recall.position)
        part = model_pb2.Slice(session=recall.session, position=recall.position, count=1)
        row = self._server_logits(self.toy.hidden(sequence.states[recall.position + 1]))
        return [model_pb2.Down(fed=model_pb2.Fed(slices=[part], logits=row.tobytes()))]

    def _rows(self, feed: model_pb2.Feed) -> list[bytes]:
        """What the model reads of each row, the same in every form."""
        manifest = self.toy.manifest
        if manifest.output == "ids":
            return [self.toy.embedding[self.toy.order()[one]].tobytes() for one in np.frombuffer(feed.ids, "<u4")]
        size = manifest.width * np.dtype(NUMPY[manifest.dtype]).itemsize
        return [feed.rows[start : start + size] for start in range(0, len(feed.rows), size)]

    def _feed(self, feed: model_pb2.Feed) -> list[model_pb2.Down]:
        rows, at = self._rows(feed), 0
        assert len(rows) == sum(part.count for part in feed.slices)
        slices: list[model_pb2.Slice] = []
        outputs: list[np.ndarray] = []
        downs: list[model_pb2.Down] = []
        for part in feed.slices:
            own, at = rows[at : at + part.count], at + part.count
            sequence = self.sessions.get(part.session)
            if sequence is None:
                continue
            if part.back > sequence.may_forget or part.position != sequence.length - part.back:
                downs += self._refused(part.session, "slice")
                continue
            del sequence.states[part.position + 1 :]
            for row in own:
                sequence.states.append(self.toy.after(sequence.states[-1], row))
            sequence.may_forget = max(0, part.outputs - 1)
            if part.outputs:
                first = sequence.length - part.outputs
                sequence.answered = set(range(first, sequence.length))
                outputs += [self.toy.hidden(state) for state in sequence.states[first + 1 :]]
                slices.append(model_pb2.Slice(session=part.session, position=first, count=part.outputs))
        if slices:
            fed = model_pb2.Fed(slices=slices, compute_us=50, queue_us=10)
            if self.toy.manifest.output == "hidden":
                fed.hidden = np.stack(outputs).tobytes()
            else:
                fed.top.CopyFrom(self._top(outputs))
            downs.append(model_pb2.Down(fed=fed))
        return downs

    async def _generate(
        self, wanted: model_pb2.Generate, sequence: Sequence, downs: asyncio.Queue[model_pb2.Down | None]
    ) -> None:
        """As a server decodes alone: frames of a few ids, the last one done."""
        spec = {"temperature": wanted.temperature, "top_k": wanted.top_k, "top_p": wanted.top_p, "seed": wanted.seed}
        sampler, order = Sampler(Sampling(**spec)), self.toy.order()
        permuted = np.argsort(order)
        stops = set(np.frombuffer(wanted.stop_ids, "<u4").tolist())
        position, made, burst, done = sequence.length, 0, [], False
        while not done:
            one = sampler.pick(self.toy.logits(self.toy.hidden(sequence.states[-1])), wanted.step + made)
            if int(permuted[one]) in stops or sequence.halted:
                done = True
            else:
                burst.append(int(permuted[one]))
                made += 1
                sequence.states.append(self.toy.after(sequence.states[-1], self.toy.embedding[one].tobytes()))
                done = made == wanted.max_ids
            if done or len(burst) == BURST:
                if self.pace is not None and not sequence.halted:
                    await self.pace.acquire()

                sequence.may_forget = made
                part = model_pb2.Slice(session=wanted.session, position=position, count=len(burst), done=done)
                ids = model_pb2.Ids(ids=np.array(burst, "<u4").tobytes())
                await self._say(model_pb2.Down(fed=model_pb2.Fed(slices=[part], ids=ids, compute_us=50)), downs)
                position, burst = position + len(burst), []
                await asyncio.sleep(0)

    def _server_logits(self, hidden: np.ndarray) -> np.ndarray:
        return self.toy.logits(hidden)[self.toy.order()].astype(NUMPY[self.toy.manifest.dtype])

    def _top(self, rows: list[np.ndarray]) -> model_pb2.Top:
        logits = np.stack([self._server_logits(row) for row in rows])
        count = min(64, logits.shape[1])
        indices = np.argsort(-logits.astype(np.float64), axis=1)[:, :count]
        lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
        return model_pb2.Top(
            count=count,
            indices=indices.astype("<u4").tobytes(),
            values=np.take_along_axis(logits, indices, axis=1).tobytes(),
            log_sum_exp=lse.astype("<f4").tobytes(),
        )


class Front(model_pb2_grpc.ModelServicer):
    """Lists the replicas that live, and hands each link to the one it asks for."""

    def __init__(self, replicas: list[ScriptedReplica]) -> None:
        self.replicas = replicas
        self.dead = False
        self.described = 0
        self.hanging: set[str] = set()
        """Replicas whose card never comes; "" is the list itself."""
        self.refusing: StipError | None = None
        """What a link is refused with."""

    async def Describe(self, request: Any, context: Any) -> model_pb2.Card:  # noqa: N802
        self.described += 1
        wanted = dict(context.invocation_metadata()).get(rpc.REPLICA_KEY, "")
        if wanted in self.hanging:
            await asyncio.Event().wait()
        living = [replica for replica in self.replicas if not (replica.dead or self.dead)]
        if not living:
            raise ReplicaLost("no replica of this instance answers")
        chosen = next((replica for replica in living if replica.name == wanted), living[0])
        card = model_pb2.Card()
        card.CopyFrom(chosen.card)
        card.replicas.extend(replica.name for replica in living if replica.name)
        return card

    async def Link(self, requests: Any, context: Any) -> AsyncIterator[model_pb2.Down]:  # noqa: N802
        if self.dead:
            raise ReplicaLost("the gateway is gone")
        if self.refusing is not None:
            raise self.refusing
        name = dict(context.invocation_metadata()).get(rpc.REPLICA_KEY, "")
        replica = next(replica for replica in self.replicas if replica.name == name)
        async for down in replica.Link(requests, context):
            yield down


def _closed(handle: bytes, error: StipError) -> model_pb2.Down:
    retry_after_ms = round(1000 * (error.retry_after or 0))
    closed = model_pb2.Closed(session=handle, code=error.code, message=error.message, retry_after_ms=retry_after_ms)
    return model_pb2.Down(closed=closed)
