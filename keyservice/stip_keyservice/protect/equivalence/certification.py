"""Making a certificate: the passes that are run, batch by batch, and what is gathered from them.

Memory. Held are one layer of one model in the computing dtype, and for every position of a batch its hidden states
after every layer, its logits of three passes and what one layer makes of it. Batches are cut so that this stays
within what protection promises (`storage.memory`), where one layer alone does not exceed it; a sequence that is
too long for that is refused. Each layer is read once a pass and batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from stip_keyservice.protect.architecture import After
from stip_keyservice.protect.equivalence.certificate import (
    BOUNDS,
    PEAK,
    PEAK_WIDTH,
    ROUNDING_WIDTH,
    TIE_WIDTH,
    Certificate,
    Coverage,
    Group,
    Layer,
    Native,
    Peaks,
)
from stip_keyservice.protect.equivalence.comparison import Picks, Tally, keyed
from stip_keyservice.protect.equivalence.inputs import GIVEN, RANDOM, Batch, Inputs
from stip_keyservice.protect.equivalence.protected_model import InstanceFiles, PlainModel, ProtectedModel
from stip_keyservice.protect.equivalence.routing import MARGIN, Routings, stored_margin
from stip_keyservice.protect.equivalence.streamed_model import Observe, unseen
from stip_keyservice.protect.equivalence.tables import TableRows, Tables
from stip_keyservice.protect.equivalence.weights import moved_within_rounding
from stip_keyservice.protect.plan import Plan
from stip_keyservice.protect.storage import memory
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_protocol.errors import CheckpointInvalid, ConfigurationError
from stip_protocol.keys import HeadsKey

EXACT_PRESETS = frozenset({"paper"})
"""Presets whose stored weights are bit-exact, so that the computing dtype's bound holds for every stored dtype:
all but the rows of a table that the enclave holds scaled (Gemma), which are rounded anew."""
NARROW = frozenset({"float16", "bfloat16"})
"""Stored dtypes that are narrower than the one certificates compute in."""
LENGTH = 64
"""Positions of a random sample, where the model has as many."""
SAMPLES_LIMIT = 64
BATCH_BYTES = 1 << 30
"""Most bytes of a batch's hidden states and logits."""
BATCH_ROWS = 4096
"""Positions of the largest batch: bounds what is alive inside one layer."""
WORK_BYTES = 600_000_000
"""Of what is held beside layers and batches: row blocks of a head, blocks of comparisons, figures of ids, and what
the allocator keeps of earlier ones."""

Advance = Callable[[int], None]
"""Told how many layers more have run."""


