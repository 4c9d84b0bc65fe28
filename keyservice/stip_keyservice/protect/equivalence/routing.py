"""Where rounding alone decides which experts a position is sent to.

A router takes the largest few of its scores. Where the last one taken and the first one left are nearer than rounding
can tell apart, two right computations may take different experts, and what they give then differs by much more
than rounding. From such a position on a sequence says nothing about keys: later positions attend to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

MARGIN = 32 * torch.finfo(torch.float32).eps
"""Scores nearer than this, relative to the largest of a position, are not told apart by float32, in which
transformers takes the largest whatever it computes in. Between right models of 32 layers 999 of 1000 scores differed
by less than a quarter of this."""
STORED_STEPS = 4.0
"""The same where weights were rounded anew, in steps (eps) of the stored dtype."""


def stored_margin(dtype: torch.dtype) -> float:
    """Scores nearer than this are not told apart once every weight has been rounded anew to `dtype`."""
    return STORED_STEPS * torch.finfo(dtype).eps


@dataclass
class Routings:
    """What the routers of the plain model decided in one pass over [samples, length] positions."""

    shape: torch.Size
    margin: float
    undecided: torch.Tensor = field(init=False)
    """[samples, length] bool."""
    taken: dict[str, torch.Tensor] = field(default_factory=dict)
    """[experts] bool by router: which were sent a position."""

    def __post_init__(self) -> None:
        self.undecided = torch.zeros(self.shape, dtype=torch.bool)

    def add(self, router: str, scores: torch.Tensor, experts: torch.Tensor) -> None:
        """Scores [positions, experts] before any softmax, and the [positions, few] experts that were taken."""
        taken = self.taken.setdefault(router, torch.zeros(scores.shape[1], dtype=torch.bool))
        taken[experts.flatten()] = True
        if (few := experts.shape[1]) < scores.shape[1]:
            largest = scores.double().topk(few + 1, dim=1).values
            gap, size = largest[:, few - 1] - largest[:, few], scores.abs().amax(dim=1)
            self.undecided |= (gap <= self.margin * size).view(self.shape)

    @property
    def decided(self) -> torch.Tensor:
        """[samples, length] bool: positions before the first undecided one of their sequence."""
        return self.undecided.cumsum(dim=1) == 0
