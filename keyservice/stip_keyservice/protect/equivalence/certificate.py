"""The equivalence certificate: that a protected instance computes what its source computes, as figures and bounds.

`certification` makes it: plain model and protected instance run on the same token ids, seeded random ones and given
ones, and are compared layer by layer and in every logit of every position. Both compute in float64 for float64
checkpoints and in float32 for all others. `tables` compares every row that the enclave holds, run or not.

Bounds. Keys change the rounding and nothing else, so differences must be at the level of the stored dtype's
rounding: `BOUNDS` states for each dtype the largest root mean square of the differences, relative to the
spread (standard deviation) of the logits. A wrong key gives about 1; on a path that matters little to the
logits, less. Where dense keys round narrow dtypes anew, what that does depends on the model, so it is measured:
the protected model against itself with every weight moved at random within its rounding step. `ROUNDING_WIDTH`
times that is the bound there, and `BOUNDS` its ceiling. What is wrong in a few ids or positions hardly shows in
figures of all, so the single logit, the position and the id that differ most have bounds too (`Peaks`), from the
same measurement. A position agrees where both pick the same id, or where plain's own gap between the two picks is
at most `TIE_WIDTH` times what rounding was measured or is allowed to do: there rounding decides. What was found
never widens a bound. All positions must agree, and the bounds hold for random and for given inputs by themselves.

Layers. Hidden states after the entry rows, after every decoder layer and after the final norm are compared in
keyed coordinates: K·h of the plain ones, K the key of the residual, in float64 (a `Centred` key drops the mean,
which nothing reads). Where norms are folded, the plain final norm is taken without its scale and shift, which
lie in the head then. Layers say where a difference begins; what passes is decided on the logits, because a
hidden state may differ where nothing reads it.

For float16 and bfloat16 checkpoints, whose weights a dense key rounds anew, the certificate also says how far
either model is from the float32 reference when it computes in its own dtype. Their ratio is reported, not
bounded: over a few hundred positions of a small model it is noisy.

Routers of experts pick the largest few. Positions from which on float32 rounding decides that are left out
(`routing`), and counted; of each kind of inputs `COMPARED_SHARE` must remain. The re-rounding of narrow dtypes decides
far more of them, which cannot be left out: there the measured bound of such a model is wide, up to its ceiling.
"""

from __future__ import annotations

import math
import secrets
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field

from stip_keyservice.protect.equivalence.comparison import Differences
from stip_keyservice.protect.equivalence.tables import TableRows

BOUNDS = {"float64": 1e-5, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Largest relative root mean square of the differences, by stored dtype: some 100 times the rounding of one
operation for float32; for the narrow ones, the most that re-rounding every weight may add up to. For float64
the bound is not much smaller: transformers computes Llama's norms and rotary angles in float32 whatever the dtype."""
ROUNDING_WIDTH = 2.0
"""Differences over what rounding the keyed weights was measured to do: 0.75 to 1.2 on models with right keys."""
PEAK_WIDTH = 4.0
"""The same for the logit, the position and the id that differ most."""
PEAK = 10.0
"""Where nothing is measured: bounds of those three, over that of all differences."""
TIE_WIDTH = 8.0
"""A position is a tie where plain's gap between the two picks is at most this many root mean square differences."""
COMPARED_SHARE = 1 / 8
"""Least share of positions, of each kind of inputs, that no undecided routing leaves out."""


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


class Peaks(_Figures):
    """Largest relative differences that pass: of one logit, and the root mean squares of one position and one id."""

    logit: float
    position: float
    id: float


class Group(_Figures):
    """The figures of random or of given inputs alone."""

    name: str
    sequences: int
    positions: int
    """Compared ones."""
    undecided: int
    """Positions left out because rounding decides a routing there or before."""
    top1: float
    top1_with_ties: float
    differences: Differences

    @property
    def enough(self) -> bool:
        """Whether enough positions were compared."""
        return self.positions >= COMPARED_SHARE * (self.positions + self.undecided)


class Coverage(_Figures):
    """How much of a model the runs reached."""

    ids: int
    """Different token ids that entered."""
    vocabulary: int
    length: int
    """Positions of the longest sequence."""
    max_positions: int
    experts_reached: int
    """Experts of all layers that a position was sent to; 0 of 0 where the model has none."""
    experts: int


class Certificate(_Figures):
    """What was compared and what came out. Differences are absolute; `scale` is the logits' standard deviation."""

    version: tuple[int, int] = (1, 2)
    salt: str = Field(default_factory=lambda: secrets.token_hex(16))
    """The manifest, which is public, digests the certificate: without it that would digest the source's logits."""
    stored_dtype: str
    compute_dtype: str
    seed: int
    samples: int
    """Compared sequences."""
    positions: int
    """Compared positions over all samples."""
    undecided: int
    """Positions left out because rounding decides a routing there or before."""
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
    peaks: Peaks
    coverage: Coverage
    tables: tuple[TableRows, ...]
    """The enclave's, every row."""
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
        return self.fault is None

    @property
    def fault(self) -> str | None:
        """The first bound that is not kept, in words that tell no absolute figure; None where all are."""
        for table in self.tables:
            if not table.passed:
                return f"rows of {table.name} differ by {table.largest:.1e} of their length, allowed {table.bound:.1e}"
        for group in self.groups:
            found, what = group.differences, f"{group.name} inputs"
            if not group.enough:
                return f"{what}: rounding decides routings in {group.undecided} positions and leaves {group.positions}"
            if group.top1_with_ties != 1.0:
                return f"{what}: top-1 agreement {group.top1_with_ties:.4f} (ties counted), allowed 1"
            for name, figure, bound in (
                ("all logits, rms", found.relative_rms, self.bound),
                ("one logit", found.relative_largest, self.peaks.logit),
                ("one position, rms", found.relative_worst_row, self.peaks.position),
                ("one id, rms", found.relative_worst_column, self.peaks.id),
            ):
                if not figure <= bound:
                    return f"{what}, {name}: {figure:.1e} of the logits' spread, allowed {bound:.1e}"
        return None

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
            "undecided": self.undecided,
            "table_rows": sum(table.rows for table in self.tables),
            "experts": self.coverage.experts,
            "experts_reached": self.coverage.experts_reached,
            "samples": self.samples,
            "seed": self.seed,
            "stored_dtype": self.stored_dtype,
            "compute_dtype": self.compute_dtype,
        }
