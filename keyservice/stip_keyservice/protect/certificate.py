"""The equivalence certificate: that a protected instance computes what its source computes.

Plain model and protected instance run on the same seeded random token ids, and every logit of every position
is compared. Both compute in float64 for float64 checkpoints and in float32 for all others.

Bounds. Keys change the rounding and nothing else, so differences must be at the level of the stored dtype's
rounding: `BOUNDS` states for each dtype the largest root mean square of the differences, relative to the
spread (standard deviation) of the logits. A wrong key gives about 1; on a path that matters little to the
logits, less. Where dense keys round narrow dtypes anew, what that does depends on the model, so it is measured:
the protected model against itself with every weight moved at random within its rounding step. `ROUNDING_WIDTH`
times that is the bound there, and `BOUNDS` its ceiling. A position agrees where both pick the same id, or where
plain's own gap between the two picks is below `TIE_WIDTH` times that root mean square: there rounding decides.
All positions must agree.

For float16 and bfloat16 checkpoints, whose weights a dense key rounds anew, the certificate also says how far
either model is from the float32 reference when it computes in its own dtype. Their ratio is reported, not
bounded: over a few hundred positions of a small model it is noisy.

Limit: both models are held in memory, one after the other, in the computing dtype, and the reference's
`samples · length · vocabulary` logits, for narrow dtypes twice, with them.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field

from stip_keyservice.protect.protected_model import InstanceFiles, PlainModel, ProtectedModel
from stip_protocol.errors import CheckpointInvalid

BOUNDS = {"float64": 1e-5, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Largest relative root mean square of the differences, by stored dtype: some 100 times the rounding of one
operation for float32; for the narrow ones, the most that re-rounding every weight may add up to. For float64
the bound is not much smaller: transformers computes Llama's norms and rotary angles in float32 whatever the dtype."""
ROUNDING_WIDTH = 2.0
"""Differences over what rounding the keyed weights was measured to do: 0.75 to 1.2 on models with right keys."""
TIE_WIDTH = 8.0
"""A position is a tie where plain's gap between the two picks is below this many root mean square differences."""
EXACT_PRESETS = frozenset({"paper"})
"""Presets whose stored weights are bit-exact, so that the computing dtype's bound holds for every stored dtype."""
NARROW = frozenset({"float16", "bfloat16"})
"""Stored dtypes that are narrower than the one certificates compute in."""
LENGTH = 64
"""Positions of a sample, where the model has as many."""
SAMPLES_LIMIT = 64

Logits = Callable[[torch.Tensor], torch.Tensor]


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


class Certificate(_Figures):
    """What was compared and what came out. Differences are absolute; `scale` is the logits' standard deviation."""

    version: tuple[int, int] = (1, 0)
    salt: str = Field(default_factory=lambda: secrets.token_hex(16))
    """The manifest, which is public, digests the certificate: without it that would digest the source's logits."""
    stored_dtype: str
    compute_dtype: str
    seed: int
    samples: int
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
    torch: str = torch.__version__
    transformers: str = transformers.__version__

    @property
    def relative_rms(self) -> float:
        """Root mean square of the differences over the logits' spread."""
        return self.rms_difference / (self.scale or 1.0)

    @property
    def passed(self) -> bool:
        """Whether every position agrees and the differences are rounding. False for NaN."""
        return self.top1_with_ties == 1.0 and self.relative_rms <= self.bound

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
            "bound": self.bound,
            "positions": self.positions,
            "samples": self.samples,
            "seed": self.seed,
            "stored_dtype": self.stored_dtype,
            "compute_dtype": self.compute_dtype,
        }


