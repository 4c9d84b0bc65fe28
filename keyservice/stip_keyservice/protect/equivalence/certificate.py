"""The equivalence certificate: that a protected instance computes what its source computes.

Plain model and protected instance run on the same token ids, seeded random ones and given ones, and are
compared layer by layer and in every logit of every position. Both compute in float64 for float64 checkpoints
and in float32 for all others.

Bounds. Keys change the rounding and nothing else, so differences must be at the level of the stored dtype's
rounding: `BOUNDS` states for each dtype the largest root mean square of the differences, relative to the
spread (standard deviation) of the logits. A wrong key gives about 1; on a path that matters little to the
logits, less. Where dense keys round narrow dtypes anew, what that does depends on the model, so it is measured:
the protected model against itself with every weight moved at random within its rounding step. `ROUNDING_WIDTH`
times that is the bound there, and `BOUNDS` its ceiling. A position agrees where both pick the same id, or where
plain's own gap between the two picks is below `TIE_WIDTH` times that root mean square: there rounding decides.
All positions must agree, and the bound holds for random and for given inputs by themselves.

Layers. Hidden states after the entry rows, after every decoder layer and after the final norm are compared in
keyed coordinates: K·h of the plain ones, K the key of the residual, in float64 (a `Centred` key drops the mean,
which nothing reads). Where norms are folded, the plain final norm is taken without its scale and shift, which
lie in the head then. Layers say where a difference begins; what passes is decided on the logits, because a
hidden state may differ where nothing reads it.

For float16 and bfloat16 checkpoints, whose weights a dense key rounds anew, the certificate also says how far
either model is from the float32 reference when it computes in its own dtype. Their ratio is reported, not
bounded: over a few hundred positions of a small model it is noisy.

Routers of experts pick the largest few: where two are nearly equal, rounding sends a position elsewhere, and its
difference is large. In narrow dtypes the measured bound of such a model is therefore wide, up to its ceiling.

Memory: one layer of one model at a time in the computing dtype, and for every position of a batch its hidden
states after every layer and twice its logits: batches are cut so that this stays below `BATCH_BYTES`. Each
layer is read once a pass and batch.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field

from stip_keyservice.protect.equivalence.comparison import Differences, Picks, Tally, keyed
from stip_keyservice.protect.equivalence.inputs import GIVEN, RANDOM, Batch, Inputs
from stip_keyservice.protect.equivalence.protected_model import InstanceFiles, PlainModel, ProtectedModel
from stip_keyservice.protect.equivalence.streamed_model import Observe
from stip_keyservice.protect.equivalence.weights import moved_within_rounding
from stip_keyservice.protect.plan import Plan
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_protocol.errors import CheckpointInvalid
from stip_protocol.keys import HeadsKey

BOUNDS = {"float64": 1e-5, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Largest relative root mean square of the differences, by stored dtype: some 100 times the rounding of one
operation for float32; for the narrow ones, the most that re-rounding every weight may add up to. For float64
the bound is not much smaller: transformers computes Llama's norms and rotary angles in float32 whatever the dtype."""
ROUNDING_WIDTH = 2.0
"""Differences over what rounding the keyed weights was measured to do: 0.75 to 1.2 on models with right keys."""
TIE_WIDTH = 8.0
"""A position is a tie where plain's gap between the two picks is below this many root mean square differences."""
EXACT_PRESETS = frozenset({"paper"})
"""Presets whose stored weights are bit-exact, so that the computing dtype's bound holds for every stored dtype:
all but the rows of a table that the enclave holds scaled (Gemma), which are rounded anew."""
NARROW = frozenset({"float16", "bfloat16"})
"""Stored dtypes that are narrower than the one certificates compute in."""
LENGTH = 64
"""Positions of a random sample, where the model has as many."""
SAMPLES_LIMIT = 64
BATCH_BYTES = 1 << 30
"""Bytes of a batch's hidden states and logits."""
BATCH_ROWS = 4096
"""Positions of the largest batch: bounds what is alive inside one layer."""