class Certification:
    """A certificate to be made: `run` makes it, in `steps` steps."""

    def __init__(
        self,
        files: InstanceFiles,
        source: Checkpoint,
        planned: Plan,
        *,
        samples: int,
        length: int = LENGTH,
        seed: int = 0,
        given: Sequence[torch.Tensor] = (),
        compute_dtype: str | None = None,
    ) -> None:
        """Compare the instance in `files` with `source`, of which `planned` is the plan.

        `samples` random sequences of `length` ids (fewer where the model has fewer positions) are drawn by `seed`,
        and run with the `given` ones. Raises `CheckpointInvalid` where the source cannot be loaded, `IntegrityError`
        where the parts cannot be, `ConfigurationError` for a sequence that is too long for the promised memory.
        """
        inputs = Inputs.draw(planned.vocabulary, samples, min(length, planned.max_positions), seed, given)
        compute = compute_dtype or ("float64" if planned.dtype == "float64" else "float32")
        stored, dtype = planned.dtype, getattr(torch, compute)
        self._plan = planned
        self._inputs = inputs
        self._seed = seed
        self._compute = compute
        exact = planned.preset in EXACT_PRESETS
        scaled = {table.name for table in planned.architecture.tables if table.scale != 1.0}
        self._rounded_anew = not exact or bool(scaled)
        self._tables = Tables(files, source, planned, seed)
        self._plain = PlainModel(source, planned, dtype)
        self._protected = ProtectedModel(files, planned, dtype)
        self._moved: ProtectedModel | None = None
        self._native: tuple[PlainModel, ProtectedModel] | None = None
        if stored in NARROW:
            own: torch.dtype = getattr(torch, stored)
            self._native = PlainModel(source, planned, own), ProtectedModel(files, planned, own)
            if self._rounded_anew:
                moved = moved_within_rounding(own, seed, lambda tensor: not exact or tensor in scaled)
                self._moved = ProtectedModel(files, planned, dtype, moved)
        self._routers = [linear for linear in planned.architecture.linears if linear.after is After.ROUTING]
        self._tracks = [_Track(MARGIN, measured=self._moved is not None)]
        if self._moved and self._routers:
            self._tracks = [
                _Track(stored_margin(getattr(torch, stored)), measured=True),
                _Track(MARGIN, measured=False),
            ]
        self._native_picks = Picks(), Picks()
        self._native_states: tuple[dict[str, Tally], dict[str, Tally]] = {}, {}
        self._taken: dict[str, torch.Tensor] = {}
        rows = self._rows(source.largest_shard)
        longest = max(len(ids) for ids in (*inputs.random, *inputs.given))
        if longest > max(rows, LENGTH):
            allowed = f"at most {max(rows, LENGTH)} positions: more do not fit the memory that a certificate may take"
            raise ConfigurationError.because("length of a sequence", longest, allowed)
        self._batches = inputs.batches(min(rows, BATCH_ROWS))

    @property
    def steps(self) -> int:
        """Layers to run, the head counted as one, and the tables as one."""
        passes = 2 + (self._moved is not None) + 2 * (self._native is not None)
        return len(self._batches) * passes * (self._plain.layers + 1) + 1

    def run(self, advance: Advance = lambda step: None) -> Certificate:
        """The certificate; once. `advance` is told of every step. Whether it passed is the caller's to ask.

        Raises `CheckpointInvalid` where the source gives NaN or cannot be read, `IntegrityError` where the enclave
        part does not open.
        """
        self._advance = advance
        tables = self._tables.compare()
        advance(1)
        for batch in self._batches:
            self._compare(batch)
        return self._certificate(tables)

    def _rows(self, largest_shard: int) -> int:
        """Positions of a batch."""
        planned = self._plan
        states = planned.residual_width * (self._plain.layers + 2)
        widest = max(space.size for space in planned.architecture.spaces.values())
        item: int = getattr(torch, self._compute).itemsize
        position = (states + 3 * planned.vocabulary + 4 * min(widest, 8 * planned.residual_width)) * item
        key = 2 * 8 * planned.residual_width**2
        free = memory.bound(largest_shard) - memory.LIBRARIES - WORK_BYTES - key - self._plain.layer_bytes
        return max(1, min(free, BATCH_BYTES) // position)

    def _compare(self, batch: Batch) -> None:
        reference: dict[str, torch.Tensor] = {}
        routings = [Routings(batch.ids.shape, track.margin) for track in self._tracks]

        def route(router: str, scores: torch.Tensor, experts: torch.Tensor) -> None:
            for each in routings:
                each.add(router, scores, experts)

        expected = self._pass(partial(self._plain.logits, route=route), batch, reference.__setitem__)
        lengths: list[int] = batch.valid.sum(dim=1).tolist()
        for _, rows in _prefixes(expected, lengths):
            if not math.isfinite(rows.sum(dtype=torch.float64).item()):
                raise CheckpointInvalid.because("logits of the source", "NaN or infinite values", "finite values")
        for router, taken in routings[-1].taken.items():
            self._taken[router] = taken | self._taken.get(router, taken)
        counts = [(batch.valid & each.decided).sum(dim=1).tolist() for each in routings]
        observers = [
            self._against(reference, kept, track.states) for track, kept in zip(self._tracks, counts, strict=True)
        ]

        def observe(name: str, states: torch.Tensor) -> None:
            for each in observers:
                each(name, states)

        found = self._pass(self._protected.logits, batch, observe)
        moved = self._pass(self._moved.logits, batch, unseen) if self._moved else None
        for track, kept in zip(self._tracks, counts, strict=True):
            for sample, rows in _prefixes(expected, kept):
                track.picks[_kind(batch, sample)].add(rows, found[sample, : len(rows)])
            for sample, rows in _prefixes(found, kept) if moved is not None else ():
                track.noise.add(rows, moved[sample, : len(rows)])  # type: ignore[index]
            for sample, (count, length) in enumerate(zip(kept, lengths, strict=True)):
                track.undecided[_kind(batch, sample)] += length - count
        del found, moved
        if self._native:
            passes = self._native[0].logits, self._native[1].logits
            for run, picks, states, in_plain in zip(
                passes, self._native_picks, self._native_states, (True, False), strict=True
            ):
                logits = self._pass(run, batch, self._against(reference, counts[-1], states, in_plain=in_plain))
                for sample, rows in _prefixes(expected, counts[-1]):
                    picks.add(rows, logits[sample, : len(rows)])
                del logits

    def _pass(
        self, logits: Callable[[torch.Tensor, Observe], torch.Tensor], batch: Batch, observe: Observe
    ) -> torch.Tensor:
        """[samples, length, vocabulary] logits."""

        def observed(name: str, states: torch.Tensor) -> None:
            observe(name, states)
            if name.startswith("layer"):
                self._advance(1)

        found = logits(batch.ids, observed)
        self._advance(1)
        return found

    def _against(
        self,
        reference: dict[str, torch.Tensor],
        counts: Sequence[int],
        tallies: dict[str, Tally],
        *,
        in_plain: bool = False,
    ) -> Observe:
        """Compare what a pass shows with the reference's hidden states, keyed unless the pass is a plain one's."""
        key = self._plan.keys[self._plan.architecture.entry]
        if isinstance(key, HeadsKey):
            raise TypeError("a residual with heads")

        def compare(name: str, states: torch.Tensor) -> None:
            tally = tallies.setdefault(name, Tally())
            for sample, rows in _prefixes(reference[name], counts):
                tally.add(rows if in_plain else keyed(key, rows), states[sample, : len(rows)])

        return compare

    def _certificate(self, tables: tuple[TableRows, ...]) -> Certificate:
        track, groups = self._judged()
        overall = track.overall
        figures = overall.tally.figures()
        stored, scale = self._plan.dtype, figures.spread
        bound, peaks = track.bounds(scale, stored, self._compute, self._rounded_anew)
        return Certificate(
            stored_dtype=stored,
            compute_dtype=self._compute,
            seed=self._seed,
            samples=sum(group.sequences for group in groups),
            positions=overall.tally.rows,
            undecided=sum(track.undecided.values()),
            top1=overall.top1,
            top1_with_ties=overall.top1_with_ties(track.tie_width(scale, bound)),
            largest_difference=figures.largest,
            mean_difference=figures.mean,
            rms_difference=figures.rms,
            scale=scale,
            bound=bound,
            peaks=peaks,
            coverage=self._coverage(),
            tables=tables,
            native=self._native_figures(scale),
            groups=groups,
            layers=self._layers(track.states),
        )

    def _judged(self) -> tuple[_Track, tuple[Group, ...]]:
        """The first way to measure that leaves enough positions, or the last, and its figures."""
        for track in self._tracks:
            scale = track.overall.tally.figures().spread
            bound, _ = track.bounds(scale, self._plan.dtype, self._compute, self._rounded_anew)
            groups = tuple(track.groups(self._inputs, track.tie_width(scale, bound)))
            if all(group.enough for group in groups):
                break
        return track, groups

    def _coverage(self) -> Coverage:
        sequences = (*self._inputs.random, *self._inputs.given)
        return Coverage(
            ids=len(torch.unique(torch.cat(sequences))),
            vocabulary=self._plan.vocabulary,
            length=max(len(ids) for ids in sequences),
            max_positions=self._plan.max_positions,
            experts_reached=sum(int(taken.sum()) for taken in self._taken.values()),
            experts=sum(self._plan.architecture.width(router.writes) for router in self._routers),
        )

    def _native_figures(self, scale: float) -> Native | None:
        if self._native is None:
            return None
        plain, protected = self._native_picks
        return Native(
            plain_rms=plain.tally.rms / (scale or 1.0),
            protected_rms=protected.tally.rms / (scale or 1.0),
            plain_top1=plain.top1,
            protected_top1=protected.top1,
        )

    def _layers(self, states: dict[str, Tally]) -> tuple[Layer, ...]:
        def relative(tallies: dict[str, Tally], name: str) -> float | None:
            return tallies[name].figures().relative_rms if name in tallies else None

        plain, protected = self._native_states
        return tuple(
            Layer(
                name=name,
                differences=tally.figures(),
                native_plain_rms=relative(plain, name),
                native_protected_rms=relative(protected, name),
            )
            for name, tally in states.items()
        )


@dataclass
class _Track:
    """One way to tell rounding from a wrong key: what is left out, and what bounds the rest.

    `measured`: bounds are of what moving the weights within their rounding did, and not those of dtypes alone.
    """

    margin: float
    measured: bool
    picks: dict[str, Picks] = field(default_factory=lambda: {RANDOM: Picks(), GIVEN: Picks()})
    undecided: dict[str, int] = field(default_factory=lambda: {RANDOM: 0, GIVEN: 0})
    noise: Tally = field(default_factory=Tally)
    states: dict[str, Tally] = field(default_factory=dict)

    @property
    def overall(self) -> Picks:
        return self.picks[RANDOM] + self.picks[GIVEN]

    def groups(self, inputs: Inputs, width: float) -> Iterator[Group]:
        for name, sequences in ((RANDOM, inputs.random), (GIVEN, inputs.given)):
            if sequences:
                picks = self.picks[name]
                yield Group(
                    name=name,
                    sequences=len(sequences),
                    positions=picks.tally.rows,
                    undecided=self.undecided[name],
                    top1=picks.top1,
                    top1_with_ties=picks.top1_with_ties(width),
                    differences=picks.tally.figures(),
                )

    def bounds(self, scale: float, stored: str, compute: str, rounded_anew: bool) -> tuple[float, Peaks]:
        """For all logits, and for those that differ most."""
        noise, spread = self.noise.figures(), scale or 1.0
        if self.measured:
            width = PEAK_WIDTH / spread
            peaks = Peaks(
                logit=width * noise.largest, position=width * noise.worst_row_rms, id=width * noise.worst_column_rms
            )
            return min(BOUNDS[stored], ROUNDING_WIDTH * noise.rms / spread), peaks
        bound = max(BOUNDS[stored], BOUNDS[compute]) if rounded_anew else BOUNDS[compute]
        if self.noise.rows:  # of routings that rounding decides otherwise, which only bfloat16's bound has room for
            bound = max(bound, min(BOUNDS["bfloat16"], ROUNDING_WIDTH * noise.rms / spread))
        return bound, Peaks(logit=PEAK * bound, position=PEAK * bound, id=PEAK * bound)

    def tie_width(self, scale: float, bound: float) -> float:
        """Of what rounding does, never of what was found: a worse key must not excuse more."""
        return TIE_WIDTH * (self.noise.rms if self.measured else bound * scale)


def _prefixes(states: torch.Tensor, counts: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """(sample, its first rows) of [samples, length, width], as views: copies of logits would be large."""
    for sample, count in enumerate(counts):
        if count:
            yield sample, states[sample, :count]


def _kind(batch: Batch, sample: int) -> str:
    return GIVEN if batch.given[sample] else RANDOM
