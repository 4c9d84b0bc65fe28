"""Tensor parallelism: one model cut among the processes that torchrun started, stepped by all of them together.

    torchrun --standalone --nproc-per-node 2 -m stip_server.cli serve --config server.toml

Rank 0 serves. Before each step it tells the others what it is about to compute (`Step`), and every rank runs the same
step on its part of the weights and of the cache. Only rank 0 hands results on.

Ranks leave together. The others do not listen to SIGTERM, which torchrun sends to all: they are needed while rank 0
drains, and leave when it says so or when its connection breaks. A step that fails on one rank leaves the others
within a collective, so any failure ends the replica: rank 0 stops like one whose engine died, and torchrun ends what
is left, at once or after its `--shutdown-timeout` (30 s; it must exceed `serving.drain_seconds`).
"""

from __future__ import annotations

import datetime
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import structlog
import torch
import torch.distributed as dist
from torch import nn

from stip_protocol.errors import ConfigurationError, Unavailable
from stip_server.config import TransformersSettings
from stip_server.engine import Card, Form
from stip_server.engines.outputs import Piece, Result
from stip_server.engines.transformers.runner import Runner
from stip_server.engines.transformers.slots import Vacate

BACKENDS: Mapping[str, str] = {"cpu": "gloo", "cuda": "nccl"}
"""What carries activations, by device. Steps are announced by gloo everywhere."""
FRAME = 1 << 16
"""Bytes of an announcement's first broadcast: enough for most steps; what is longer takes a second one."""
LENGTH = 8
STEP_LIMIT = datetime.timedelta(minutes=2)
"""The longest wait for another rank within a step."""
QUIET_LIMIT = datetime.timedelta(days=365)
"""The longest wait for an announcement: none. A rank that is gone breaks its connection."""


@dataclass(frozen=True)
class Part:
    """`outputs.Piece` as it was announced."""

    slot: int
    position: int
    count: int
    rows: Sequence[memoryview] = field(repr=False)
    form: Form
    outputs: int


@dataclass(frozen=True)
class Step:
    """What is computed next: the arguments of `Runner.step`."""

    moves: Sequence[Vacate]
    work: Sequence[Piece]

    def encode(self) -> bytes:
        """A line of JSON, and the rows."""
        rows = [b"".join(w.rows) for w in self.work]
        head = {
            "moves": [[m.slot, m.source, m.rows, m.moved] for m in self.moves],
            "work": [
                [w.slot, w.position, w.count, w.form, w.outputs, len(data)]
                for w, data in zip(self.work, rows, strict=True)
            ],
        }
        return b"\n".join([json.dumps(head).encode(), b"".join(rows)])

    @classmethod
    def decode(cls, data: bytes) -> Step:
        """The inverse of `encode`."""
        line, rows = data.split(b"\n", 1)
        head, at = json.loads(line), 0
        work = []
        for slot, position, count, form, outputs, size in head["work"]:
            work.append(Part(slot, position, count, [memoryview(rows)[at : at + size]], Form(form), outputs))
            at += size
        return cls([Vacate(*move) for move in head["moves"]], work)


class Ranks:
    """The processes of one replica."""

    def __init__(self, announcements: dist.ProcessGroup) -> None:
        self._announcements = announcements
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()

    @classmethod
    def join(cls, settings: TransformersSettings) -> Ranks | None:
        """Meet the other processes; None where there is one only. Raises `ConfigurationError` where torchrun started
        another number of them, or for a device they cannot share."""
        started, wanted = int(os.environ.get("WORLD_SIZE", "1")), settings.tensor_parallel
        if started != wanted:
            allowed = f"{started}, as many as were started (torchrun --nproc-per-node {wanted} starts {wanted})"
            raise ConfigurationError.because("engine.tensor_parallel", wanted, allowed)
        if wanted == 1:
            return None
        accelerator = torch.accelerator.current_accelerator()
        found = "cpu" if accelerator is None else accelerator.type
        if settings.device != found:
            # transformers cuts a model on the accelerator that it finds.
            raise ConfigurationError.because("engine.device", settings.device, f"{found}, for each rank its own")
        local = int(os.environ["LOCAL_RANK"])
        device = None if found == "cpu" else torch.device(found, local)
        if device is not None:
            torch.accelerator.set_device_index(local)
        dist.init_process_group(BACKENDS[found], timeout=STEP_LIMIT, device_id=device)
        announcements = dist.new_group(backend="gloo", timeout=QUIET_LIMIT)
        if dist.get_rank() > 0:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        return cls(announcements)

    def meet(self) -> None:
        """Wait until every rank is here: they load at different speeds."""
        dist.barrier(group=self._announcements)

    def leave(self) -> None:
        """Tear the connections down, while all ranks are there to do so."""
        dist.destroy_process_group()

    def announce(self, data: bytes) -> None:
        """Tell the others; nothing to say means to leave."""
        frame = bytearray(len(data).to_bytes(LENGTH, "little") + data)
        rest = frame[FRAME:]
        frame = frame[:FRAME].ljust(FRAME, b"\0")
        dist.broadcast(torch.frombuffer(frame, dtype=torch.uint8), src=0, group=self._announcements)
        if rest:
            dist.broadcast(torch.frombuffer(rest, dtype=torch.uint8), src=0, group=self._announcements)

    def hear(self) -> bytes:
        """What rank 0 announces next."""
        frame = torch.empty(FRAME, dtype=torch.uint8)
        dist.broadcast(frame, src=0, group=self._announcements)
        size = int.from_bytes(frame[:LENGTH].numpy().tobytes(), "little")
        data = frame[LENGTH : LENGTH + size].numpy().tobytes()
        if missing := size - len(data):
            rest = torch.empty(missing, dtype=torch.uint8)
            dist.broadcast(rest, src=0, group=self._announcements)
            data += rest.numpy().tobytes()
        return data


class LeadingRunner(Runner):
    """Rank 0's runner: it announces each step before it runs it."""

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module | None,
        card: Card,
        ranks: Ranks,
        settings: TransformersSettings | None = None,
    ) -> None:
        ranks.meet()
        super().__init__(model, head, card, settings)
        self._ranks = ranks
        self._gone = False

    def step(self, moves: Sequence[Vacate], work: Sequence[Piece]) -> tuple[list[Result], float]:
        if self._gone:
            raise Unavailable("a rank of this replica failed")
        try:
            self._ranks.announce(Step(moves, work).encode())
            return super().step(moves, work)
        except Exception:
            self._gone = True
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    def close(self) -> None:
        """Let the other ranks leave."""
        if not self._gone:
            self._gone = True
            self._ranks.announce(b"")
            self._ranks.leave()


def follow(model: nn.Module, head: nn.Module | None, card: Card, ranks: Ranks) -> None:
    """Step as rank 0 announces, until it says to leave. Whatever fails is raised: this rank is of no use then."""
    ranks.meet()
    runner = Runner(model, head, card)
    log = structlog.get_logger()
    log.info("following", rank=ranks.rank, ranks=ranks.count)
    while data := ranks.hear():
        step = Step.decode(data)
        runner.step(step.moves, step.work)
    log.info("stopped", rank=ranks.rank)
