"""J: extraction with a helping user's rows and text (STIP, NDSS 2026, Fig. 9b and Table V).

**Linear fit**: a table of the attacker's own is mapped to the keyed rows that the user's sessions label. The error on
rows that were not fitted says whether the attacker's table has anything to do with the model's.

**Fine-tuning**: models trained on the user's text and public text, with and without the server part: `from scratch`,
`train-transformed` (the server part is the start, its tables are new), `train-linear` (the server part stays, linear
maps lead in and out). They are small and trained for seconds: not comparable in scale with the paper.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from stip_keyservice.audit.attacks import Attack
from stip_keyservice.audit.attacks.public_text import GUESSES
from stip_keyservice.audit.attacks.stolen import Assembled, Tabulated, accomplice_of, tabulate, text_of
from stip_keyservice.audit.attacks.training import Batches, batches, descend, next_token_loss
from stip_keyservice.audit.claims import Claims, Point, Stolen
from stip_keyservice.audit.knowledge import Grant
from stip_keyservice.audit.view import Floats, Ids, View

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Fitted rows over the width: the points of the curve, as far as there are so many."""
TESTED = 64
"""Labelled rows that no fit of the curve uses."""
STEPS, PASSES = 80, 4
"""Steps of training, or so many passes over the text, where it is short: more would learn it by heart."""
SIZE, LENGTH = 8, 64
"""Pieces of a batch, and their ids."""
RATE = 2e-3
INITIAL = 0.02
"""Standard deviation of new weights, as Llama and GPT-2 begin."""


@dataclass(frozen=True)
class LinearFit:
    """Keyed rows from an attacker's own: y = M·(x - x̄) + ȳ."""

    matrix: NDArray[np.float64]
    """[d, e]."""
    shift: NDArray[np.float64]
    """[d]: ȳ - M·x̄."""

    @classmethod
    def of(cls, rows: Floats, keyed: Floats) -> LinearFit:
        """Least squares over pairs of rows [n, e] and [n, d], the shortest solution where it is not unique."""
        wide, goal = rows.astype(np.float64), keyed.astype(np.float64)
        solved = np.linalg.lstsq(wide - wide.mean(axis=0), goal - goal.mean(axis=0), rcond=1e-6)[0]
        return cls(solved.T, goal.mean(axis=0) - wide.mean(axis=0) @ solved)

    def __call__(self, rows: Floats) -> NDArray[np.float64]:
        """[n, d] of rows [n, e]."""
        mapped: NDArray[np.float64] = rows @ self.matrix.T + self.shift
        return mapped


def _run(view: View) -> Claims:
    labelled = accomplice_of(view).labelled
    table = tabulate(view, labelled)
    known = view.generator("extraction rows").permutation(np.flatnonzero(table.known))
    whole = LinearFit.of(view.entry.rows[known], table.rows[known])
    points, figures = _curve(view, table, known)
    square = whole.matrix.shape[0] == whole.matrix.shape[1]
    return Claims(
        residual=whole.matrix if square and np.isfinite(view.entry.drift) else None,
        stolen=_trained(view, table, whole, [text_of(each) for each in labelled] + list(view.public_text)),
        points=points,
        figures=figures,
    )


def _curve(view: View, table: Tabulated, known: Ids) -> tuple[list[Point], dict[str, float]]:
    """The victims' rows looked up in the mapped table, and the relative error on rows that were not fitted."""
    tested, rest = known[:TESTED], known[TESTED:]
    points, figures = [], {}
    for width in WIDTHS:
        count = round(width * table.rows.shape[1])
        if count > len(rest):
            break
        fit = LinearFit.of(view.entry.rows[rest[:count]], table.rows[rest[:count]])
        goal = table.rows[tested]
        error = np.linalg.norm(fit(view.entry.rows[tested]) - goal) / np.linalg.norm(goal - goal.mean(axis=0))
        figures[f"relative error of the linear fit, {count} rows"] = float(error)
        mapped = fit(view.entry.rows).astype(np.float32)
        tokens = [_nearest(mapped, table, view.rows(each)) for each in view.victims]
        points.append(Point("labelled rows of a linear fit", count, tokens))
    return points, figures


