"""What is compared with what, sample by sample, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from benchmarks.machine import Machine

TIE_WIDTH = 8.0
"""A gap is a tie where it is below this many times what plain's own rounding typically moves it."""


@dataclass(frozen=True)
class Ties:
    """Where rounding decides what a plain model predicts; measured on the plain model alone."""

    width: float
    """Between two logits."""
    routing: torch.Tensor
    """bool [samples]: whether some router's choice at some position is a tie, so that another rounding may choose
    another expert and all logits may differ."""

    @classmethod
    def of(
        cls, reference: torch.Tensor, exact: torch.Tensor, margins: torch.Tensor, exact_margins: torch.Tensor
    ) -> Self:
        """From logits [samples, vocabulary] and routers' margins [samples, decisions] in float32 and in float64.

        Medians, because a sample that is routed elsewhere in float64 differs as no rounding does.
        """
        rounding = (exact.double() - reference.double()).square().mean(1).sqrt().median().item()
        routing = torch.zeros(len(reference), dtype=torch.bool)
        if margins.numel():
            routing = margins.amin(1) <= TIE_WIDTH * (exact_margins - margins).abs().median()
        return cls(TIE_WIDTH * rounding, routing)

    @classmethod
    def none(cls, samples: int) -> Self:
        return cls(0.0, torch.zeros(samples, dtype=torch.bool))

    def first(self, samples: int) -> Ties:
        return Ties(self.width, self.routing[:samples])


@dataclass(frozen=True)
class Difference:
    """Predictions against a reference, over `samples` samples. Logits are float32, differences absolute."""

    samples: int
    same: int
    """Samples where both pick the same id."""
    same_or_tied: int
    """The same, or where the reference's own gap between the two picks, or a router's, is a tie."""
    near_ties: int
    """Samples where the reference's two largest logits, or a router's, are a tie: all that a tie could excuse."""
    tie_width: float
    logits: float
    """Sum over the vocabulary, mean over samples."""
    probabilities: float
    """The same of the softmax."""
    logits_total: float
    """Sum over the vocabulary and all samples."""
    probabilities_total: float
    largest: float
    """Of one logit."""
    rms: float
    scale: float
    """Standard deviation of the reference's logits."""


@dataclass(frozen=True)
class Row:
    """One comparison of a family with the plain model in float32."""

    what: str
    difference: Difference


@dataclass(frozen=True)
class Narrow:
    """A model stored and computed in bfloat16 against the same plain weights computed in float32."""

    preset: str
    plain: Difference
    protected: Difference
    weights: Difference
    """Of protected with its stored weights, computed in float32: what rounding them anew does, without the rest."""
    only_plain: int
    """Samples where plain picks as the reference does and protected does not."""
    only_protected: int

    @property
    def ratio(self) -> float:
        """Protected error over plain error, root mean squares."""
        return self.protected.rms / self.plain.rms


@dataclass(frozen=True)
class FamilyResult:
    family: str
    parameters: int
    predicted: int
    """Different ids among the plain model's predictions."""
    routing_ties: int
    """Samples where a router's choice is a tie."""
    presets: list[Row]
    controls: list[Row]
    narrow: list[Narrow]
    refused: dict[str, str]
    """Presets that this model is refused, and why."""


@dataclass(frozen=True)
class Results:
    """Everything that is written down."""

    command: str
    machine: Machine
    seed: int
    samples: int
    length: int
    batch: int
    families: list[FamilyResult]
    seconds: float


def compare(reference: torch.Tensor, found: torch.Tensor, ties: Ties | None = None) -> Difference:
    """Hold `found` against `reference`, both float32 [samples, vocabulary]; without `ties` none counts as one.

    Raises `ValueError` where a logit is not finite.
    """
    ties = ties or Ties.none(len(reference))
    if not bool(torch.isfinite(reference).all() and torch.isfinite(found).all()):
        raise ValueError("logits that are not finite")
    expected, got = reference.double(), found.double()
    differences = (got - expected).abs()
    best, picked = expected.argmax(1, keepdim=True), got.argmax(1, keepdim=True)
    gap = (expected.gather(1, best) - expected.gather(1, picked)).flatten()
    first, second = expected.topk(2, dim=1).values.T
    logits = differences.sum(1)
    probabilities = (got.softmax(1) - expected.softmax(1)).abs().sum(1)
    same = (best == picked).flatten()
    return Difference(
        samples=len(expected),
        same=int(same.sum()),
        same_or_tied=int((same | (gap <= ties.width) | ties.routing).sum()),
        near_ties=int(((first - second <= ties.width) | ties.routing).sum()),
        tie_width=ties.width,
        logits=logits.mean().item(),
        probabilities=probabilities.mean().item(),
        logits_total=logits.sum().item(),
        probabilities_total=probabilities.sum().item(),
        largest=differences.max().item(),
        rms=differences.square().mean().sqrt().item(),
        scale=expected.std(1).mean().item(),
    )


def narrow(
    preset: str, reference: torch.Tensor, plain: torch.Tensor, protected: torch.Tensor, weights: torch.Tensor
) -> Narrow:
    """Both bfloat16 models against the float32 reference, sample by sample; `weights` as in `Narrow`."""
    expected = reference.argmax(1)
    right, kept = plain.argmax(1) == expected, protected.argmax(1) == expected
    return Narrow(
        preset,
        compare(reference, plain),
        compare(reference, protected),
        compare(reference, weights),
        only_plain=int((right & ~kept).sum()),
        only_protected=int((kept & ~right).sum()),
    )
