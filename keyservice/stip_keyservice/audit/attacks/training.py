"""Fits that attackers make: a linear classifier in closed form, and gradient descent with a fixed number of steps.

The same data and seed give the same fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stip_keyservice.audit.view import Floats, Ids

SHRINKAGE = 1e-2
"""Share of the features' mean variance added to each variance within classes: what keeps the inverse finite where
classes have one example, or none differ."""
WARM_UP = 0.1
"""Share of the steps in which the rate rises; after it, it falls as a cosine."""
CLIP = 1.0
"""Largest norm of a gradient."""


@dataclass(frozen=True)
class LinearClassifier:
    """Scores of labels as a linear function of features [d]."""

    labels: Ids
    """[c] the labels that were seen."""
    weight: NDArray[np.float64]
    """[c, d]."""
    bias: NDArray[np.float64]
    """[c]."""

    def best(self, features: Floats, count: int) -> Ids:
        """[n, count] labels for features [n, d], the best first; fewer where fewer were seen."""
        scores = features @ self.weight.T + self.bias
        return self.labels[np.argsort(-scores, axis=1, kind="stable")[:, :count]]


def discriminant(features: Floats, labels: Ids) -> LinearClassifier:
    """Linear discriminant analysis (Fisher 1936, Rao 1948) of features [n, d] with labels [n]: classes are Gaussians of
    one covariance, so log p(class | x) is linear in x."""
    seen, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    wide = features.astype(np.float64)
    means = np.zeros((len(seen), wide.shape[1]))
    np.add.at(means, place, wide)
    means /= counts[:, None]
    within = wide - means[place]
    covariance = within.T @ within / len(wide)
    spread = wide.var(axis=0).mean() or 1.0  # of a single label nothing varies
    covariance += SHRINKAGE * spread * np.eye(wide.shape[1])
    weight = np.asarray(np.linalg.solve(covariance, means.T).T, np.float64)
    return LinearClassifier(seen, weight, np.log(counts / len(wide)) - 0.5 * (weight * means).sum(axis=1))


def descend(
    parameters: Iterable[torch.nn.Parameter], loss: Callable[[int], torch.Tensor], *, steps: int, rate: float
) -> None:
    """Minimise `loss(step)` by AdamW (Loshchilov and Hutter 2019), so many steps."""
    learned = [each for each in parameters if each.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share(step, steps))
    for step in range(steps):
        optimiser.zero_grad()
        loss(step).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learned, CLIP)
        optimiser.step()
        schedule.step()


def _share(step: int, steps: int) -> float:
    """Of the largest rate, at one step."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def next_token_loss(logits: Callable[[torch.Tensor], torch.Tensor], texts: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats, of each next id of texts [b, n]; `logits` maps ids [b, n - 1] to [b, n - 1, V]."""
    scores = logits(texts[:, :-1])
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), texts[:, 1:].flatten())


@dataclass(frozen=True)
class Batches:
    """Pieces of texts in a seeded order, one batch a step."""

    pieces: torch.Tensor
    """[p, n] ids."""
    order: torch.Tensor
    """[steps, b] which pieces."""

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> torch.Tensor:
        return self.pieces[self.order[step]]


def batches(
    texts: Sequence[Ids], generator: np.random.Generator, *, most: int, passes: int, size: int, length: int
) -> Batches:
    """Batches of `size` pieces of `length` ids (or of the shortest text, where that is shorter): so many passes over
    all pieces, but at most `most` batches."""
    length = min(length, *(len(text) for text in texts))
    pieces = [text[at : at + length] for text in texts for at in range(0, len(text) - length + 1, length)]
    order = np.concatenate([generator.permutation(len(pieces)) for _ in range(passes)])
    steps = max(1, min(most, len(order) // size))
    return Batches(torch.from_numpy(np.stack(pieces)), torch.from_numpy(np.resize(order, (steps, size))))
