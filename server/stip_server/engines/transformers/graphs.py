"""Decoding steps of fixed shapes, which a GPU can record once and replay (CUDA graphs).

A decoding step of a small batch launches thousands of short kernels, and Python that launches them is slower than the
GPU. A recorded step is launched as one, but does exactly what was recorded: the same shapes, the same memory. So a
step runs in the smallest bucket that holds it, reads its rows and places from buffers that stay where they are, and
its masks are computed on the device. Slots that no session of the step stands in are computed too, and stored nowhere.

Where nothing can be recorded (on a CPU), the same step runs as it is: what differs on a GPU is the recording alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stip_protocol.errors import ConfigurationError
from stip_server.engine import Card
from stip_server.engines.family import Shape
from stip_server.engines.outputs import Piece
from stip_server.engines.transfer import Transfer
from stip_server.engines.transformers.layout import Layout

SHORTEST = 256
"""Positions that the shortest bucket reads: below, reading less gains less than a recording costs."""
REHEARSALS = 2
"""Runs before a recording, in which libraries choose their kernels and allocate."""


@dataclass(frozen=True)
class Bucket:
    """The shape of a step."""

    slots: int
    rows: int
    length: int


class Buckets:
    """The shapes that steps are rounded up to: powers of two of slots and of positions, one row or all that a session
    can have answered."""

    def __init__(self, card: Card) -> None:
        self.slots = _doubling(1, card.max_sessions)
        self.rows = sorted({1, card.max_outputs})
        self.lengths = _doubling(min(SHORTEST, card.max_positions), card.max_positions)

    @classmethod
    def chosen(
        cls, graphs: bool | None, shape: Shape, card: Card, device: torch.device, *, cut: bool
    ) -> Buckets | None:
        """What `engine.graphs` asks for; by default buckets on a GPU, where the model can be recorded: it is not where
        it is `cut` among processes. Raises `ConfigurationError` where it asks for what cannot be."""
        wanted = device.type == "cuda" if graphs is None else graphs
        obstacle = shape.unrecordable or ("other processes" if cut else None)
        if graphs and obstacle:
            raise ConfigurationError.because("engine.graphs", graphs, f"false (a step waits for {obstacle})")
        return cls(card) if wanted and not obstacle else None

    def __iter__(self) -> Iterator[Bucket]:
        """All of them, the largest first: their memory serves the smaller ones."""
        for slots in reversed(self.slots):
            for rows in reversed(self.rows):
                for length in reversed(self.lengths):
                    yield Bucket(slots, rows, length)

    def holding(self, work: Sequence[Piece]) -> Bucket | None:
        """The smallest one for a step; None where a session has more rows than any (a prompt's chunk)."""
        rows = max(w.count for w in work)
        if rows > self.rows[-1]:
            return None
        return Bucket(
            _least(self.slots, max(w.slot for w in work) + 1),
            _least(self.rows, rows),
            _least(self.lengths, max(w.position + w.count for w in work)),
        )


@dataclass
class StaticStep:
    """One bucket's step. `compute(rows, positions, targets, length)` gives hidden states [slots, rows, d] and asks the
    host nothing."""

    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor] = field(repr=False)
    bucket: Bucket
    rows: torch.Tensor = field(repr=False)
    positions: torch.Tensor = field(repr=False)
    targets: torch.Tensor = field(repr=False)

    @classmethod
    def make(
        cls,
        compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor],
        bucket: Bucket,
        like: torch.Tensor,
        nowhere: int,
    ) -> StaticStep:
        """With buffers of zeros of the dtype, width and device of `like` [..., d], and nothing that is stored."""
        shape = (bucket.slots, bucket.rows)
        return cls(
            compute,
            bucket,
            like.new_zeros((*shape, like.shape[-1])),
            torch.zeros(shape, dtype=torch.long, device=like.device),
            torch.full(shape, nowhere, dtype=torch.long, device=like.device),
        )

    def run(self) -> torch.Tensor:
        """The step over what the buffers hold."""
        return self.compute(self.rows, self.positions, self.targets, self.bucket.length)

    def recorded(self, pool: Any) -> Callable[[], torch.Tensor]:
        """The same as a recording, in memory that all recordings share: what it returns is good until the next."""
        with torch.cuda.device(self.rows.device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(REHEARSALS):
                    self.run()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                out = self.run()

        def replay() -> torch.Tensor:
            with torch.cuda.device(self.rows.device):
                graph.replay()
            return out

        return replay


class StaticSteps:
    """All buckets of a model, ready to run."""

    def __init__(
        self,
        compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor],
        buckets: Buckets,
        like: torch.Tensor,
        nowhere: int,
    ) -> None:
        """`nowhere`: the target of rows that nobody sent. On a GPU all are recorded here: raises `ConfigurationError`
        where that fails."""
        self.buckets = buckets
        self._nowhere = nowhere
        self._transfer = Transfer(like.device)
        self._steps = {bucket: StaticStep.make(compute, bucket, like, nowhere) for bucket in buckets}
        if like.device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            try:
                self._run = {bucket: step.recorded(pool) for bucket, step in self._steps.items()}
            except RuntimeError as error:
                got = f"a model that cannot be recorded ({type(error).__name__})"
                raise ConfigurationError.because("engine.graphs", got, "false") from error
        else:
            self._run = {bucket: step.run for bucket, step in self._steps.items()}

    def layout(self, bucket: Bucket, work: Sequence[Piece]) -> Layout:
        """Where `work` stands in a bucket."""
        return Layout.within(work, self._nowhere, range(bucket.slots), bucket.rows)

    def run(self, bucket: Bucket, layout: Layout, rows: torch.Tensor) -> torch.Tensor:
        """Hidden states [slots, rows, d] of `rows` of the same shape."""
        step = self._steps[bucket]
        step.rows.copy_(rows, non_blocking=True)
        step.positions.copy_(self._transfer.up(torch.tensor(layout.positions)), non_blocking=True)
        step.targets.copy_(self._transfer.up(torch.tensor(layout.targets)), non_blocking=True)
        return self._run[bucket]()


def _doubling(first: int, last: int) -> list[int]:
    """first, 2 · first, ... below last, and last."""
    steps = []
    while first < last:
        steps.append(first)
        first *= 2
    return [*steps, last]


def _least(ladder: Sequence[int], need: int) -> int:
    return next(step for step in ladder if step >= need)
