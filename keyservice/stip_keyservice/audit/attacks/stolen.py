"""What a helping user's sessions label, and models put together from stolen pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stip_keyservice.audit.claims import NO_GUESS
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.view import Accomplice, Floats, Ids, Labelled, NotApplicable, Seen, View

SAME = 1e-4
"""Relative difference up to which two rows are one row, rounded."""
SWEEPS = 64
"""Alternations between tokens' and positions' parts of a row: they converge geometrically."""
BLOCK = 256
"""Ids embedded at once."""


def accomplice_of(view: View) -> Accomplice:
    """Raises `NotApplicable` where no user of the instance helps, or none said anything."""
    if view.accomplice is None:
        raise NotApplicable("no user of this instance helps the operator")
    if not view.accomplice.labelled:
        raise NotApplicable("the helping user had no session")
    return view.accomplice


def text_of(session: Labelled) -> Ids:
    """[n + 1] true ids: those that were fed, and the answer behind the last one; [n] where nobody asked for that."""
    return np.append(session.ids, session.answers[session.seen.asked == len(session.ids) - 1])


def by_position(seen: Seen, read: Ids) -> Ids:
    """[n, k] guesses by position from `read` [m, k] by answer: the answer behind position p is the id at p + 1, if that
    was fed."""
    guesses = np.full((len(seen), read.shape[1]), NO_GUESS)
    behind = seen.asked[: len(read)] + 1
    fed = behind < len(seen)
    guesses[behind[fed]] = read[fed]
    return guesses


def rows_of(view: View, sessions: Sequence[Seen]) -> Iterator[Floats]:
    """What enters the first layer of each session [n, d]. Under `throughput`, where positions are never learned, each
    id is embedded once."""
    table: Floats | None = None
    for seen in sessions:
        if seen.ids is None:
            yield view.rows(seen)
            continue
        if table is None:
            blocks = np.array_split(np.arange(view.vocabulary), -(-view.vocabulary // BLOCK))
            table = np.concatenate([view.server.rows(block) for block in blocks])
        yield table[seen.ids]


@dataclass(frozen=True)
class Tabulated:
    """The keyed table, as far as labelled sessions show it."""

    rows: Floats
    """[V, d]; the mean row where a token was never seen."""
    positions: Floats | None
    """[P, d] parts of learned positions; None where a token's row is the same everywhere."""
    known: NDArray[np.bool_]
    """[V] tokens that were seen."""

    def enter(self, ids: Ids) -> Floats:
        """[n, d]: what enters the first layer for ids [n]."""
        return self.rows[ids] + self.shifts(len(ids))

    def shifts(self, count: int) -> Floats:
        """[count, d] what the first positions add: nothing where none are learned. Positions never seen look like the
        last one that was."""
        if self.positions is None:
            return np.zeros((count, self.rows.shape[1]), np.float32)
        return self.positions[np.minimum(np.arange(count), len(self.positions) - 1)]


def tabulate(view: View, labelled: Sequence[Labelled]) -> Tabulated:
    """The table from rows with labels. Where positions are learned, x = token + position is solved for both by
    alternating means (least squares of an additive model; what is constant goes to the tokens)."""
    ids = np.concatenate([session.ids for session in labelled])
    rows = np.concatenate(list(rows_of(view, [session.seen for session in labelled]))).astype(np.float64)
    place = np.concatenate([np.arange(len(session.ids)) for session in labelled])
    tokens = _means(rows, ids, view.vocabulary)
    positions = np.zeros((place.max() + 1, rows.shape[1]))
    learned = bool(np.abs(rows - tokens[ids]).max() > SAME * np.abs(rows).max())
    for _ in range(SWEEPS if learned else 0):
        positions = _means(rows - tokens[ids], place, len(positions))
        positions -= positions.mean(axis=0)
        tokens = _means(rows - positions[place], ids, view.vocabulary)
    known = np.zeros(view.vocabulary, bool)
    known[ids] = True
    tokens[~known] = tokens[known].mean(axis=0)
    return Tabulated(tokens.astype(np.float32), positions.astype(np.float32) if learned else None, known)


def _means(values: NDArray[np.float64], groups: Ids, count: int) -> NDArray[np.float64]:
    """[count, d] mean of the values [n, d] of each group [n]; zero for those without."""
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, groups, values)
    means: NDArray[np.float64] = sums / np.maximum(np.bincount(groups, minlength=count), 1)[:, None]
    return means


@dataclass(frozen=True)
class ServerCopy:
    """A server part with its own head, fed from a table that was found. Is a `Stolen`."""

    server: Network
    table: Tabulated
    permuted: Ids
    """[V] permuted id of each true id."""

    def logits(self, ids: Ids) -> Floats:
        return self.server.logits(self.table.enter(ids))[:, self.permuted]


@dataclass(frozen=True)
class HeadedCopy:
    """A server part without a head, fed from a table that was found, under a head that was learned. Is a `Stolen`."""

    server: Network
    table: Tabulated
    head: torch.nn.Module
    """[n, d] to [n, V]."""

    def logits(self, ids: Ids) -> Floats:
        hidden = self.server.inside(self.table.enter(ids)).states[-1]
        with torch.inference_mode():
            result: Floats = self.head(torch.from_numpy(hidden)).numpy()
        return result


class Assembled(torch.nn.Module):
    """Something that turns ids into rows, blocks, and something that turns hidden states into logits; trainable. Is a
    `Stolen`."""

    def __init__(
        self,
        enter: torch.nn.Module,
        blocks: torch.nn.Module,
        leave: torch.nn.Module,
        positions: torch.Tensor | None = None,
    ) -> None:
        """`positions` [P, d] are added to what `enter` makes."""
        super().__init__()
        self.enter, self.blocks, self.leave, self.positions = enter, blocks, leave, positions

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[b, n] to [b, n, V]."""
        rows = self.enter(ids)
        if self.positions is not None:
            rows = rows + self.positions[torch.arange(ids.shape[1]).clamp(max=len(self.positions) - 1)]
        hidden = self.blocks(inputs_embeds=rows, use_cache=False).last_hidden_state
        scores: torch.Tensor = self.leave(hidden)
        return scores

    def logits(self, ids: Ids) -> Floats:
        with torch.inference_mode():
            result: Floats = self(torch.from_numpy(ids)[None])[0].numpy()
        return result