Advance = Callable[[int], None]
"""Told how many layers more have run."""


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Native(_Figures):
    """Errors against the float32 reference when computing in the stored dtype, relative to the logits' spread."""

    plain_rms: float
    protected_rms: float
    plain_top1: float
    protected_top1: float

    @property
    def ratio(self) -> float:
        """Protected error over plain error."""
        return self.protected_rms / self.plain_rms if self.plain_rms else math.inf


class Layer(_Figures):
    """Hidden states at one place: `entry`, `layer 0`, ..., `final norm`. In keyed coordinates."""

    name: str
    differences: Differences
    native_plain_rms: float | None
    """The source in its stored dtype against the reference, relative; None where that is the computing dtype."""
    native_protected_rms: float | None


class Group(_Figures):
    """The figures of random or of given inputs alone."""

    name: str
    sequences: int
    positions: int
    top1: float
    top1_with_ties: float
    differences: Differences


class Certificate(_Figures):
    """What was compared and what came out. Differences are absolute; `scale` is the logits' standard deviation."""

    version: tuple[int, int] = (1, 1)
    salt: str = Field(default_factory=lambda: secrets.token_hex(16))
    """The manifest, which is public, digests the certificate: without it that would digest the source's logits."""
    stored_dtype: str
    compute_dtype: str
    seed: int
    samples: int
    """Compared sequences."""
    positions: int
    """Compared positions over all samples."""
    top1: float
    """Share of positions where both pick the same id."""
    top1_with_ties: float
    """The same, where a tie within the error counts as agreement."""
    largest_difference: float
    mean_difference: float
    rms_difference: float
    scale: float
    bound: float
    """Largest relative root mean square that passes."""
    native: Native | None
    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    torch: str = torch.__version__
    transformers: str = transformers.__version__

    @property
    def relative_rms(self) -> float:
        """Root mean square of the differences over the logits' spread."""
        return self.rms_difference / (self.scale or 1.0)

    @property
    def passed(self) -> bool:
        """Whether every position agrees and the differences are rounding. False for NaN."""
        return all(
            group.top1_with_ties == 1.0 and group.differences.relative_rms <= self.bound for group in self.groups
        )

    @property
    def departs(self) -> str | None:
        """The first place whose relative root mean square is not within the bound; None where there is none."""
        return next((layer.name for layer in self.layers if not layer.differences.relative_rms <= self.bound), None)

    def summary(self) -> dict[str, Any]:
        """What the public manifest says: relative figures only, since the logits' scale would tell of the source."""
        scale = self.scale or 1.0
        return {
            "passed": self.passed,
            "top1": self.top1,
            "top1_with_ties": self.top1_with_ties,
            "relative_largest": self.largest_difference / scale,
            "relative_mean": self.mean_difference / scale,
            "relative_rms": self.relative_rms,
            "relative_rms_of_layers": max(layer.differences.relative_rms for layer in self.layers),
            "bound": self.bound,
            "positions": self.positions,
            "samples": self.samples,
            "seed": self.seed,
            "stored_dtype": self.stored_dtype,
            "compute_dtype": self.compute_dtype,
        }


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
        where the parts cannot be.
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
        self._picks = {RANDOM: Picks(), GIVEN: Picks()}
        self._noise = Picks()
        self._native_picks = Picks(), Picks()
        self._states: dict[str, Tally] = {}
        self._native_states: tuple[dict[str, Tally], dict[str, Tally]] = {}, {}
        self._batches = inputs.batches(self._rows())

    @property
    def steps(self) -> int:
        """Layers to run, the head counted as one."""
        passes = 2 + (self._moved is not None) + 2 * (self._native is not None)
        return len(self._batches) * passes * (self._plain.layers + 1)

    def run(self, advance: Advance = lambda step: None) -> Certificate:
        """The certificate; once. `advance` is told of every step. Whether it passed is the caller's to ask.

        Raises `CheckpointInvalid` where the source gives NaN or cannot be read, `IntegrityError` where the enclave
        part does not open.
        """
        self._advance = advance
        for batch in self._batches:
            self._compare(batch)
        return self._certificate()

    def _rows(self) -> int:
        """Positions of a batch: hidden states after every layer, logits of two passes and one pass under way."""
        planned = self._plan
        values = planned.residual_width * (self._plain.layers + 2) + 3 * planned.vocabulary
        item: int = getattr(torch, self._compute).itemsize
        return max(1, min(BATCH_ROWS, BATCH_BYTES // (values * item)))

    def _compare(self, batch: Batch) -> None:
        reference: dict[str, torch.Tensor] = {}

        def keep(name: str, states: torch.Tensor) -> None:
            reference[name] = states[batch.valid]

        expected = self._pass(self._plain, batch, keep)
        if not math.isfinite(expected.sum(dtype=torch.float64).item()):
            raise CheckpointInvalid.because("logits of the source", "NaN or infinite values", "finite values")
        found = self._pass(self._protected, batch, self._against(reference, batch, self._states))
        given = batch.given[:, None].expand_as(batch.valid)[batch.valid]
        for name, here in ((RANDOM, ~given), (GIVEN, given)):
            if bool(here.any()):
                self._picks[name].add(expected[here], found[here])
        if self._moved:
            self._noise.add(found, self._pass(self._moved, batch, _ignore))
        del found
        if self._native:
            (plain, protected), (of_plain, of_protected) = self._native, self._native_states
            plain_logits = self._pass(plain, batch, self._against(reference, batch, of_plain, in_plain=True))
            self._native_picks[0].add(expected, plain_logits)
            del plain_logits
            self._native_picks[1].add(
                expected, self._pass(protected, batch, self._against(reference, batch, of_protected))
            )

    def _pass(self, model: PlainModel | ProtectedModel, batch: Batch, observe: Observe) -> torch.Tensor:
        """[n, vocabulary] logits of the batch's n positions."""

        def observed(name: str, states: torch.Tensor) -> None:
            observe(name, states)
            if name.startswith("layer"):
                self._advance(1)

        logits = model.logits(batch.ids, observed)[batch.valid]
        self._advance(1)
        return logits

    def _against(
        self, reference: dict[str, torch.Tensor], batch: Batch, tallies: dict[str, Tally], *, in_plain: bool = False
    ) -> Observe:
        """Compare what a pass shows with the reference's hidden states, keyed unless the pass is a plain one's."""
        key = self._plan.keys[self._plan.architecture.entry]
        if isinstance(key, HeadsKey):
            raise TypeError("a residual with heads")

        def compare(name: str, states: torch.Tensor) -> None:
            expected = reference[name] if in_plain else keyed(key, reference[name])
            tallies.setdefault(name, Tally()).add(expected, states[batch.valid])

        return compare

    def _certificate(self) -> Certificate:
        inputs, planned, overall = self._inputs, self._plan, self._picks[RANDOM] + self._picks[GIVEN]
        figures = overall.tally.figures()
        groups = tuple(
            Group(
                name=name,
                sequences=len(sequences),
                positions=picks.tally.rows,
                top1=picks.top1,
                top1_with_ties=picks.top1_with_ties(TIE_WIDTH * picks.tally.rms),
                differences=picks.tally.figures(),
            )
            for name, sequences, picks in (
                (RANDOM, inputs.random, self._picks[RANDOM]),
                (GIVEN, inputs.given, self._picks[GIVEN]),
            )
            if sequences
        )
        return Certificate(
            stored_dtype=planned.dtype,
            compute_dtype=self._compute,
            seed=self._seed,
            samples=sum(group.sequences for group in groups),
            positions=inputs.positions,
            top1=overall.top1,
            top1_with_ties=overall.top1_with_ties(TIE_WIDTH * figures.rms),
            largest_difference=figures.largest,
            mean_difference=figures.mean,
            rms_difference=figures.rms,
            scale=figures.spread,
            bound=self._bound(figures.spread),
            native=self._native_figures(figures.spread),
            groups=groups,
            layers=self._layers(),
        )

    def _bound(self, scale: float) -> float:
        stored = self._plan.dtype
        if self._moved is not None:
            return min(BOUNDS[stored], ROUNDING_WIDTH * self._noise.tally.rms / (scale or 1.0))
        return max(BOUNDS[stored], BOUNDS[self._compute]) if self._rounded_anew else BOUNDS[self._compute]

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

    def _layers(self) -> tuple[Layer, ...]:
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
            for name, tally in self._states.items()
        )


def _ignore(name: str, states: torch.Tensor) -> None:
    """Nobody looks."""