def certify(
    files: InstanceFiles,
    source: Path,
    *,
    stored_dtype: str,
    max_positions: int,
    samples: int,
    seed: int = 0,
    advance: Callable[[int], None],
) -> Certificate:
    """Compare the instance in `files` with the checkpoint folder `source` on `samples` random sequences.

    `advance` is told of every finished sequence, `passes(stored_dtype, files.preset) * samples` in all. Raises
    `CheckpointInvalid` where the source itself gives NaN, `IntegrityError` where the parts cannot be loaded.
    Whether the certificate passed is the caller's to ask.
    """
    compute_name = "float64" if stored_dtype == "float64" else "float32"
    compute: torch.dtype = getattr(torch, compute_name)
    drawn = torch.randint(
        files.vocabulary,
        (samples, min(LENGTH, max_positions)),
        generator=torch.Generator().manual_seed(seed),
    )
    sequences = list(drawn)

    def run(model: PlainModel | ProtectedModel) -> list[torch.Tensor]:
        found = []
        for ids in sequences:
            found.append(model.logits(ids))
            advance(1)
        return found

    reference = run(PlainModel(source, compute))
    if not all(bool(torch.isfinite(logits).all()) for logits in reference):
        raise CheckpointInvalid.because("logits of the source", "NaN or infinite values", "finite values")
    protected = ProtectedModel(files, compute)
    found = run(protected)
    errors = _Errors.of(reference, found)
    rounded_anew = _rounded_anew(stored_dtype, files.preset)
    bound = BOUNDS[stored_dtype if rounded_anew else compute_name]
    if rounded_anew:
        protected.move_within_rounding(getattr(torch, stored_dtype), seed)
        bound = min(bound, ROUNDING_WIDTH * _Errors.of(found, run(protected)).rms / (errors.scale or 1.0))
    native = None
    if stored_dtype in NARROW:
        dtype: torch.dtype = getattr(torch, stored_dtype)
        plain_native = _Errors.of(reference, run(PlainModel(source, dtype)))
        protected_native = _Errors.of(reference, run(ProtectedModel(files, dtype)))
        native = Native(
            plain_rms=plain_native.rms / plain_native.scale,
            protected_rms=protected_native.rms / protected_native.scale,
            plain_top1=plain_native.top1,
            protected_top1=protected_native.top1,
        )
    return Certificate(
        stored_dtype=stored_dtype,
        compute_dtype=compute_name,
        seed=seed,
        samples=samples,
        positions=drawn.numel(),
        top1=errors.top1,
        top1_with_ties=errors.top1_with_ties,
        largest_difference=errors.largest,
        mean_difference=errors.mean,
        rms_difference=errors.rms,
        scale=errors.scale,
        bound=bound,
        native=native,
    )


def passes(stored_dtype: str, preset: str) -> int:
    """Forward passes that a certificate makes over each sequence."""
    return 2 + 2 * (stored_dtype in NARROW) + _rounded_anew(stored_dtype, preset)


def _rounded_anew(stored_dtype: str, preset: str) -> bool:
    """Whether stored weights differ from the source's by a rounding that shows when computing in float32."""
    return stored_dtype in NARROW and preset not in EXACT_PRESETS


class _Errors(_Figures):
    """Differences of one list of [n, vocabulary] logits from a reference."""

    top1: float
    top1_with_ties: float
    largest: float
    mean: float
    rms: float
    scale: float

    @classmethod
    def of(cls, reference: list[torch.Tensor], found: list[torch.Tensor]) -> Self:
        count = sum(logits.numel() for logits in reference)
        positions = sum(len(logits) for logits in reference)
        largest = total = squares = spread = 0.0
        same = 0
        gaps: list[torch.Tensor] = []
        for plain, other in zip(reference, found, strict=True):
            plain, other = plain.double(), other.double()
            difference = (plain - other).abs()
            largest = max(largest, difference.max().item()) if bool(torch.isfinite(difference).all()) else math.nan
            total += difference.sum().item()
            squares += difference.square().sum().item()
            spread += plain.std(dim=1).sum().item()
            picked, expected = other.argmax(1, keepdim=True), plain.argmax(1, keepdim=True)
            same += int((picked == expected).sum())
            gaps.append((plain.gather(1, expected) - plain.gather(1, picked)).flatten())
        rms = math.sqrt(squares / count)
        agreeing = int((torch.cat(gaps) <= TIE_WIDTH * rms).sum())
        return cls(
            top1=same / positions,
            top1_with_ties=agreeing / positions,
            largest=largest,
            mean=total / count,
            rms=rms,
            scale=spread / positions,
        )