def _nearest(mapped: Floats, table: Tabulated, rows: Floats) -> Ids:
    """[n, GUESSES] tokens whose mapped rows [V, d] are nearest to a session's rows [n, d]."""
    tokens = rows - table.shifts(len(rows))
    distances = (mapped**2).sum(axis=1) - 2 * tokens @ mapped.T
    return np.argsort(distances, axis=1, kind="stable")[:, :GUESSES]


def _trained(view: View, table: Tabulated, fit: LinearFit, texts: Sequence[Ids]) -> list[tuple[str, Stolen]]:
    """The models, each after the same text in the same order."""
    order = batches(texts, view.generator("extraction texts"), most=STEPS, passes=PASSES, size=SIZE, length=LENGTH)
    stolen: list[tuple[str, Stolen]] = []
    for name, build in BUILDS.items():
        with torch.random.fork_rng():
            torch.manual_seed(int(view.generator(name).integers(2**31)))
            model = build(view, table, fit).train(False)  # a family's dropout would make every answer another one
            descend(model.parameters(), _loss(model, order), steps=len(order), rate=RATE)
        stolen.append((name, model.requires_grad_(False)))
    return stolen


def _loss(model: Assembled, order: Batches) -> Callable[[int], torch.Tensor]:
    return lambda step: next_token_loss(model, order[step])


def _from_scratch(view: View, table: Tabulated, fit: LinearFit) -> Assembled:
    """The same shape, and nothing of the server part."""
    made: Any = transformers.AutoModel
    blocks = made.from_config(copy.deepcopy(view.server.model.config))
    return Assembled(_new_table(view, table, INITIAL), blocks, _new_head(view, table))


def _train_transformed(view: View, table: Tabulated, fit: LinearFit) -> Assembled:
    """The server part is trained on, with a new table as large as the rows it is used to, and a new head."""
    blocks = copy.deepcopy(view.server.model.base_model).requires_grad_(True)
    return Assembled(_new_table(view, table, float(table.rows.std())), blocks, _new_head(view, table))


def _train_linear(view: View, table: Tabulated, fit: LinearFit) -> Assembled:
    """The server part between linear maps: in from the attacker's table, beginning with the fit; out to its head."""
    head = view.surrogate.model.get_output_embeddings().weight.detach()
    into = torch.nn.Linear(*reversed(fit.matrix.shape))
    out = torch.nn.Linear(table.rows.shape[1], head.shape[1])
    leave = torch.nn.Linear(head.shape[1], head.shape[0], bias=False)
    with torch.no_grad():
        into.weight.copy_(torch.from_numpy(fit.matrix))
        into.bias.copy_(torch.from_numpy(fit.shift))
        leave.weight.copy_(head)
    leave.requires_grad_(False)
    blocks = copy.deepcopy(view.server.model.base_model).requires_grad_(False)
    own = torch.nn.Embedding(view.vocabulary, view.entry.rows.shape[1])
    own.weight = torch.nn.Parameter(torch.from_numpy(view.entry.rows), requires_grad=False)
    positions = None if table.positions is None else torch.from_numpy(table.positions)
    return Assembled(torch.nn.Sequential(own, into), blocks, torch.nn.Sequential(out, leave), positions)


def _new_table(view: View, table: Tabulated, deviation: float) -> torch.nn.Embedding:
    made = torch.nn.Embedding(view.vocabulary, table.rows.shape[1])
    torch.nn.init.normal_(made.weight, std=deviation)
    return made


def _new_head(view: View, table: Tabulated) -> torch.nn.Linear:
    made = torch.nn.Linear(table.rows.shape[1], view.vocabulary, bias=False)
    torch.nn.init.normal_(made.weight, std=INITIAL)
    return made


BUILDS: dict[str, Callable[[View, Tabulated, LinearFit], Assembled]] = {
    "from scratch": _from_scratch,
    "train-transformed": _train_transformed,
    "train-linear": _train_linear,
}
"""By the names of Table V."""

ATTACK = Attack(
    letter="J",
    name="linear fit and fine-tuning",
    source="STIP, NDSS 2026, Fig. 9b and Table V",
    assumes="a user of the same instance who helps; for the fit also a table in which tokens lie as in the model's",
    cost="the helping user's ordinary traffic; one least-squares fit; seconds of training (at scale: a training run)",
    rows=("accomplice",),
    needs=frozenset({Grant.ACCOMPLICE}),
    run=_run,
)
